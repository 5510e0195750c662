"""`app` as a user has it: the page in a browser, and what it is made of."""

import importlib.util
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from configs.tiles import TileOptions
from engine.app import Found, Trial, box_at, build_page, summary
from engine.detector import Box, Detector
from tests.integration.browser import Browser, chromium
from tests.integration.conftest import ROOT, Cli
from util.errors import DataError
from util.tensor_files import load_safely, save_whole

needs_a_browser = pytest.mark.skipif(
    importlib.util.find_spec("gradio") is None or chromium() is None,
    reason="needs gradio and Chromium",
)


@pytest.fixture(scope="module")
def image(shapes: Path) -> Path:
    """An image of the generated set."""
    return sorted((shapes / "val2017").iterdir())[0]


@pytest.fixture(scope="module")
def checkpoint(finished_run: Path, image: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run's checkpoint, with thresholds of classes that some boxes of the image reach."""
    content = load_safely(finished_run / "last.pth")
    boxes = Detector.load(finished_run / "last.pth", device="cpu").predict(image, 0)
    content["thresholds"] = {box.name: box.score for box in boxes[:12]}
    path = tmp_path_factory.mktemp("checkpoint") / "best.pth"
    save_whole(path, content)
    return path


@pytest.fixture(scope="module")
def detector(checkpoint: Path) -> Detector:
    """The detector of the checkpoint."""
    return Detector.load(checkpoint, device="cpu")


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def served(checkpoint: Path, tmp_path: Path) -> Iterator[tuple[str, int]]:
    """The address and port of the page, which Ctrl-C ends without an error or a trace."""
    port = free_port()
    with subprocess.Popen(
        [sys.executable, "main.py", "app", "--checkpoint", str(checkpoint), "--port", str(port),
         "--device", "cpu"],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    ) as process:  # fmt: skip
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            found = re.match(r"open (http://127\.0\.0\.1:\d+/) in a browser; Ctrl-C ends it", line)
            assert found, line + process.communicate()[1]
            yield found[1], port
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=60)
            assert process.returncode == 0, errors
            assert "Traceback" not in errors
        finally:
            process.kill()
    assert not list(tmp_path.iterdir()), "what was dropped on the page is still there"


@needs_a_browser
@pytest.mark.slow
def test_an_image_is_dropped_a_threshold_set_and_a_box_clicked(
    served: tuple[str, int],
    detector: Detector,
    image: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    address, port = served
    with socket.socket() as elsewhere:  # listens on this machine's own address alone
        assert elsewhere.connect_ex(("127.0.0.2", port)) != 0
    status = "document.querySelector('#status')?.innerText.trim()"
    with Browser(tmp_path_factory.mktemp("profile")) as browser:
        browser.open(address)
        browser.wait("!!document.querySelector('#image input[type=file]')")
        browser.give_file("#image input[type=file]", image)
        browser.wait(f"{status} === {summary(detector.predict(image))!r}")

        assert browser.run("document.querySelector('#by_class input').checked")
        least = round(detector.predict(image, 0)[7].score, 2)
        expected = detector.predict(image, least)
        assert 0 < len(expected) < 100
        browser.type("#threshold input[type=number]", str(least))
        browser.wait(f"{status} === {summary(expected)!r}")
        browser.wait("!document.querySelector('#by_class input').checked")

        x0, y0, x1, y1 = expected[-1].xyxy
        point = ((x0 + x1) / 2, (y0 + y1) / 2)
        (query,) = detector.explain(image, least, point=point).queries
        left, top, scale = browser.wait(
            "(() => { const shown = document.querySelector('#result img'),"
            " place = shown.getBoundingClientRect();"
            " return shown.naturalWidth && [place.x, place.y, place.width / shown.naturalWidth];"
            " })()"
        )
        browser.click(left + scale * point[0], top + scale * point[1])
        title = f"{query.name} {query.score:.2f} (query {query.query})"
        browser.wait("!!document.querySelector('#looked iframe')")
        tree = browser.wait_for(
            lambda: browser.ask("Page.getFrameTree")["frameTree"].get("childFrames"), "a frame"
        )
        context = browser.contexts[tree[0]["frame"]["id"]]
        text = browser.wait("document.getElementById('status')?.textContent", context)
        layers, heads, levels, points = query.sampling.weights.shape
        assert text.startswith(
            f"{title}, layer {layers - 1}: {heads * levels * points} points, which weigh 1.000"
        )
        circles = browser.run("document.querySelectorAll('#marks circle').length", context)
        assert circles == heads * levels * points
        text_file = tmp_path_factory.mktemp("files") / "text.png"
        text_file.write_text("no image")
        browser.open(address)
        browser.wait("!!document.querySelector('#image input[type=file]')")
        browser.give_file("#image input[type=file]", text_file)
        browser.wait(f"{status}?.startsWith('text.png: cannot be read')")
        # the page asks nobody else for anything
        others = [a for a in browser.addresses if not a.startswith((address, "data:", "blob:"))]
        assert not others


def test_boxes_are_those_of_predict(detector: Detector, image: Path) -> None:
    trial = Trial(detector)
    path, boxes = trial.find(str(image))
    assert path == str(image)
    assert boxes == detector.predict(image, 0)
    for threshold in (None, 0.0, 0.1, boxes[3].score, 1.0):
        assert trial.shown(boxes, threshold) == detector.predict(image, threshold)
    drawn = trial.drawn(str(image), boxes[:3])
    assert drawn.size == Trial(detector).drawn(str(image), []).size
    assert drawn.tobytes() != trial.drawn(str(image), []).tobytes()


def test_images_are_cut_as_for_predict(checkpoint: Path, image: Path) -> None:
    detector = Detector.load(checkpoint, device="cpu")
    whole = Trial(detector).find(str(image)).boxes
    detector.tiles = TileOptions(tile=True, tile_size=96)
    trial = Trial(detector)
    boxes = trial.find(str(image)).boxes
    assert boxes == detector.predict(image, 0) != whole
    reason = trial.looked(str(image), 0.0, 0)
    assert "<iframe" not in reason
    assert re.search(r"this image is cut into \d+ tiles", reason)


def test_an_image_that_has_gone_is_one_line(
    detector: Detector, image: Path, tmp_path: Path
) -> None:
    kept = Path(shutil.copy(image, tmp_path / "kept.png"))
    trial = Trial(detector)
    found = trial.find(str(kept))
    kept.unlink()
    with pytest.raises(DataError, match=r"^kept.png: is no longer kept. Drop the image again.$"):
        trial.drawn(found.path, found.boxes)
    assert trial.looked(found.path, 0.0, 0) == (
        '<p role="status">kept.png: is no longer kept. Drop the image again.</p>'
    )


@pytest.mark.slow
def test_a_moved_slider_draws_boxes_on_the_image_they_are_of(
    detector: Detector, image: Path, shapes: Path, tmp_path: Path
) -> None:
    """While the next image lies in the page and has not been read."""
    pytest.importorskip("gradio")
    trial = Trial(detector)
    found = trial.find(str(image))
    page = build_page(trial, title="a", threshold=0.0)
    events: dict[str, Any] = {event.fn.__name__: event for event in page.fns.values() if event.fn}
    following = str(sorted((shapes / "val2017").iterdir())[1])

    def value_of(part: Any) -> Any:
        named = {"image": following, "by_class": False, "threshold": 0.0, "chosen": 0}
        return found if type(part).__name__ == "State" else named[part.elem_id]

    picture, *_ = events["draw"].fn(*map(value_of, events["draw"].inputs))
    assert picture.tobytes() == trial.drawn(str(image), found.boxes).tobytes()
    looked = events["look"].fn(*map(value_of, events["look"].inputs))
    assert looked == trial.looked(str(image), 0.0, 0)
    gone = Found(str(tmp_path / "gone.png"), found.boxes)
    picture, line, *_ = events["draw"].fn(gone, False, 0.0)
    assert picture is None
    assert "gone.png: is no longer kept" in line


def test_the_smallest_box_around_a_point_is_chosen() -> None:
    corners = [(0, 0, 50, 50), (10, 10, 20, 20), (10, 10, 20, 20), (90, 90, 99, 99)]
    boxes = [Box("a", 1, 0.5, c) for c in corners]
    assert box_at(boxes, 15, 15) == 1
    assert box_at(boxes, 45, 5) == 0
    assert box_at(boxes, 95, 95) == 3
    assert box_at(boxes, 70, 5) is None
    assert summary(boxes) == "4 boxes: a 4"
    assert summary(boxes[:1]) == "1 box: a 1"
    assert summary([]) == "0 boxes"


@pytest.mark.slow
def test_an_exported_file_detects_and_says_why_it_has_no_points(
    cli: Cli, finished_run: Path, image: Path, tmp_path: Path
) -> None:
    file = tmp_path / "a.pt2"
    done = cli("export", "--checkpoint", finished_run / "last.pth", "--to", "torch_export",
               "--output", file, "--eval_scale", "96", "--max_size", "128")  # fmt: skip
    assert done.returncode == 0, done.stderr
    detector = Detector.load(file)
    trial = Trial(detector)
    assert trial.find(str(image)).boxes == detector.predict(image, 0)
    assert "an exported file has no PyTorch module" in trial.looked(str(image), 0.0, 0)
    assert "<iframe" not in trial.looked(str(image), 0.0, 0)


def test_without_gradio_one_line_says_what_to_install(
    cli: Cli, finished_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    done = cli("app", "--checkpoint", finished_run / "last.pth", "--device", "cpu")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "pip install gradio" in done.stderr


@needs_a_browser
@pytest.mark.slow
def test_a_port_in_use_is_one_line(finished_run: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = subprocess.run(
            [sys.executable, "main.py", "app", "--checkpoint", str(finished_run / "last.pth"),
             "--port", port, "--device", "cpu"],
            cwd=ROOT, capture_output=True, text=True, check=False,
        )  # fmt: skip
    assert done.returncode == 2
    assert f"cannot listen on 127.0.0.1, port {port}" in done.stderr
    assert done.stderr.count("\n") == 1
