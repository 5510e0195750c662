"""Options given in layers: recipes, values of earlier versions, and names without sections."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from configs.command_line import OptionParser, read_command_line
from configs.load import (
    Given,
    changed_options,
    read_options,
    to_yaml,
)
from configs.options import Checked, Section, by_section, option
from configs.schema import SECTIONS, Config
from util.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class OneToMany(Checked):
    """Options of a recipe."""

    k_one2many: int = option(6, "repeats of a box", low=1)
    mixed: bool = option(False, "a switch of its own", rare=True)


@dataclass(frozen=True, kw_only=True)
class Denoising(Checked):
    """Options of another recipe."""

    dn_number: int = option(100, "noised boxes", low=1)


class Recipes(Mapping[str, Section]):
    """Recipes' options, which notes what is asked for."""

    def __init__(self) -> None:
        self.classes: dict[str, Section] = {"denoising": Denoising, "one_to_many": OneToMany}
        self.imported: set[str] = set()

    def __getitem__(self, name: str) -> Section:
        section = self.classes[name]
        self.imported.add(name)
        return section

    def __contains__(self, name: object) -> bool:
        return name in self.classes

    def __iter__(self) -> Iterator[str]:
        return iter(self.classes)

    def __len__(self) -> int:
        return len(self.classes)


def parse(*argv: str, recipes: Mapping[str, Section] | None = None) -> Given:
    """Return the options of `train`."""
    parser = OptionParser(prog="train", all_help="--help_all" in argv)
    command = SimpleNamespace(SECTIONS=SECTIONS, RECIPES=Recipes() if recipes is None else recipes)
    return read_command_line(parser, command, argv)


def write(path: Path, text: str) -> str:
    """Write a config file."""
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_a_recipe_is_chosen_by_name_and_only_that_one_is_imported() -> None:
    recipes = Recipes()
    assert parse("--epochs", "3", recipes=recipes).config().recipes == {}
    assert not recipes.imported
    config = parse("--recipes", "one_to_many", "--k_one2many", "3", recipes=recipes).config()
    assert config.recipes == {"one_to_many": OneToMany(k_one2many=3)}
    assert recipes.imported == {"one_to_many"}
    both = parse("--recipes", "one_to_many", "denoising").config().recipes
    assert both == {"one_to_many": OneToMany(), "denoising": Denoising()}


def test_a_recipe_of_a_file_takes_flags_and_gives_way_to_those_chosen(tmp_path: Path) -> None:
    base = write(tmp_path / "base.yaml", "recipes: {one_to_many: {k_one2many: 4}, denoising: }\n")
    file = write(tmp_path / "c.yaml", f"base: {base}\nrecipes: {{one_to_many: {{mixed: true}}}}\n")
    assert parse("--config", file).config().recipes == {
        "one_to_many": OneToMany(k_one2many=4, mixed=True),
        "denoising": Denoising(),
    }
    flag = parse("--config", file, "--k_one2many", "2", "--no_mixed").config().recipes
    assert flag == {"one_to_many": OneToMany(k_one2many=2), "denoising": Denoising()}
    chosen = parse("--config", file, "--recipes", "one_to_many").config().recipes
    assert chosen == {"one_to_many": OneToMany(k_one2many=4, mixed=True)}
    assert parse("--config", file, "--recipes").config().recipes == {}


def test_an_option_that_one_recipe_has_chooses_it() -> None:
    for argv in (["--k_one2many=3"], ["--k_one2many", "3"]):
        assert parse(*argv).config().recipes == {"one_to_many": OneToMany(k_one2many=3)}
    both = parse("--recipes", "one_to_many", "--dn_number", "5").config().recipes
    assert both == {"one_to_many": OneToMany(), "denoising": Denoising(dn_number=5)}


class Alternatives(Recipes):
    """Recipes of which a model has one."""

    alternatives: ClassVar = {"matching": ("denoising", "one_to_many")}


def test_of_alternatives_the_last_one_chosen_stays(tmp_path: Path) -> None:
    base = write(tmp_path / "base.yaml", "recipes: {one_to_many: {k_one2many: 4}}\n")
    other = write(tmp_path / "other.yaml", f"base: {base}\nrecipes: {{denoising: }}\n")
    both = write(tmp_path / "both.yaml", "recipes: {denoising: , one_to_many: }\n")
    recipes = Alternatives()
    expected = {
        (): {"one_to_many": OneToMany(k_one2many=4)},
        ("--matching", "none"): {},
        ("--matching", "denoising"): {"denoising": Denoising()},
        ("--matching", "one_to_many"): {"one_to_many": OneToMany(k_one2many=4)},
        ("--dn_number", "5"): {"denoising": Denoising(dn_number=5)},
    }
    for argv, wanted in expected.items():
        config = parse("--config", base, *argv, recipes=recipes).config()
        assert config.recipes == wanted, argv
    assert parse("--config", other, recipes=recipes).config().recipes == {"denoising": Denoising()}
    with pytest.raises(ConfigError, match="denoising and one_to_many exclude each other"):
        parse("--config", both, recipes=recipes).config()
    with pytest.raises(ConfigError, match="matching"):
        parse("--matching", "some", recipes=recipes)


def test_recipes_keep_the_order_they_are_given_in() -> None:
    """It decides on random weights and on the order of losses, which processes must share."""
    for names in (["one_to_many", "denoising"], ["denoising", "one_to_many"]):
        assert list(parse("--recipes", *names).config().recipes) == names


def test_a_resolved_config_with_recipes_is_a_config_file(tmp_path: Path) -> None:
    given = parse("--recipes", "one_to_many", "denoising", "--k_one2many", "3")
    file = write(tmp_path / "config.yaml", to_yaml(given.config()))
    assert read_options(file, {}, Recipes()).config() == given.config()
    assert changed_options(given.config()) == ["recipes=one_to_many denoising", "k_one2many=3"]


def test_a_checkpoint_keeps_its_recipes_unless_others_are_chosen() -> None:
    saved = asdict(parse("--recipes", "one_to_many", "--k_one2many", "3").config())
    for argv, k in (((), 3), (("--recipes", "one_to_many", "--k_one2many", "5"), 5)):
        given = parse(*argv)
        config = given.on(given.saved(saved, "last.pth")).config()
        assert config.recipes == {"one_to_many": OneToMany(k_one2many=k)}
    given = parse("--recipes")
    assert given.on(given.saved(saved, "last.pth")).config().recipes == {}


def test_a_checkpoint_from_before_recipes_loads() -> None:
    saved = asdict(Config())
    del saved["recipes"]
    assert Given().saved(saved, "last.pth").config() == Config()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--recipes", "one_to_man"], "unknown recipe 'one_to_man'. Did you mean 'one_to_many'?"),
        (
            ["--recipes", "one_to_many", "--k_one2man", "3"],
            "unknown option '--k_one2man'. Did you mean '--k_one2many'?",
        ),
        (["--recipes", "one_to_many", "--k_one2many", "x"], "--k_one2many: must be a whole number"),
    ],
)
def test_a_wrong_recipe_is_a_one_line_error(argv: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse(*argv)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("recipes: {one_to_man: }", "unknown recipe 'one_to_man'. Did you mean 'one_to_many'?"),
        (
            "recipes: {one_to_many: {k_one2man: 3}}",
            "unknown option 'recipes.one_to_many.k_one2man'. Did you mean 'k_one2many'?",
        ),
        ("recipes: {one_to_many: 3}", "recipe 'one_to_many' needs options below it"),
        ("recipes: [one_to_many]", "section 'recipes' needs options below it"),
    ],
)
def test_a_wrong_recipe_in_a_file_is_a_one_line_error(
    tmp_path: Path, text: str, message: str
) -> None:
    with pytest.raises(ConfigError) as error:
        parse("--config", write(tmp_path / "c.yaml", text + "\n"))
    assert message in str(error.value)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize("flag", ["--help", "--help_all"])
def test_help_lists_the_options_of_every_recipe(
    flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse(flag)
    printed = capsys.readouterr().out
    assert "--k_one2many" in printed
    assert "--dn_number" in printed
    assert ("--mixed" in printed.split()) == (flag == "--help_all")


def test_help_all_lists_every_option_and_help_the_common_ones(
    capsys: pytest.CaptureFixture[str],
) -> None:
    shown = {}
    for flag in ("--help", "--help_all"):
        with pytest.raises(SystemExit):
            parse(flag)
        shown[flag] = set(capsys.readouterr().out.replace(",", " ").split())
    common: set[str] = set()
    for section in SECTIONS.values():
        for name, f in section.__dataclass_fields__.items():
            flags = {f"--{name}", f"--no_{name}"}
            assert shown["--help_all"] & flags, name
            assert bool(shown["--help"] & flags) != f.metadata["rare"], name
            common |= flags if not f.metadata["rare"] else set()
    assert {"--coco_path", "--output_dir", "--lr", "--epochs", "--batch_size"} <= common


def test_values_of_earlier_versions_mean_what_they_meant() -> None:
    """NMS at 1 kept all boxes, and an evaluation batch of 0 was that of training."""
    saved = {"data": {"nms_iou": 1.0}, "optim": {"eval_batch_size": 0}}
    config = Given().saved(saved, "last.pth").config()
    assert config.data.nms_iou is None
    assert config.optim.eval_batch_size is None
    assert config == Config()
    below = Given().saved({"data": {"nms_iou": 0.7}}, "last.pth")
    for value in ("1", "1.0", "none"):
        assert parse("--nms_iou", value).on(below).config().data.nms_iou is None
    assert parse().on(below).config().data.nms_iou == 0.7
    with pytest.raises(ConfigError, match="nms_iou: must be more than 0 and at most 1, not 1.5"):
        parse("--nms_iou", "1.5").config()


def test_options_by_name_alone_find_their_sections() -> None:
    values = by_section(
        {"train_images": Path("train"), "lr": 1e-3, "crop_size": [384, 600]}, SECTIONS
    )
    assert values == {
        "data": {"train_images": "train", "crop_size": (384, 600)},
        "optim": {"lr": 1e-3},
    }
    assert Given(values).config().optim.lr == 1e-3
    assert by_section({"num_pictures": 3}, SECTIONS) == {"run": {"num_images": 3}}
    with pytest.raises(ConfigError, match="unknown option 'train_image'. Did you mean 'train_im"):
        by_section({"train_image": "train"}, SECTIONS)
    with pytest.raises(ConfigError, match="lr: must be a number, not 'fast'"):
        by_section({"lr": "fast"}, SECTIONS)


def test_given_options_do_not_change_those_below() -> None:
    below: dict[str, dict[str, Any]] = {"data": {"coco_path": "coco", "max_size": 99}}
    Given({"data": {"train_images": "t"}}).on(Given(below))
    assert below == {"data": {"coco_path": "coco", "max_size": 99}}


@pytest.mark.parametrize("name", ["x" * 5000, "a\\0b", "\\x1b[2J"])
def test_a_base_of_any_name_is_one_that_is_missing(tmp_path: Path, name: str) -> None:
    (tmp_path / "x.yaml").write_text(f'base: "{name}"')
    with pytest.raises(ConfigError, match="no such file"):
        read_options(str(tmp_path / "x.yaml"), {})


def test_auto_leaves_options_open_by_name_and_as_a_base(tmp_path: Path) -> None:
    (tmp_path / "data.yaml").write_text("base: auto\ndata: {max_size: 99}\n")
    (tmp_path / "mine.yaml").write_text("base: data\nmodel: {num_queries: 7}\n")
    for file, values in (
        ("auto", {}),
        (str(tmp_path / "data.yaml"), {"data": {"max_size": 99}}),
        (str(tmp_path / "mine.yaml"), {"data": {"max_size": 99}, "model": {"num_queries": 7}}),
    ):
        found = read_options(file, {"optim": {"lr": 0.1}})
        assert found.auto
        assert found.values == {**values, "optim": {"lr": 0.1}}
    assert not read_options("deformable_detr_r50", {}).auto


def test_a_command_without_a_plan_refuses_auto() -> None:
    with pytest.raises(ConfigError, match="config auto: works with `train` and `plan` only"):
        parse("--config", "auto")
