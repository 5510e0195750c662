"""Parts of a page: well formed whatever the text, drawn to scale, images that open."""

import base64
import io
import re
import xml.etree.ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from util.html import bar, column_chart, curve_chart, heat, image, shown, table

TEXT = st.text(st.characters(codec="utf-8", exclude_categories=["Cc"]), max_size=12)
WHOLE = st.integers(0, 10**6)


def parse(part: str) -> ET.Element:
    """Return the tree of a part, which must be well-formed XML."""
    return ET.fromstring(part)


@given(
    labels=st.lists(TEXT, min_size=1, max_size=5),
    names=st.lists(TEXT, max_size=3, unique=True),
    data=st.data(),
)
def test_columns_are_shares_of_each_series(
    labels: list[str], names: list[str], data: st.DataObject
) -> None:
    counts = st.lists(WHOLE, min_size=len(labels), max_size=len(labels))
    series = {name: data.draw(counts) for name in names}
    svg = parse(column_chart(labels, series, "told <&>", across="x & y"))
    assert svg.get("aria-label") == "told <&>"
    columns = [r for r in svg.iter("rect") if r.find("title") is not None]
    assert [r.findtext("title") for r in columns] == [
        f"{name}, {label}: {count}"
        for name, values in series.items()
        for label, count in zip(labels, values, strict=True)
    ]
    heights = iter(float(r.get("height", "nan")) for r in columns)
    shares = [n / max(1, sum(values)) for values in series.values() for n in values]
    ticks = [t.text or "" for t in svg.iter("text") if t.get("text-anchor") == "end"][:3]
    bottom, _, top = (float(tick.removesuffix("%")) / 100 for tick in ticks)
    assert bottom == 0
    assert round(5 * top, 6).is_integer()
    assert top >= max(shares, default=0) >= top - 0.2 - 1e-9 or not any(shares)
    tallest = 260 - 32 - 52
    for share in shares:
        assert next(heights) == pytest.approx(tallest * share / top, abs=0.06)
    for r in columns:
        assert float(r.get("y", "nan")) + float(r.get("height", "nan")) == pytest.approx(208, abs=1)


@given(lines=st.dictionaries(TEXT, st.lists(st.floats(0, 1), min_size=2, max_size=5), max_size=4))
def test_curves_run_from_corner_to_corner(lines: dict[str, list[float]]) -> None:
    svg = parse(curve_chart(lines, "a <b>", width=400))
    drawn = [line.get("points", "").split() for line in svg.iter("polyline")]
    assert [len(points) for points in drawn] == [len(values) for values in lines.values()]
    for points, values in zip(drawn, lines.values(), strict=True):
        xs, ys = zip(*(map(float, point.split(",")) for point in points), strict=True)
        assert (xs[0], xs[-1]) == (48, 388)
        for y, value in zip(ys, values, strict=True):
            assert y == pytest.approx(32 + (1 - value) * (248 - 32 - 40), abs=0.06)
    assert {text.text for text in svg.iter("text")} >= set(lines) - {""}


def test_a_table_has_a_head_for_each_column_and_row() -> None:
    part = table("a <caption>", ["class", "", "n"], [["cat", bar(3, 4), "3"], ["dog", "", "1"]])
    tree = parse(part)
    assert tree.get("aria-label") == tree.findtext("table/caption") == "a <caption>"
    assert [th.text for th in tree.iter("th")] == ["class", "n", "cat", "dog"]
    assert [len(tr) for tr in tree.iter("tr")] == [3, 3, 3]
    assert "width:75.0%" in part


def test_cells_show_what_there_is() -> None:
    assert shown(None) == "n/a"
    assert shown(0.12345, 2) == "0.12"
    assert "<span" not in bar(0, 0) + bar(None, 5) + bar(0, 5)
    assert "·" in heat(0, 9, right=True)
    assert "--c0" in heat(2, 9, right=True)
    assert "--c1" in heat(2, 9, right=False)


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P"])
def test_a_image_is_made_no_wider_than_asked(mode: str) -> None:
    part = image(Image.new("RGB", (300, 150)).convert(mode), 'a "b" <c>', width=100)
    code = re.search(r'base64,([^"]*)"', part)
    assert code is not None
    opened = Image.open(io.BytesIO(base64.b64decode(code[1])))
    assert opened.size == (100, 50)
    assert 'width="100" height="50"' in part
    assert 'alt="a &quot;b&quot; &lt;c&gt;"' in part
