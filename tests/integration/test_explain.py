"""`explain` as a user runs it, and its page in a browser."""

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from tests.integration.browser import Browser, chromium
from tests.integration.conftest import Cli


@pytest.fixture(scope="module")
def image(shapes: Path) -> Path:
    """An image of the generated set."""
    return sorted((shapes / "val2017").iterdir())[0]


@pytest.fixture(scope="module")
def explained(
    cli: Cli, finished_run: Path, image: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The folder of an explanation of two queries and a token."""
    folder = tmp_path_factory.mktemp("explained")
    done = cli("explain", "--checkpoint", finished_run / "last.pth", "--input", image,
               "--output_dir", folder, "--threshold", "0", "--count", "2", "--token", "30,40,1",
               "--json", "--device", "cpu")  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder


def content_of(folder: Path) -> Any:
    """Return the numbers that were written."""
    return json.loads((folder / "explanation.json").read_text())


def test_everything_named_is_written(explained: Path, image: Path) -> None:
    content = content_of(explained)
    names = [f"query_{query['query']:03d}.png" for query in content["queries"]]
    assert len(names) == 2
    assert sorted(path.name for path in explained.iterdir()) == sorted(
        [*names, "token.png", "explain.html", "explanation.json"]
    )
    for name in [*names, "token.png"]:
        with Image.open(explained / name) as picture:
            pixels = np.asarray(picture.convert("RGB"))
        assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 1000
    with Image.open(image) as original:
        assert content["size"] == list(original.size)


def test_the_page_needs_nothing_but_itself(explained: Path) -> None:
    page = (explained / "explain.html").read_text()
    addresses = re.findall(r"""(?:src|href)=["']?([^"'> ]{1,40})""", page)
    assert addresses
    assert all(address.startswith("data:image/jpeg;base64,") for address in addresses)
    assert page.count("http") == page.count("http://www.w3.org/2000/svg")


def in_browser(page: Path, state: str, folder: Path) -> str:
    """Return the page as the browser has it after its script, opened at an address of its own."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("needs Chromium, which is not installed")
    done = subprocess.run(
        [browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
         f"--user-data-dir={folder}", "--dump-dom", f"file://{page}#{state}"],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.long
def test_a_browser_draws_the_points_that_are_chosen(explained: Path, tmp_path: Path) -> None:
    state = "item=1&layer=0&head=1&level=all&colour=level&others=1"
    shown = in_browser(explained / "explain.html", state, tmp_path)
    query = content_of(explained)["queries"][1]
    points = np.array(query["sampling"]["points"][0][1]).reshape(-1, 2)
    weights = np.array(query["sampling"]["weights"][0][1]).reshape(-1)
    circles = [
        ElementTree.fromstring(text).attrib
        for text in re.findall(r"<circle [^>]*>(?=<title>)", shown)
        for text in [text.replace(">", "/>")]
    ]
    drawn = np.array([[float(c[k]) for k in ("cx", "cy", "data-weight")] for c in circles])
    expected = np.column_stack([points, weights])
    assert drawn.shape == expected.shape
    order = drawn[:, 2].argsort(), expected[:, 2].argsort()
    np.testing.assert_allclose(drawn[order[0], 2], expected[order[1], 2], atol=1e-5)
    for x, y, weight in drawn:
        assert np.abs(expected - [x, y, weight]).max(1).min() <= 0.06
    assert drawn[:, 2].sum() == pytest.approx(1, abs=1e-4)
    text = unescape(shown)
    assert f"{query['name']} {query['score']:.2f} (query {query['query']}), layer 0: " in text
    assert "which weigh 1.000 of 1 per head" in text
    outside = int(((points < 0) | (points > content_of(explained)["size"])).any(1).sum())
    said = re.search(r"Outside the image, where zeros are read: (\d+)\.", text)
    assert outside == (int(said[1]) if said else 0)
    rows = re.findall(
        r"<th scope=\"row\">(\d+)</th><td>([\d.]+)</td>", text.partition('id="taken"')[2]
    )
    taken = np.array(query["attention"][0][1])
    assert [int(other) for other, _ in rows] == (-taken).argsort(kind="stable")[
        : len(rows)
    ].tolist()
    assert float(rows[0][1]) == pytest.approx(taken.max(), abs=6e-4)


def luminance(colour: str) -> float:
    """Return the relative luminance of a colour as a browser states it (WCAG 2, "rgb(1, 2, 3)")."""
    parts = [int(value) / 255 for value in re.findall(r"\d+", colour)[:3]]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.long
@pytest.mark.skipif(chromium() is None, reason="needs Chromium")
def test_the_page_can_be_read_light_and_dark(explained: Path, tmp_path: Path) -> None:
    colours = """[...document.querySelectorAll("p, label, select, caption, th, td, #key span")]
        .filter(node => node.innerText.trim()).map(node => {
            let ground = node;
            const solid = style => !/rgba\\(.*, 0\\)/.test(style.backgroundColor);
            while (ground.parentElement && !solid(getComputedStyle(ground)))
                ground = ground.parentElement;
            return [getComputedStyle(node).color, getComputedStyle(ground).backgroundColor,
                    node.innerText];
        })"""
    with Browser(tmp_path) as browser:
        for scheme in ("light", "dark"):
            browser.ask("Emulation.setEmulatedMedia",
                        features=[{"name": "prefers-color-scheme", "value": scheme}])  # fmt: skip
            browser.open(f"file://{explained / 'explain.html'}")
            browser.wait("document.querySelectorAll('#marks circle').length > 0")
            found = browser.run(colours)
            assert len(found) > 20
            for ink, ground, text in found:
                light, dark = sorted((luminance(ink), luminance(ground)), reverse=True)
                assert (light + 0.05) / (dark + 0.05) >= 4.5, (scheme, text, ink, ground)
            paper = browser.run("getComputedStyle(document.body).backgroundColor")
            assert (luminance(paper) > 0.5) == (scheme == "light")
        assert all(each.startswith(("file:", "data:")) for each in browser.addresses)


@pytest.mark.long
def test_the_option_that_an_image_too_large_is_told_of_is_there(
    cli: Cli, finished_run: Path, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    command = ["explain", "--checkpoint", finished_run / "last.pth", "--input", image,
               "--output_dir", tmp_path, "--device", "cpu", "--threshold", "0"]  # fmt: skip
    refused = cli(*command)
    assert refused.returncode == 2
    assert "the 100 of --max_pixels; raise it" in refused.stderr
    assert not list(tmp_path.iterdir())
    explained = cli(*command, "--max_pixels", "1000000")
    assert explained.returncode == 0, explained.stderr
    assert (tmp_path / "explain.html").is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--point", "3"], "--point: must be x,y, in pixels of the image, not '3'"),
        (["--token", "3,4,0.5"], "--token: must be x,y or x,y,level"),
        (["--threshold", "1"], "--score_threshold: no detection reaches it"),
        (["--box", "1", "--query", "1"], "--box: leaves nothing to choose by --query"),
        (["--class", "unicorn"], "--class_name: the model has no class 'unicorn'"),
        (
            ["--tile", "--tile_size", "96"],
            "tiles, and only a whole image can be explained. "
            "Give a part of it, or the whole by --no_tile",
        ),
        (["--input", "nowhere.png"], "nowhere.png: there is no such file"),
    ],
)
def test_a_mistake_is_one_line(
    cli: Cli, finished_run: Path, image: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    done = cli("explain", "--checkpoint", finished_run / "last.pth", "--input", image,
               "--output_dir", tmp_path, "--device", "cpu", *options)  # fmt: skip
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())
