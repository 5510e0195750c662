"""What the documentation names exists: links, headings, files, names in files, options."""

import contextlib
import importlib
import io
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from configs.command_line import OptionParser
from datasets.checks import kinds
from main import main

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "ops/README.md")]
PAGES += sorted((ROOT / "docs").glob("*.md"))
FIGURES = sorted((ROOT / "docs/images").glob("*.svg"))
COMMANDS = (
    "app",
    "push",
    "train",
    "plan",
    "eval",
    "export",
    "compare",
    "predict",
    "average",
    "convert",
    "check",
    "preview",
    "explain",
    "benchmark",
)
OTHER_TOOLS = (
    "git",
    "make",
    "mypy",
    "pip",
    "pytest",
    "ruff",
    "sbatch",
    "srun",
    "tensorboard",
    "torchrun",
)
FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
OPTION = re.compile(r"(?<![\w-])--\w[\w-]*")
OUR_FILE = re.compile(
    r"(?<![\w./-])(?:main\.py|setup\.py|(?:configs|datasets|docs|engine|models|ops|tests|util)/[\w./*-]*)"
)

# what a page shows how to add: "`path`:" above a code block, and the options declared in it
SHOWN_FILE = re.compile(r"^`([\w/]+\.py)`:$", re.MULTILINE)
SHOWN_OPTION = re.compile(r"^ +(\w+): .+ = option\(", re.MULTILINE)

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def anchor(heading: str) -> str:
    """Return the anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def snippets(page: Path) -> Iterator[str]:
    """Yield the lines of code blocks, continued ones joined, then each piece of inline code."""
    text = page.read_text(encoding="utf-8")
    for block in FENCED.findall(text):
        for line in block.replace("\\\n", " ").splitlines():
            yield re.sub(r"(^|\s)#.*", "", line)
    for code in re.findall(r"`([^`]+)`", FENCED.sub("", text)):
        yield " ".join(code.split())


@cache
def options_of(command: str) -> frozenset[str]:
    """Return the options that the help of a command of ours lists."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        if main([command, "--help_all"]) != 0:
            main([command, "--help"])
    return frozenset(OPTION.findall(printed.getvalue())) | switched_off(command)


def switched_off(command: str) -> frozenset[str]:
    """Return the flags that turn off what is off by default, but may be on in a preset."""
    parser = OptionParser()
    module = importlib.import_module(f"engine.commands.{command}")
    for title, section in module.SECTIONS.items():
        parser.add_section(title, section)
    return frozenset(flag for flag in parser.flags if flag.startswith("--no_"))


@cache
def options_of_module(module: str) -> frozenset[str]:
    """Return the options that a module of ours, run by `python -m`, declares in its source."""
    path = ROOT / module.replace("msdeform", "ops").replace(".", "/")
    source = path.with_suffix(".py").read_text(encoding="utf-8")
    found = re.findall(r'"--(\w[\w-]*)"', source)
    on_and_off = re.findall(r'"--(\w+)", action=argparse.BooleanOptionalAction', source)
    return frozenset([f"--{name}" for name in found] + [f"--no-{name}" for name in on_and_off])


def unknown_options(code: str, elsewhere: frozenset[str]) -> set[str]:
    """Return the options of a snippet that its program lacks; `elsewhere`: where it names none."""
    ours = re.search(rf"(?:main\.py|deformable-detr) +({'|'.join(COMMANDS)})\b(.*)", code)
    if ours:
        return set(OPTION.findall(ours[2])) - options_of(ours[1])
    module = re.search(r"python -m ([\w.]+)(.*)", code)
    if module and module[1].partition(".")[0] not in OTHER_TOOLS:
        own = re.sub(r'"[^"]*"', "", module[2])  # what is quoted is a command line of `train`
        return set(OPTION.findall(own)) - options_of_module(module[1])
    if module or code.startswith(OTHER_TOOLS):
        return set()
    return set(OPTION.findall(code)) - elsewhere


@each_page
def test_every_link_leads_to_a_file_and_a_heading(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCED.sub("", page.read_text(encoding="utf-8"))):
        if "://" in target:
            continue
        name, _, heading = target.partition("#")
        file = page.parent / name if name else page
        assert file.exists(), target
        if heading:
            text = FENCED.sub("", file.read_text(encoding="utf-8"))
            assert heading in map(anchor, re.findall(r"^#+ (.*)", text, re.MULTILINE)), target


@each_page
def test_every_option_belongs_to_the_program_it_is_given_to(page: Path) -> None:
    codes = list(snippets(page))
    modules = {m for code in codes for m in re.findall(r"python -m ((?:tests|ops)[\w.]+)", code)}
    shown = {f"--{name}" for name in SHOWN_OPTION.findall(page.read_text(encoding="utf-8"))}
    anywhere = frozenset(shown).union(*map(options_of, COMMANDS), *map(options_of_module, modules))
    unknown = {code: missing for code in codes if (missing := unknown_options(code, anywhere))}
    assert not unknown


def test_a_wrong_option_is_noticed() -> None:
    assert unknown_options("python main.py eval --lr 1 --checkpoint F", frozenset()) == {"--lr"}
    assert unknown_options("torchrun --x 2 main.py train --lrr 1", frozenset()) == {"--lrr"}
    assert unknown_options("python -m ops.benchmark --cases a --cas", frozenset()) == {"--cas"}
    assert unknown_options("--no_probe", options_of("eval")) == {"--no_probe"}


@pytest.mark.parametrize("page", [*PAGES, *FIGURES], ids=lambda page: str(page.relative_to(ROOT)))
def test_every_file_of_ours_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    labels = re.findall(r'<text class="file"[^>]*>([^<]*)', text)
    codes = labels if page.suffix == ".svg" else list(snippets(page))
    names = {name for code in codes for name in OUR_FILE.findall(code)}
    names -= set(SHOWN_FILE.findall(text))
    assert not [name for name in sorted(names) if not any(ROOT.glob(name.rstrip("./")))]


@each_page
def test_every_name_the_docs_place_in_a_file_is_there(page: Path) -> None:
    pairs = re.findall(
        r"`([A-Za-z_][\w.]*)(?:\([\w, ]*\))?`(?: and `([A-Za-z_][\w.]*)`)? in\s+`([\w/]+\.py)`",
        page.read_text(encoding="utf-8"),
    )
    for *names, file in pairs:
        source = (ROOT / file).read_text(encoding="utf-8")
        for part in ".".join(filter(None, names)).split("."):
            assert re.search(rf"\b(class|def) {part}\b|\b{part}\b\s*[:=]", source), (part, file)


def test_the_tables_of_kinds_are_those_of_the_checks() -> None:
    text = (ROOT / "docs/data.md").read_text(encoding="utf-8")
    assert kinds.tables().strip() in text, "`python -m datasets.checks.kinds` prints them"
