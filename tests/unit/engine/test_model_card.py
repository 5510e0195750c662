"""A model card: its header is YAML, its tables are tables, whatever names there are."""

import html
import re

import yaml

from engine.model_card import Card, Measured, plain
from util.classes import Classes

NAMES = ("cat", "a|b", "<script>x</script>", "*bold*\n# head", "[link](http://x)", "")
CARD = Card(
    repo="jane/what-it-is",
    classes=Classes((3, 1, 2, 7, 8, 9), NAMES),
    thresholds={"cat": 0.25},
    backbone="timm/tf_x",
    weights=12345678,
    image_size=(480, 800),
)


def shown(markdown: str) -> str:
    """Return what Markdown shows of text in a line, by CommonMark's rule of backslashes."""
    return html.unescape(re.sub(r"\\([!-/:-@\[-`{-~])", r"\1", markdown))


def test_names_are_shown_as_they_are_and_stay_in_their_cell() -> None:
    lines = CARD.text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("| class |"))
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines[start : start + 7]]
    assert [len(row) for row in rows[:1] + rows[2:]] == [3] * 6
    expected = ["cat", "a|b", "<script>x</script>", "*bold*\\n# head", "[link](http://x)"]
    assert [shown(row[0].strip()) for row in rows[2:]] == expected
    assert [row[1].strip() for row in rows[2:]] == ["3", "1", "2", "7", "8"]
    assert [row[2].strip() for row in rows[2:]] == ["0.25", "n/a", "n/a", "n/a", "n/a"]
    assert "<script" not in CARD.text().replace("\\<script", "")
    assert plain("a\u202eb") == "a\\\\u202eb"


def test_the_header_is_what_is_known() -> None:
    bare = yaml.safe_load(CARD.text().split("---\n")[1])
    assert bare["library_name"] == "transformers"
    assert "license" not in bare
    assert "model-index" not in bare
    measured = Measured("x: {y}", {"AP": 0.12345, "AP50": 0.5, "AR_1": 0.25})
    card = Card(**{**vars(CARD), "measured": measured, "license": "mit", "lacking": "neck 'fpn'"})
    full = yaml.safe_load(card.text().split("---\n")[1])
    assert full["library_name"] == "deformable-detr"
    assert full["license"] == "mit"
    (result,) = full["model-index"][0]["results"]
    assert result["dataset"]["name"] == "x: {y}"
    assert {m["name"]: m["value"] for m in result["metrics"]} == {"AP": 0.1235, "AP50": 0.5}
    assert "`transformers` has no neck 'fpn', and so cannot load this model." in card.text()
    assert "| AR\\_1 | 0.250 |" in card.text().replace("AR_1", "AR\\_1")


def test_of_very_many_classes_the_rest_is_counted() -> None:
    many = Classes(tuple(range(1203)), tuple(f"class {i}" for i in range(1203)))
    text = Card(**{**vars(CARD), "classes": many}).text()
    assert text.count("| class ") == 201  # and the header
    assert "And 1003 more classes" in text
    assert "class 9 and 1193 more" in text
