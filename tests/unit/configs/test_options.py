"""Options from flags and files: precedence, types, names, and what is refused."""

import dataclasses
import string
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from configs.command_line import OptionParser, with_dashes
from configs.load import Values, changed_options, file_or_preset, load_file, merge, to_yaml
from configs.options import Checked, Section, coerce, option
from util.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Net(Checked):
    """A section with one option of each kind."""

    depth: int = option(6, "layers", low=1, high=9)
    rate: float = option(1e-3, "rate, in % of one", above=0)
    kind: Literal["sine", "learned"] = option("sine", "encoding")
    aux: bool = option(True, "auxiliary losses")
    mix: bool = option(True, "blend images", off="keep images apart")
    refine: bool = option(False, "refinement")
    sizes: tuple[int, ...] = option((480, 512), "short sides", low=16)
    name: str = option("", "free text")
    limit: float | None = option(None, "may be absent")
    parts: tuple[Literal["stem", "head"], ...] = option((), "parts of a net")


@dataclass(frozen=True, kw_only=True)
class Run:
    """A second section."""

    seed: int = option(42, "seed")


@dataclass(frozen=True)
class Both:
    """All sections."""

    net: Net = field(default_factory=Net)
    run: Run = field(default_factory=Run)


SECTIONS = {"net": Net, "run": Run}


def parser_of(sections: Mapping[str, Section], *, all_help: bool = False) -> OptionParser:
    """Return a parser of sections."""
    parser = OptionParser(all_help=all_help)
    for title, section in sections.items():
        parser.add_section(title, section)
    return parser


def parse(*argv: str) -> Values:
    """Return the values a command line sets."""
    return parser_of(SECTIONS).parse_options(argv)[1]


def build(values: Values) -> Both:
    """Make the sections from values."""
    return Both(Net(**values.get("net", {})), Run(**values.get("run", {})))


def write(path: Path, text: str) -> Path:
    """Write a config file."""
    path.write_text(text, encoding="utf-8")
    return path


def test_later_layers_win(tmp_path: Path) -> None:
    write(tmp_path / "base.yaml", "net: {depth: 2, rate: 0.2, name: base}\nrun: {seed: 1}\n")
    file = write(tmp_path / "own.yaml", "base: base.yaml\nnet: {rate: 0.3, name: own}\n")
    config = build(merge(load_file(file, SECTIONS), parse("--name", "flag")))
    assert (config.net.kind, config.net.depth, config.net.rate, config.net.name) == (
        "sine", 2, 0.3, "flag",
    )  # fmt: skip
    assert config.run.seed == 1


def test_base_is_found_next_to_the_file_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    write(tmp_path / "root.yaml", "net: {depth: 3}\n")
    write(tmp_path / "deep" / "middle.yaml", "base: ../root.yaml\n")
    file = write(tmp_path / "leaf.yaml", "base: deep/middle.yaml\n")
    assert load_file(file, SECTIONS) == {"net": {"depth": 3}}


def test_presets_are_found_from_anywhere_but_a_file_of_ones_own_wins(tmp_path: Path) -> None:
    for folder in ("presets", "mine"):
        (tmp_path / folder).mkdir()
    presets = tmp_path / "presets"
    write(presets / "small.yaml", "net: {depth: 3}\n")
    for base in ("small", "small.yaml", "configs/small.yaml"):
        file = write(tmp_path / "mine" / "a.yaml", f"base: {base}\nnet: {{kind: learned}}\n")
        expected = {"net": {"depth": 3, "kind": "learned"}}
        assert load_file(file, SECTIONS, presets) == expected
        assert file_or_preset(tmp_path, base, presets) == presets / "small.yaml"
    with pytest.raises(ConfigError, match=r"other/small\.yaml: no such file\. Did you mean"):
        load_file(file_or_preset(tmp_path, "other/small.yaml", presets), SECTIONS, presets)
    write(tmp_path / "mine" / "small.yaml", "net: {depth: 4}\n")
    for base in ("small.yaml", "small"):
        file = write(tmp_path / "mine" / "a.yaml", f"base: {base}\n")
        assert load_file(file, SECTIONS, presets) == {"net": {"depth": 4}}


def test_circular_base_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.yaml", "base: b.yaml\n")
    write(tmp_path / "b.yaml", "base: a.yaml\n")
    with pytest.raises(ConfigError, match="leads back to itself"):
        load_file(tmp_path / "a.yaml", SECTIONS)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("net: {dept: 3}", "unknown option 'net.dept'. Did you mean 'depth'?"),
        ("nett: {depth: 3}", "unknown section 'nett'. Did you mean 'net'?"),
        ("zzz: {}", "unknown section 'zzz'. Known: net, run."),
        ("net: 3", "section 'net' needs options below it"),
        ("[1, 2]", "must hold sections (net, run), not [1, 2]"),
        ("net: {depth: six}", "net.depth: must be a whole number, not 'six'"),
        ("net: {depth: 2.5}", "net.depth: must be a whole number, not 2.5"),
        ("net: {depth: true}", "net.depth: must be a whole number, not True"),
        ("net: {depth: }", "net.depth: must be a whole number, not None"),
        ("net: {aux: 1}", "net.aux: must be true or false, not 1"),
        ("net: {name: yes}", "net.name: must be text, not True"),
        ("net: {name: [a]}", "net.name: must be text, not ['a']"),
        ("net: {sizes: [480, x]}", "net.sizes: must be a whole number, not 'x'"),
        ("net: {depth: 1", "not a YAML file"),
        ("base: nowhere.yaml", "nowhere.yaml: no such file"),
    ],
)
def test_a_wrong_file_is_a_one_line_error(tmp_path: Path, text: str, message: str) -> None:
    file = write(tmp_path / "c.yaml", text + "\n")
    with pytest.raises(ConfigError) as error:
        load_file(file, SECTIONS)
    assert message in str(error.value)
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


def test_empty_files_and_sections_without_options_set_nothing(tmp_path: Path) -> None:
    assert load_file(write(tmp_path / "a.yaml", ""), SECTIONS) == {}
    assert load_file(write(tmp_path / "b.yaml", "net: {}\n"), SECTIONS) == {}


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "0.0001", "1.0e-4"])
def test_numbers_may_be_written_with_an_exponent(tmp_path: Path, text: str) -> None:
    file = write(tmp_path / "c.yaml", f"net: {{rate: {text}}}\n")
    assert load_file(file, SECTIONS) == parse("--rate", text) == {"net": {"rate": 1e-4}}


def test_whole_numbers_may_be_written_as_floats() -> None:
    assert parse("--depth", "6.0") == {"net": {"depth": 6}}
    assert isinstance(parse("--depth", "6.0")["net"]["depth"], int)


@given(st.integers())
@example(2**53 + 1)
def test_integers_keep_every_digit(seed: int) -> None:
    assert coerce(seed, int, "here") == seed
    assert coerce(str(seed), int, "here") == seed


def test_flags_not_given_set_nothing() -> None:
    assert parse() == {}


def test_boolean_flags_have_a_negative_form() -> None:
    assert parse("--no_aux", "--refine") == {"net": {"aux": False, "refine": True}}
    assert parse("--no_refine", "--aux") == {"net": {"aux": True, "refine": False}}
    assert parse("--aux", "--no_aux") == {"net": {"aux": False}}


def test_a_flag_undoes_a_file(tmp_path: Path) -> None:
    file = write(tmp_path / "c.yaml", "net: {refine: true}\n")
    assert not build(merge(load_file(file, SECTIONS), parse("--no_refine"))).net.refine


def test_tuples_take_any_number_of_values(tmp_path: Path) -> None:
    assert parse("--sizes", "480", "500", "--depth", "3")["net"]["sizes"] == (480, 500)
    assert parse("--sizes")["net"]["sizes"] == ()
    file = write(tmp_path / "c.yaml", "net: {sizes: 640}\n")
    assert load_file(file, SECTIONS) == {"net": {"sizes": (640,)}}


def test_optional_values_may_be_absent() -> None:
    assert coerce(None, float | None, "here") is None
    assert coerce("1e-2", float | None, "here") == 0.01


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--dept", "3"], "command line: unknown option '--dept'. Did you mean '--depth'?"),
        (["--no_refin"], "unknown option '--no_refin'. Did you mean '--no_refine'?"),
        (["--depth", "six"], "--depth: must be a whole number, not 'six'."),
        (["--depth", "1e999999999"], "--depth: must be a whole number, not '1e999999999'."),
        (["--rate", "fast"], "--rate: must be a number, not 'fast'."),
        (["--sizes", "480", "big"], "--sizes: must be a whole number, not 'big'."),
        (["stray"], "unknown option 'stray'."),
    ],
)
def test_a_wrong_flag_is_a_one_line_error(argv: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse(*argv)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"depth": 0}, "depth: must be at least 1 and at most 9, not 0."),
        ({"depth": 10}, "depth: must be at least 1 and at most 9, not 10."),
        ({"rate": 0.0}, "rate: must be more than 0, not 0.0."),
        ({"rate": float("nan")}, "rate: must be more than 0, not nan."),
        ({"sizes": (480, 8)}, "sizes: must be at least 16, not 8."),
        ({"kind": "sin"}, "kind: must be one of sine, learned, not 'sin'. Did you mean 'sine'?"),
        (
            {"parts": ("stem", "heat")},
            "parts: must be one of stem, head, not 'heat'. Did you mean 'head'?",
        ),
    ],
)
def test_values_out_of_range_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        Net(**values)
    assert str(error.value) == message


def test_bounds_are_inclusive_except_above() -> None:
    assert Net(depth=1).depth == 1
    assert Net(depth=9).depth == 9
    assert Net(rate=1e-300).rate == 1e-300


def test_help_survives_percent_signs_and_names_defaults() -> None:
    text = " ".join(parser_of(SECTIONS).format_help().split())
    assert "rate, in % of one (default: 0.001)" in text
    assert "--kind sine|learned" in text
    assert "--no_aux without auxiliary losses" in text
    assert "--no_mix keep images apart" in text


def test_help_leaves_out_what_is_rare_or_not_relevant() -> None:
    parser = OptionParser()
    parser.add_section("net", Net, relevant=("rate", "aux"), default="the checkpoint's")
    parser.add_section("run", Run, relevant=())
    text = " ".join(parser.format_help().split())
    assert "--rate X rate, in % of one (default: the checkpoint's)" in text
    assert "--no_aux without auxiliary losses (default: the checkpoint's)" in text
    assert "--depth" not in text
    assert "run:" not in text
    assert text.endswith("9 more options, which are rarely used or have no effect here.")
    assert parser.parse_options(["--depth", "3"])[1] == {"net": {"depth": 3}}


texts = st.text(alphabet=st.characters(codec="utf-8"), max_size=12)
nets = st.builds(
    Net,
    depth=st.integers(1, 9),
    rate=st.floats(min_value=0, exclude_min=True, allow_nan=False, allow_infinity=False),
    kind=st.sampled_from(["sine", "learned"]),
    aux=st.booleans(),
    refine=st.booleans(),
    sizes=st.lists(st.integers(16, 2000), max_size=4).map(tuple),
    name=texts | st.sampled_from(["yes", "null", "1e-4", "~", "0x10", "=", "- a", "a: b", "#"]),
    limit=st.none() | st.floats(allow_nan=False, allow_infinity=False),
    parts=st.lists(st.sampled_from(["stem", "head"]), max_size=3).map(tuple),
)


@given(nets, st.integers())
def test_a_saved_config_reads_back_as_itself(
    tmp_path_factory: pytest.TempPathFactory, net: Net, seed: int
) -> None:
    config = Both(net, Run(seed=seed))
    file = write(tmp_path_factory.getbasetemp() / "round.yaml", to_yaml(config))
    assert build(load_file(file, SECTIONS)) == config


@given(nets)
def test_flags_read_back_as_themselves(net: Net) -> None:
    argv = ["--aux" if net.aux else "--no_aux", "--refine" if net.refine else "--no_refine"]
    for name in ("depth", "rate", "kind"):
        argv += [f"--{name}", str(getattr(net, name))]
    argv += ["--sizes", *map(str, net.sizes), "--parts", *net.parts]
    read = build(parse(*argv)).net
    assert read == dataclasses.replace(net, name="", limit=None)


@given(st.text(string.ascii_lowercase, min_size=1, max_size=8))
def test_every_unknown_key_is_refused(key: str) -> None:
    if key in {"help", "debug", *(f.name for f in dataclasses.fields(Net))}:
        return
    with pytest.raises(ConfigError, match="unknown option"):
        parse(f"--{key}")


def test_changed_options_are_named() -> None:
    config = Both(Net(depth=3, sizes=(16,)), Run())
    assert changed_options(config) == ["depth=3", "sizes=(16,)"]
    assert changed_options(Both()) == []
    assert yaml.safe_load(to_yaml(config))["net"]["sizes"] == [16]


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("depth: must be 1.", "--depth: must be 1."),
        ("device cuda:9: is not here.", "--device cuda:9: is not here."),
        ("device a b: is it: here?", "--device a b: is it: here?"),
        ("use `depth` or `depth 3 4`; `base` stays", "use --depth or --depth 3 4; `base` stays"),
        ("c.yaml: depth: must be 1.", "c.yaml: depth: must be 1."),
        ("wide: unknown, as is `wide 2`", "wide: unknown, as is `wide 2`"),
        ("the_name is set; no 'the_name' in a.the_name, x\\the_name, x/the_name", None),
        ("the_name/a.json", None),
        ("--the_name: is wrong", None),
    ],
)
def test_options_that_an_error_names_become_flags(message: str, shown: str | None) -> None:
    flags = {"--depth", "--device", "--the_name"}
    assert with_dashes(message, flags, about_option=True) == (shown or message)


@pytest.mark.parametrize("path", ["depth", "device a", "runs\\the_name", "the_name"])
def test_a_path_that_is_called_like_an_option_stays_a_path(path: str) -> None:
    message = f"{path}: no such folder. Check `the_name`."
    shown = with_dashes(message, {"--depth", "--device", "--the_name"}, about_option=False)
    assert shown == f"{path}: no such folder. Check --the_name."
