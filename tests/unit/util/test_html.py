"""Pages: templates escape, parts are well formed whatever the text, images open."""

import base64
import io
import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import jinja2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markupsafe import Markup
from PIL import Image

from util.html import inline_image, number, render, svg
from util.plot import THEME, column_chart, curve_chart

TEXT = st.text(st.characters(codec="utf-8", exclude_categories=["Cc"]), max_size=12)
LABEL = st.text("a<&>$ é%/", max_size=8)  # of letters that the chart's font has
XLINK = "{http://www.w3.org/1999/xlink}href"


def parse(part: str) -> ET.Element:
    """Return the tree of a part, which must be well-formed XML."""
    return ET.fromstring(re.sub(r"{http[^}]*}", "", part))


def part(folder: Path, body: str, **values: Any) -> str:
    """Return what a template makes of the parts of reports."""
    template = folder / "page.html.j2"
    template.write_text(f'{{% from "parts.html.j2" import bar, figure, table %}}{body}')
    return render(template, **values).strip()


@pytest.mark.long
@settings(max_examples=25)
@given(description=TEXT, labels=st.lists(LABEL, min_size=1, max_size=4))
def test_charts_are_well_formed_and_say_what_they_show(description: str, labels: list[str]) -> None:
    chart = column_chart(labels, {"train $": [3] * len(labels)}, xlabel="x & y")
    tree = parse(svg(chart, description))
    assert (tree.get("role"), tree.get("aria-label")) == ("img", description)
    names = {element.tag.rpartition("}")[2] for element in tree.iter()}
    assert not names & {"script", "image", "a", "metadata"}
    text = [element.text for element in tree.iter() if element.tag.endswith("text")]
    assert {"x & y", "train $"} <= set(text)
    titles = [element.text for element in tree.iter() if element.tag.endswith("title")]
    assert titles == [f"train $, {label}: 3" for label in labels]


def test_charts_take_their_colours_from_the_page_and_share_no_ids() -> None:
    charts = [svg(curve_chart({"a": [1, 0], "b": [0.5, 0]}), text) for text in ("one", "two")]
    for chart in charts:
        assert {f"var(--{name})" for name in ("soft", "line", "c0", "c1")} <= set(
            re.findall(r"var\(--\w+\)", chart)
        )
        assert not [colour for colour in THEME.values() if colour in chart]
        tree = parse(chart)
        own = {e.get("id") for e in tree.iter()} - {None}
        used = {e.get(XLINK, "").removeprefix("#") for e in tree.iter()} - {""}
        assert used <= own
    ids = [set(re.findall(r' id="([^"]*)"', chart)) for chart in charts]
    assert not ids[0] & ids[1]
    assert isinstance(charts[0], Markup), "a template takes it as it is"


def test_a_chart_fits_its_box_in_pixels() -> None:
    tree = parse(svg(curve_chart({"a": [1, 0]}), "a"))
    _, _, width, height = (float(v) for v in tree.get("viewBox", "").split())
    assert (float(tree.get("width", "")), float(tree.get("height", ""))) == (width, height)
    assert width == pytest.approx(560)


def test_templates_escape_what_they_are_given(tmp_path: Path) -> None:
    hostile = "<script>alert('1')</script>\" onload=\"x"
    template = tmp_path / "page.html.j2"
    template.write_text(
        '{% extends "base.html.j2" %}{% block content %}<b title="{{ text }}">{{ text }}</b>'
        "{{ safe }}{% endblock %}"
    )
    page = render(template, title=hostile, text=hostile, safe=Markup("<i>ours</i>"))
    assert "<script" not in page
    assert '" onload="' not in page
    assert page.count("&lt;script&gt;") == 4
    assert "<i>ours</i>" in page
    assert page.startswith("<!doctype html>")
    with pytest.raises(jinja2.UndefinedError):
        render(template, title="a value that the template names is missing")


def test_a_table_has_a_head_for_each_column_and_row(tmp_path: Path) -> None:
    body = """{% call table("a <caption>", ["class", "", "n"], text=["n"]) %}
    {% for name, count in rows %}
    <tr><th scope="row">{{ name }}</th>{{ bar(count, 4) }}<td>{{ count }}</td></tr>
    {% endfor %}{% endcall %}"""
    text = part(tmp_path, body, rows=[("c<a>t", 3), ("dog", 0)])
    tree = parse(text)
    assert tree.get("aria-label") == tree.findtext("table/caption") == "a <caption>"
    assert [th.text for th in tree.iter("th")] == ["class", "n", "c<a>t", "dog"]
    assert {th.get("scope") for th in tree.iter("th")} == {"col", "row"}
    assert [len(tr) for tr in tree.iter("tr")] == [3, 3, 3]
    assert text.count("width:75.0%") == text.count("<span") == 1


def test_bars_show_what_there_is(tmp_path: Path) -> None:
    body = "<tr>{{ bar(0, 0) }}{{ bar(none, 5) }}{{ bar(0, 5) }}{{ bar(2, none) }}</tr>"
    assert "<span" not in part(tmp_path, body)


def test_numbers_show_what_there_is() -> None:
    assert number(None) == "n/a"
    assert number(0.12345, 2) == "0.12"


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P"])
def test_an_image_is_made_no_wider_than_asked(mode: str, tmp_path: Path) -> None:
    image = inline_image(Image.new("RGB", (300, 150)).convert(mode), max_width=100)
    opened = Image.open(
        io.BytesIO(base64.b64decode(image.url.removeprefix("data:image/jpeg;base64,")))
    )
    assert opened.size == (image.width, image.height) == (100, 50)
    text = part(tmp_path, "{{ figure(image, name, name) }}", image=image, name='a "b" <c>')
    assert 'width="100" height="50"' in text
    assert 'alt="a &#34;b&#34; &lt;c&gt;"' in text
    assert "<figcaption>a &#34;b&#34; &lt;c&gt;</figcaption>" in text
