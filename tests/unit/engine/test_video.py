"""Videos: boxes are those of the frames, what is written plays, and what is wrong is one line."""

import csv
import json
import math
import sys
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
from PIL import Image

from engine.video import Frames, is_video, predict_video
from tests.unit.engine.test_predict import RED_FINDER
from util.errors import ConfigError, DataError

THRESHOLDS = {"cat": 0.5, "dög": 0.5}


@pytest.fixture
def av() -> Any:
    return pytest.importorskip("av", reason="needs PyAV")


@pytest.fixture
def clip(av: Any, tmp_path: Path) -> Path:
    """Return a clip of 11 frames of 121 x 90 pixels in which a red square moves."""
    path = tmp_path / "clip.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=8)  # loses nothing
        stream.width, stream.height, stream.pix_fmt = 121, 90, "bgr0"
        for i in range(11):
            pixels = np.zeros((90, 121, 3), np.uint8)
            pixels[20:50, 5 + 8 * i : 35 + 8 * i, 0] = 255
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, "rgb24")))
        container.mux(stream.encode(None))
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("batch_size", [1, 4])
def test_boxes_are_those_of_the_frames(clip: Path, tmp_path: Path, batch_size: int) -> None:
    out = tmp_path / "out"
    predict_video(RED_FINDER, str(clip), out, thresholds=THRESHOLDS, batch_size=batch_size)
    lines = read(out / "predictions.jsonl")
    assert [line["frame"] for line in lines] == list(range(11))
    assert [line["time"] for line in lines] == pytest.approx([i / 8 for i in range(11)], abs=2e-3)
    with Frames(str(clip)) as frames:
        images = [image for _, image in frames]
    found = dict(RED_FINDER.detect(images, batch_size=1))
    for i, line in enumerate(lines):
        for box, expected in zip(line["boxes"], found[i], strict=True):
            x0, y0, x1, y1 = expected.xyxy
            assert box["bbox"] == pytest.approx([x0, y0, x1 - x0, y1 - y0], abs=1e-4)
            assert (box["category_name"], box["score"]) == (expected.name, expected.score)
        assert line["boxes"][0]["bbox"] == pytest.approx([5 + 8 * i, 20, 30, 30], abs=1.5)


def test_an_address_is_read_as_the_file_is(clip: Path, tmp_path: Path) -> None:
    predict_video(RED_FINDER, str(clip), tmp_path / "file", thresholds=THRESHOLDS, draw=False)
    handler = partial(SimpleHTTPRequestHandler, directory=str(clip.parent))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        address = f"http://127.0.0.1:{server.server_port}/{clip.name}?a=b"
        try:
            predict_video(RED_FINDER, address, tmp_path / "address", thresholds=THRESHOLDS)
            with pytest.raises(DataError, match=r"gone\.mp4`: cannot be opened"):
                Frames(address.replace("clip.mkv?a=b", "gone.mp4"))
        finally:
            server.shutdown()
            thread.join()
    lines = [read(tmp_path / name / "predictions.jsonl") for name in ("file", "address")]
    assert lines[0] == lines[1]
    assert len(lines[0]) == 11
    assert (tmp_path / "address" / "clip.mp4").is_file()


def test_a_table_and_crops_hold_what_is_drawn(clip: Path, tmp_path: Path) -> None:
    predict_video(
        RED_FINDER, str(clip), tmp_path / "out", thresholds=THRESHOLDS, table=True, crops=True
    )
    lines = read(tmp_path / "out" / "predictions.jsonl")
    with (tmp_path / "out" / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    expected = [
        (line["frame"], line["time"], box)
        for line in lines for box in line["boxes"] if box["score"] >= 0.5
    ]  # fmt: skip
    assert len(rows) == len(expected) >= 11
    with Frames(str(clip)) as frames:
        images = [image for _, image in frames]
    taken = [0] * len(images)
    for row, (frame, time, box) in zip(rows, expected, strict=True):
        assert (int(row["frame"]), float(row["time"]), row["track"]) == (frame, time, "")
        assert (row["category_name"], float(row["score"])) == (box["category_name"], box["score"])
        x, y, width, height = box["bbox"]
        corners = [float(row[name]) for name in ("x0", "y0", "x1", "y1")]
        assert corners == pytest.approx([x, y, x + width, y + height])
        window = [max(math.floor(x), 0), max(math.floor(y), 0),
                  min(math.ceil(x + width), 121), min(math.ceil(y + height), 90)]  # fmt: skip
        (crop,) = (tmp_path / "out" / "crops").glob(f"*/frame_{frame}_{taken[frame]}.png")
        taken[frame] += 1
        with Image.open(crop) as image:
            assert image.tobytes() == images[frame].crop(tuple(window)).tobytes()


def test_the_video_with_boxes_plays_at_the_same_pace(clip: Path, tmp_path: Path) -> None:
    predict_video(RED_FINDER, str(clip), tmp_path / "out", thresholds=THRESHOLDS)
    with Frames(str(tmp_path / "out" / "clip.mp4")) as drawn, Frames(str(clip)) as frames:
        assert drawn.rate == frames.rate == 8
        pairs = list(zip(drawn, frames, strict=True))
    assert len(pairs) == 11
    for (time, image), (original_time, original) in pairs:
        assert time == pytest.approx(original_time, abs=2e-3)
        assert image.size == (120, 90)  # sides are even
        whole = original.crop((0, 0, 120, 90))
        difference = np.abs(np.asarray(image, float) - np.asarray(whole, float))
        assert difference.max() > 100, "nothing is drawn"
        assert np.median(difference) < 8


def test_other_classes_and_drawn_copies_can_be_left_out(clip: Path, tmp_path: Path) -> None:
    predict_video(RED_FINDER, str(clip), tmp_path / "out", thresholds={"dög": 0.1}, draw=False)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["predictions.jsonl"]
    names = {box["category_name"] for line in read(tmp_path / "out" / "predictions.jsonl")
             for box in line["boxes"]}  # fmt: skip
    assert names == {"dög"}


def test_objects_are_numbered_in_lines_and_video(clip: Path, tmp_path: Path) -> None:
    pytest.importorskip("trackers")
    for name, patience in (("plain", None), ("tracked", 1.0)):
        predict_video(
            RED_FINDER, str(clip), tmp_path / name, thresholds={"cat": 0.5}, batch_size=3,
            track_patience=patience,
        )  # fmt: skip
    lines, plain = (read(tmp_path / n / "predictions.jsonl") for n in ("tracked", "plain"))
    best = [max(line["boxes"], key=lambda box: float(box["score"])) for line in lines]
    assert [box["track"] for box in best] == [None] + [1] * 10
    for line in lines:
        for found in line["boxes"]:
            del found["track"]
    assert lines == plain
    pictures = []
    for name in ("plain", "tracked"):
        with Frames(str(tmp_path / name / "clip.mp4")) as frames:
            pictures.append([np.asarray(image, float) for _, image in frames])
    changed = [np.abs(a - b).max() > 60 for a, b in zip(*pictures, strict=True)]
    assert changed == [False] + [True] * 10  # the tag has the number


def test_tracking_without_its_package_leaves_the_files_of_an_earlier_run(
    clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    predict_video(RED_FINDER, str(clip), out, thresholds=THRESHOLDS)
    earlier = {path.name: path.read_bytes() for path in out.iterdir()}
    monkeypatch.setitem(sys.modules, "trackers", None)
    with pytest.raises(ConfigError, match="pip install trackers"):
        predict_video(RED_FINDER, str(clip), out, thresholds=THRESHOLDS, track_patience=1.0)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == earlier


def test_what_is_no_video_is_a_one_line_error(av: Any, clip: Path, tmp_path: Path) -> None:
    (tmp_path / "none.mp4").write_bytes(b"none")
    for name in ("none.mp4", "gone.mp4"):
        with pytest.raises(DataError, match=f"{name}`: cannot be opened") as caught:
            Frames(str(tmp_path / name))
        assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="is one of the inputs"):
        predict_video(
            RED_FINDER, str(clip.rename(tmp_path / "clip.mp4")), tmp_path, thresholds=THRESHOLDS
        )


def test_a_clip_that_ends_early_is_read_as_far_as_it_goes(
    av: Any, clip: Path, tmp_path: Path
) -> None:
    data = clip.read_bytes()
    clip.write_bytes(data[: len(data) * 6 // 10])
    predict_video(RED_FINDER, str(clip), tmp_path / "out", thresholds=THRESHOLDS, draw=False)
    assert 0 < len(read(tmp_path / "out" / "predictions.jsonl")) < 11


def test_a_video_of_too_many_pixels_is_refused(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    with pytest.raises(DataError, match="121x90 pixels are more than the 10000 of `max_pixels`"):
        Frames(str(clip))


def test_inputs_that_are_videos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "7").mkdir()
    (tmp_path / "a.mp4").mkdir()
    for text in ("0", "clip.MP4", "rtsp://camera/1", "https://example.org/a"):
        assert is_video(text), text
    for text in ("7", "a.mp4", "a.jpg", "folder", "*.png", "-", ""):
        assert not is_video(text), text


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ConfigError, match="pip install av"):
        Frames("clip.mp4")
