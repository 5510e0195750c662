"""Files as strangers might send them, each in a process with a limit of memory and of time."""

import io
import json
import os
import pickle
import socket
import stat
import struct
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from configs.load import Given, load_file
from configs.schema import SECTIONS, Config
from models.build import build_model
from tests.integration.attacks import USUAL, assert_refused, attack
from tests.integration.conftest import TINY
from tests.lanes import some
from util.classes import Classes

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits as Linux counts them")

Arguments = tuple[str | Path, ...]
Make = Callable[[Path], Arguments]
CATEGORIES = [{"id": 1, "name": "cat"}]
BOX = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 2, 10, 12], "area": 120, "iscrowd": 0}
IMAGE = {"id": 1, "file_name": "a.png", "width": 40, "height": 30}


def png(folder: Path, name: str = "a.png") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 30), "white").save(folder / name)


def coco(folder: Path, text: str | bytes) -> Arguments:
    """Write annotations beside an image; return the options that name them."""
    png(folder)
    content = text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
    (folder / "x.json").write_bytes(content)
    return ("--train_annotations", folder / "x.json", "--train_images", folder)


def content(**changes: Any) -> str:
    """Return COCO-format JSON with some of its parts changed."""
    sound = {"images": [IMAGE], "annotations": [BOX], "categories": CATEGORIES}
    return json.dumps({**sound, **changes})


def check(folder: Path, text: str | bytes) -> Arguments:
    return ("check", *coco(folder, text), "--num_workers", "0")


def train(folder: Path, text: str | bytes) -> Arguments:
    given = coco(folder, text)
    val = tuple(str(word).replace("--train", "--val") for word in given)
    return ("train", "--config", TINY, *given, *val, "--output_dir", folder / "out",
            "--no_tensorboard", "--max_steps", "1")  # fmt: skip


NINES = "9" * 5000
JSON: dict[str, tuple[str | bytes, str]] = {
    "lists in lists": ('{"images": ' + "[" * 200_000 + "]" * 200_000 + "}", "recursion"),
    "objects in objects": ('{"a":' * 200_000 + "1" + "}" * 200_000, "recursion"),
    "a number of 5,000 digits": (content().replace("120", NINES), "4300"),
    "no JSON": ("\x1b]0;x\x07" * 1000, "not JSON"),
    "a number": ("1", "must hold a JSON object"),
    "nothing": ("", "not JSON"),
    "zeros": (bytes(10**6), "not JSON"),
    "images that are a number": (content(images=7), "images"),
    "images of numbers": (content(images=[1, None, "x"]), "image"),
    "ids of objects": (content(images=[{**IMAGE, "id": {"a": 1}}]), "image"),
    "no categories": (content(categories=[]), "categories"),
    "categories of nothing": (content(categories=[None]), "categor"),
    "boxes of text": (content(annotations=[{**BOX, "bbox": "x" * 10**6}]), "usable box"),
    "boxes of lists": (content(annotations=[{**BOX, "bbox": [[1], {}, None, "a"]}]), "usable box"),
    "boxes without end": (
        content(annotations=[{**BOX, "bbox": [0, 0, 1e300, float("inf")]}]), "usable box"),
    "boxes of nothing": (content(annotations=[{**BOX, "bbox": [0, 0, float("nan"), 1]}]), "usable"),
    "an image without end": (
        content(images=[{**IMAGE, "file_name": "../" * 1000 + "etc/passwd"}]), "image"),
    "an absolute name": (content(images=[{**IMAGE, "file_name": "/etc/passwd"}]), "image"),
    "a name with a zero": (content(images=[{**IMAGE, "file_name": "a\0.png"}]), "image"),
    "a name that is half a letter": (content(images=[{**IMAGE, "file_name": "\ud800"}]), "image"),
    "a name of a megabyte": (content(images=[{**IMAGE, "file_name": "x" * 10**6}]), "image"),
    "a mask of 10^18 pixels": (
        content(annotations=[{**BOX, "bbox": [], "segmentation": {"size": [10**9, 10**9],
                "counts": [10**18]}}]), "usable box"),
    "a mask of negative runs": (
        content(annotations=[{**BOX, "bbox": [], "segmentation": {"size": [30, 40],
                "counts": [-5, 10**12, 3]}}]), "usable box"),
    "a mask of noise": (
        content(annotations=[{**BOX, "bbox": [], "segmentation": {"size": [30, 40],
                "counts": "\x7f~" * 10**5}}]), "usable box"),
}  # fmt: skip


@pytest.mark.parametrize("case", JSON)
def test_annotations(tmp_path: Path, case: str) -> None:
    text, words = JSON[case]
    assert_refused(attack(tmp_path, *train(tmp_path, text)), words)
    assert not (tmp_path / "out" / "last.pth").exists()
    found = attack(tmp_path, *check(tmp_path, text))
    assert found.code in (1, 2), found.output


ODD_BUT_USABLE: dict[str, str] = {
    "sizes of 10^12 pixels": content(images=[{**IMAGE, "width": 10**12, "height": 10**12}]),
    "an area of 10^300": content(annotations=[{**BOX, "area": 1e300}]),
    "an id of 10^18": content(
        images=[{**IMAGE, "id": 10**18}], annotations=[{**BOX, "image_id": 10**18}]),
    "a category of 10^18": content(
        categories=[{"id": 10**18, "name": "cat"}],
        annotations=[{**BOX, "category_id": 10**18}]),
    "names that a terminal obeys": content(
        categories=[{"id": 1, "name": "\x1b[2J\x1b]0;x\x07\x9b31m\u202e\n\r" + "x" * 3000}],
        images=[{**IMAGE, "coco_url": "\x1b[2J"}]),
    "thirty names of one image": content(
        images=[{**IMAGE, "id": i} for i in range(1, 31)]),
    "a box a thousand times": content(annotations=[BOX] * 1000),
}  # fmt: skip


@pytest.mark.parametrize("case", ODD_BUT_USABLE)
def test_odd_annotations_that_can_be_used(tmp_path: Path, case: str) -> None:
    """What is only odd is trained on or refused, in bounded memory all the same."""
    outcome = attack(tmp_path, *train(tmp_path, ODD_BUT_USABLE[case]), **USUAL)
    if outcome.code:
        assert_refused(outcome)
    assert attack(tmp_path, *check(tmp_path, ODD_BUT_USABLE[case])).code in (0, 1)


DETECTIONS: dict[str, tuple[str | bytes, str]] = {
    "lists in lists": ("[" * 200_000 + "]" * 200_000, "not valid JSON"),
    "a number of 5,000 digits": (f'[{{"image_id": {NINES}}}]', "not valid JSON"),
    "an object": ("{}", "a list of detections"),
    "no detections": ("[1, null, [], {}]", "not an object"),
    "scores without end": (
        json.dumps([{"image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4], "score": 1e309}]),
        "score is not a finite number"),
    "boxes of 10^300": (
        json.dumps([{"image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 1e300], "score": 1}]),
        "not four finite numbers"),
    "noise": (bytes(range(256)) * 4000, "not valid JSON"),
}  # fmt: skip


@pytest.mark.parametrize("case", DETECTIONS)
def test_detections(tmp_path: Path, case: str) -> None:
    text, words = DETECTIONS[case]
    coco(tmp_path, content())
    found = tmp_path / "found.json"
    found.write_bytes(text if isinstance(text, bytes) else text.encode())
    outcome = attack(tmp_path, "eval", "--detections", found, "--val_annotations",
                     tmp_path / "x.json", "--output_dir", tmp_path / "o")  # fmt: skip
    assert_refused(outcome, "found.json", words)


def yaml_aliases() -> str:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    return "\n".join(lines)


YAML: dict[str, str | bytes] = {
    "aliases that double": yaml_aliases(),
    "an alias of itself": "model: &a\n  x: *a\n",
    "lists in lists": "model: " + "[" * 100_000,
    "a number of 5,000 digits": f"optim: {{epochs: {NINES}}}",
    "a hexadecimal number of 9,000 digits": f"optim: {{epochs: 0x{'f' * 9000}}}",
    "a key of 9,000 digits": f"0x{'f' * 9000}: 1",
    "a number of 10^9 digits": "optim: {epochs: '1e999999999'}",
    "a million values": "model: [" + "a," * 2_000_000 + "]",
    "five megabytes of comment": "#" * 5_000_001,
    "objects of Python": "model: !!python/object/apply:os.system ['touch planted']",
    "a day that is none": "model: {backbone: 2001-99-99}",
    "noise": bytes(range(256)) * 1000,
    "zeros": bytes(10**6),
    "itself as its base": "base: x.yaml",
}


@pytest.mark.parametrize("case", YAML)
def test_options(tmp_path: Path, case: str) -> None:
    text = YAML[case]
    file = tmp_path / "x.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert_refused(attack(tmp_path, "train", "--config", file), "x.yaml")
    png(tmp_path / "images")
    (tmp_path / "data.yaml").write_bytes(file.read_bytes())
    file.unlink()
    described = attack(tmp_path, "check", "--data_path", tmp_path / "data.yaml")
    assert_refused(described, "data.yaml")
    assert attack(tmp_path, "check", "--data_path", tmp_path).code == 2
    assert not Path("planted").exists()


XML = (
    "<annotation><size><width>40</width><height>30</height></size><object><name>cat</name><bndbox>"
    "<xmin>3</xmin><ymin>4</ymin><xmax>9</xmax><ymax>20</ymax></bndbox></object>{}</annotation>"
)
LAUGHS = "".join(f'<!ENTITY a{i} "{f"&a{i - 1};" * 10}">' for i in range(1, 12))
XMLS: dict[str, str | bytes] = {
    "entities that multiply": f'<!DOCTYPE x [<!ENTITY a0 "x">{LAUGHS}]>{XML.format("&a11;")}',
    "a long entity": f'<!DOCTYPE x [<!ENTITY a "{"x" * 10**6}">]>{XML.format("&a;" * 99)}',
    "entities in UTF-16": f'<!DOCTYPE x [<!ENTITY a "x">]>{XML.format("&a;")}'.encode("utf-16"),
    "a file of this machine": (
        f'<!DOCTYPE x [<!ENTITY a SYSTEM "file:///etc/passwd">]>{XML.format("<b>&a;</b>")}'),
    "a million tags in each other": XML.format("<a>" * 10**6 + "</a>" * 10**6),
    "a million empty tags": XML.format("<a/>" * 10**6),
    "blanks and nothing else": " " * 9_000_000,
    "openings and nothing else": "<?xml" * 1_800_000,
    "ten megabytes": XML.format("x" * 10_000_001),
    "an encoding that is none": (
        b'<?xml version="1.0" encoding="base64"?>' + XML.format("\xff").encode("latin1")),
    "an encoding of 100,000 letters": f'<?xml encoding="{"x" * 10**5}"?>' + XML.format("&"),
    "numbers without end": XML.format("").replace("9", "9" * 5000).replace("20", "1e999"),
}  # fmt: skip


@pytest.mark.parametrize("case", XMLS)
def test_xml(tmp_path: Path, case: str) -> None:
    """A file that cannot be read is listed; the others are used."""
    text = XMLS[case]
    png(tmp_path / "JPEGImages", "a.png")
    png(tmp_path / "JPEGImages", "b.png")
    (tmp_path / "Annotations").mkdir()
    (tmp_path / "Annotations" / "a.xml").write_text(XML.format(""))
    evil = tmp_path / "Annotations" / "b.xml"
    evil.write_bytes(text if isinstance(text, bytes) else text.encode())
    outcome = attack(tmp_path, "check", "--data_path", tmp_path, "--num_workers", "0",
                     "--splits", "train", memory=10**9)  # fmt: skip
    assert outcome.code == 1, outcome.output
    assert "1 image" in outcome.output or "2 images" in outcome.output
    assert "root:" not in outcome.output


LABELS: dict[str, tuple[str | bytes, int]] = {
    "a line of a million numbers": ("0 " + "0.5 " * 10**6, 1),
    "forty thousand lines": ("0 0.5 0.5 0.2 0.2\n" * 40_000, 1),
    "numbers without end": ("0 inf 0.5 nan 1e999\n1e999 0.5 0.5 0.5 0.5\nnan 1 1 1 1", 1),
    "numbers of 5,000 digits": (f"{NINES} 0.5 0.5 0.5 0.5\n0 {NINES} 1 1 1", 1),
    "noise": (bytes(range(256)) * 4000, 1),
    "blanks": (" " * 5_000_000, 1),
    "letters that turn the line": ("\u202e\u2066 0.5 \x1b[2J", 1),
}


@pytest.mark.parametrize("case", LABELS)
def test_labels(tmp_path: Path, case: str) -> None:
    text, code = LABELS[case]
    for folder in ("images", "labels"):
        (tmp_path / folder).mkdir()
    for name in "ab":
        png(tmp_path / "images", f"{name}.png")
    (tmp_path / "labels" / "a.txt").write_text("0 0.5 0.5 0.4 0.4\n")
    evil = tmp_path / "labels" / "b.txt"
    evil.write_bytes(text if isinstance(text, bytes) else text.encode())
    (tmp_path / "data.yaml").write_text("train: images\nval: images\nnames: [cat]\n")
    outcome = attack(tmp_path, "check", "--data_path", tmp_path, "--num_workers", "0",
                     "--splits", "train", memory=2 * 10**9, seconds=40)  # fmt: skip
    assert outcome.code == code, outcome.output


def test_lists_of_names(tmp_path: Path) -> None:
    """A row of blanks within a line is looked at once, not from each of its blanks."""
    png(tmp_path / "JPEGImages")
    for folder in ("Annotations", "ImageSets/Main"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "Annotations" / "a.xml").write_text(XML.format(""))
    (tmp_path / "ImageSets" / "Main" / "train.txt").write_text("a\nb" + " " * 10**6 + "c\n")
    outcome = attack(tmp_path, "check", "--data_path", tmp_path, "--splits", "train",
                     "--num_workers", "0")  # fmt: skip
    assert outcome.code == 1, outcome.output


@pytest.mark.parametrize("start", ["//", "/", "../", "~/", "C:\\\\", "./.././", "///"])
def test_lists_of_images_in_odd_places(tmp_path: Path, start: str) -> None:
    """Two slashes at the beginning of a path are a place of their own to POSIX."""
    png(tmp_path / "images")
    png(tmp_path / "images", "b.png")
    lines = f"{start}images/a.png\nimages/b.png\n{start}elsewhere/b.png\n"
    (tmp_path / "train.txt").write_text(lines)
    (tmp_path / "data.yaml").write_text("train: train.txt\nval: train.txt\nnames: [cat]\n")
    outcome = attack(tmp_path, "check", "--data_path", tmp_path, "--splits", "train",
                     "--num_workers", "0")  # fmt: skip
    assert outcome.code in (1, 2), outcome.output
    (tmp_path / "data.yaml").write_text(f"path: {start}\ntrain: {start}images\nnames: [cat]\n")
    outcome = attack(tmp_path, "check", "--data_path", f"/{tmp_path}", "--splits", "train",
                     "--num_workers", "0")  # fmt: skip
    assert outcome.code in (1, 2), outcome.output


def test_images_in_two_places_do_not_make_all_between_a_set(tmp_path: Path) -> None:
    """The folder that two lists' folders have in common may be the root of the file system."""
    others = Path("/dev/shm") / f"attack-{os.getpid()}"  # on another branch of the tree
    png(tmp_path / "images")
    png(others, "b.png")
    try:
        lines = f"{tmp_path / 'images' / 'a.png'}\n{others / 'b.png'}\n"
        (tmp_path / "train.txt").write_text(lines)
        (tmp_path / "data.yaml").write_text("train: train.txt\nval: train.txt\nnames: [cat]\n")
        outcome = attack(tmp_path, "check", "--data_path", tmp_path / "data.yaml", "--splits",
                         "train", "--num_workers", "0")  # fmt: skip
        assert outcome.code in (1, 2), outcome.output
        assert "/usr" not in outcome.output
    finally:
        (others / "b.png").unlink()
        others.rmdir()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def claimed_png(width: int, height: int, *more: bytes) -> bytes:
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(bytes(10_000)))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(more) + body + chunk(b"IEND", b"")


def text_bomb() -> bytes:
    """A comment of 200 MB, compressed a thousandfold."""
    return chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(200_000_000)))


def scans(count: int) -> bytes:
    """A progressive JPEG of 9 megapixels whose last scan is repeated: each is decoded anew."""
    buffer = io.BytesIO()
    Image.new("L", (3000, 3000)).save(buffer, "JPEG", progressive=True, quality=10)
    whole = buffer.getvalue()
    last = whole.rindex(b"\xff\xda")
    return whole[:last] + whole[last:-2] * count + whole[-2:]


IMAGES: dict[str, Callable[[], bytes]] = {
    "a PNG of 10^18 pixels": lambda: claimed_png(2**31 - 1, 2**31 - 1),
    "a PNG of 80 megapixels": lambda: claimed_png(8900, 9000),
    "a comment of 200 MB": lambda: claimed_png(40, 30, text_bomb()),
    "a profile of 200 MB": lambda: claimed_png(
        40, 30, chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(200_000_000)))),
    "five thousand scans": lambda: scans(5000),
    "a TIFF of a billion strips": lambda: (
        b"II*\0\x08\0\0\0\x04\0" + b"".join(struct.pack("<HHII", tag, 4, count, value)
        for tag, count, value in ((256, 1, 40), (257, 1, 30), (273, 10**9, 8), (279, 10**9, 8)))
        + bytes(4)),
    "a GIF of 65535 x 65535": lambda: (
        b"GIF89a\xff\xff\xff\xff\x80\0\0" + bytes(6) + b"\x2c" + bytes(90)),
    "a PPM of 10^20 pixels": lambda: b"P6 9999999999 9999999999 255\n" + bytes(99),
    "zeros": lambda: bytes(10**6),
}  # fmt: skip


def test_no_image_runs_ghostscript(tmp_path: Path) -> None:
    """Pillow would, for a file of PostScript under any name."""
    gs = tmp_path / "bin" / "gs"
    gs.parent.mkdir()
    gs.write_text(f"#!/bin/sh\ntouch {tmp_path / 'planted'}\n")
    gs.chmod(0o755)
    given = check(tmp_path, content(images=[IMAGE, {**IMAGE, "id": 2, "file_name": "b.png"}]))
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 30\n%%EndComments\n(x) run\n"
    (tmp_path / "b.png").write_bytes(script)
    path = f"{gs.parent}:{os.environ['PATH']}"
    outcome = attack(tmp_path, *given, environment={"PATH": path})
    assert outcome.code == 1, outcome.output
    assert "b.png" in outcome.output
    assert not (tmp_path / "planted").exists()


@pytest.mark.parametrize("case", IMAGES)
def test_images(tmp_path: Path, case: str) -> None:
    given = check(tmp_path, content(images=[IMAGE, {**IMAGE, "id": 2, "file_name": "b.png"}]))
    (tmp_path / "b.png").write_bytes(IMAGES[case]())
    outcome = attack(tmp_path, *given, memory=10**9)
    assert outcome.code == 1, outcome.output
    assert "b.png" in outcome.output


def tiny_model() -> tuple[Config, dict[str, Any]]:
    """Return the options of the tiny model, and a checkpoint of it as a run writes it."""
    config = Given(load_file(Path(TINY), SECTIONS, Path("configs"))).config()
    model = build_model(config.model, num_classes=1)
    return config, {
        "model": model.state_dict(),
        "optimizer": {}, "lr_scheduler": {}, "epoch": 0, "progress": {"step": 1}, "best": {},
        "versions": {},
        "classes": Classes((1,), ("cat",)).to_json(),
        "config": asdict(config),
        "preprocessing": {"mean": [0.5] * 3, "std": [0.2] * 3},
    }  # fmt: skip


def stated(**options: Any) -> Callable[[], dict[str, Any]]:
    """Return a checkpoint that states other options of its model than it has."""

    def make() -> dict[str, Any]:
        _, found = tiny_model()
        found["config"]["model"].update(options)
        return found

    return make


def without(*names: str, **options: Any) -> Callable[[], dict[str, Any]]:
    """Return a checkpoint without the weights by which its sizes are known, and other options."""

    def make() -> dict[str, Any]:
        found = stated(**options)()
        for key in [k for k in found["model"] if any(name in k for name in names)]:
            del found["model"][key]
        return found

    return make


def changed(*path: Any, value: Any) -> Callable[[], dict[str, Any]]:
    def make() -> dict[str, Any]:
        _, found = tiny_model()
        inner: Any = found
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = value
        return found

    return make


LARGE = {"hidden_dim": 8192, "dim_feedforward": 65536, "enc_layers": 100, "dec_layers": 100,
         "num_queries": 100_000}  # fmt: skip
CHECKPOINTS: dict[str, tuple[Callable[[], Any], str]] = {
    "10^9 layers": (stated(enc_layers=10**9), "enc_layers"),
    "2^36 queries": (stated(num_queries=2**36), "num_queries"),
    "no heads": (stated(nheads=0), "nheads"),
    "an infinite width": (stated(hidden_dim=float("inf")), "hidden_dim"),
    "a width of 5,000 digits": (stated(hidden_dim=10**5000), "x.pth"),
    "another width": (stated(hidden_dim=64), "hidden_dim 64"),
    "a giant": (stated(**LARGE), "hidden_dim 8192"),
    "a giant of unknown sizes": (without("level_embed", **LARGE), "describes a model of"),
    "a giant backbone": (stated(backbone="timm/vit_7b_patch16_dinov3"), "describes a model of"),
    "a backbone that timm lacks": (stated(backbone="timm/../../etc"), "does not exist"),
    "a backbone of another's hub": (stated(backbone="timm/hf_hub:someone/model"), "does not exist"),
    "no weights": (changed("model", value={}), "x.pth"),
    "weights that are text": (changed("model", "transformer.level_embed", value="x"), "x.pth"),
    "weights under numbers": (changed("model", value={3: torch.zeros(1)}), "x.pth"),
    "classes without end": (changed("classes", value={"ids": [10**5000], "names": ["x"]}), "x.pth"),
    "classes of one id": (changed("classes", value={"ids": [1, 1], "names": ["x", "y"]}), "x.pth"),
    "more classes than logits": (
        changed("classes", value={"ids": list(range(1000)), "names": ["x"] * 1000}), "x.pth"),
    "options that are a list": (changed("config", value=[]), "x.pth"),
    "sections that are lists": (changed("config", "data", value=[1]), "x.pth"),
    "images of 10^9 pixels": (changed("config", "data", "eval_scale", value=10**9), "eval_scale"),
    "an unknown recipe": (changed("config", "recipes", value={"\x1b[2J": {}}), "recipe"),
    "a deviation of nothing": (changed("preprocessing", "std", value=[0.0] * 3), "x.pth"),
    "a list of lists": (lambda: [[[]]], "x.pth"),
    "a number": (lambda: 3, "x.pth"),
}  # fmt: skip


SLOW = ("a giant of unknown sizes", "a giant backbone")  # tests of `check_claims` have them too


@pytest.mark.parametrize(
    "case",
    [pytest.param(c, marks=[pytest.mark.slow] if c in SLOW else []) for c in CHECKPOINTS],
)
def test_checkpoints(tmp_path: Path, case: str) -> None:
    make, words = CHECKPOINTS[case]
    path = tmp_path / "x.pth"
    torch.save(make(), path)
    png(tmp_path)
    outcome = attack(tmp_path, "predict", "--checkpoint", path, "--input", tmp_path / "a.png",
                     "--output_dir", tmp_path / "o")  # fmt: skip
    assert_refused(outcome, words)
    given = coco(tmp_path, content())
    for option in ("--resume", "--finetune"):
        base: Arguments = ("--config", TINY, *given) if option == "--finetune" else ()
        outcome = attack(tmp_path, "train", *base, option, path, "--output_dir", tmp_path / "o",
                         "--val_annotations", tmp_path / "x.json", "--val_images", tmp_path,
                         "--max_steps", "1", "--no_tensorboard")  # fmt: skip
        if option == "--resume":
            assert_refused(outcome)
        else:  # which takes what fits
            assert outcome.code in (0, 2)


class Command:
    """Unpickled, it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def bomb(path: Path) -> None:
    """A checkpoint of 400 MB in 400 kB."""
    torch.save({"model": {"w": torch.zeros(10)}}, path)
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, part in parts.items():
            archive.writestr(name, bytes(400_000_000) if name.endswith("data/0") else part)


def half(path: Path) -> None:
    torch.save({"w": torch.zeros(10**5)}, path)
    os.truncate(path, 2000)


def write_bytes(data: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(data)


FILES: dict[str, Callable[[Path], object]] = {
    "a zip bomb": bomb,
    "a command": lambda path: torch.save({"model": Command(path.with_name("planted"))}, path),
    "a bare command": lambda path: path.write_bytes(
        pickle.dumps({"model": Command(path.with_name("planted"))})),
    "lists in lists": write_bytes(b"\x80\x02" + b"]" * 10**5 + b"a" * (10**5 - 1) + b"."),
    "a string of 2^60 bytes": write_bytes(b"\x80\x04\x8e" + struct.pack("<Q", 2**60) + b"x."),
    "a tuple of itself": write_bytes(b"\x80\x02]q\0" + b"h\0" * 10**6 + b"a."),
    "memories without end": write_bytes(b"\x80\x02]r\xff\xff\xff\x7f."),
    "an integer of a megabyte": write_bytes(
        b"\x80\x02\x8b" + struct.pack("<i", 10**6) + b"\x7f" * 10**6 + b"."),
    "a number of 10^6 digits": write_bytes(b"I" + b"9" * 10**6 + b"\n."),
    "noise": write_bytes(bytes(range(256)) * 4000),
    "zeros": write_bytes(bytes(10**6)),
    "half a zip": half,
}  # fmt: skip


@pytest.mark.parametrize("case", FILES)
def test_files_in_place_of_checkpoints(tmp_path: Path, case: str) -> None:
    FILES[case](tmp_path / "x.pth")
    assert_refused(attack(tmp_path, "eval", "--checkpoint", tmp_path / "x.pth"), "x.pth")
    weights = attack(tmp_path, *train(tmp_path, content()), "--backbone_weights",
                     tmp_path / "x.pth")  # fmt: skip
    assert_refused(weights, "x.pth")
    assert not (tmp_path / "planted").exists()


def safetensor(*shape: int, end: int) -> bytes:
    header = json.dumps({"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, end]}}).encode()
    return struct.pack("<Q", len(header)) + header


SAFETENSORS: dict[str, bytes] = {
    "a header of 2^60 bytes": struct.pack("<Q", 2**60) + b"{}",
    "a tensor past the end": safetensor(2**40, end=2**42),
    "a shape of 2^120": safetensor(2**60, 2**60, end=0),
    "nothing": struct.pack("<Q", 0),
}  # fmt: skip


@pytest.mark.parametrize("case", SAFETENSORS)
def test_safetensors(tmp_path: Path, case: str) -> None:
    (tmp_path / "x.safetensors").write_bytes(SAFETENSORS[case])
    outcome = attack(tmp_path, "eval", "--checkpoint", tmp_path / "x.safetensors")
    assert_refused(outcome, "x.safetensors")


HUGGING_FACE: dict[str, dict[str, Any]] = {
    "a giant": {"d_model": 8192, "encoder_ffn_dim": 65536, "decoder_ffn_dim": 65536,
                "encoder_layers": 100, "decoder_layers": 100},
    "10^9 layers": {"encoder_layers": 10**9},
    "a giant backbone": {"use_timm_backbone": True, "backbone": "vit_7b_patch16_dinov3"},
    "a backbone that is a list": {"backbone_config": [1]},
    "labels without end": {"id2label": {NINES: "x"}},
    "labels that are a list": {"id2label": [1, 2]},
    "a width of text": {"d_model": "\x1b[2J" * 1000},
    "a width of nothing": {"d_model": None},
}  # fmt: skip


@pytest.mark.parametrize("case", HUGGING_FACE)
def test_hugging_face_folders(tmp_path: Path, case: str) -> None:
    config = {"model_type": "deformable_detr", "d_model": 32, "encoder_attention_heads": 2,
              "decoder_attention_heads": 2}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps({**config, **HUGGING_FACE[case]}))
    tensors = {"model.level_embed": torch.zeros(4, 32), "class_embed.0.bias": torch.zeros(3)}
    save_file(tensors, tmp_path / "model.safetensors")
    outcome = attack(tmp_path, "eval", "--checkpoint", tmp_path)
    assert_refused(outcome)
    assert str(tmp_path) in outcome.error or "enc_layers" in outcome.error


@pytest.fixture
def resumable(reference: Path, tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    """A file to write an attack to, and the content of a run's checkpoint."""
    return tmp_path / "last.pth", torch.load(reference / "last.pth", weights_only=True)


STATES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "moments of one value": (
        lambda c: [m.update(exp_avg=torch.zeros(1)) for m in c["optimizer"]["state"].values()],
        "exp_avg, is (1,)"),
    "sparse moments": (
        lambda c: [m.update(exp_avg=torch.eye(3).to_sparse())
                   for m in c["optimizer"]["state"].values()], "sparse"),
    "complex moments": (
        lambda c: c["optimizer"]["state"][0].update(exp_avg=torch.zeros(3, dtype=torch.complex64)),
        "complex"),
    "moments without data": (
        lambda c: c["optimizer"]["state"][0].update(exp_avg=torch.empty(3, device="meta")),
        "without data"),
    "weights under numbers": (lambda c: c["model"].update({7: torch.zeros(1)}), "7"),
    "weights that are NaN": (
        lambda c: c["model"]["transformer.level_embed"].fill_(float("nan")), "not finite"),
    "a negative position": (lambda c: c["progress"].update(next_step=-1), "next_step"),
    "a generator past its end": (
        lambda c: c["progress"]["rng"][0].update(numpy=("MT19937", [0] * 624, 10**6, 0, 0.0)),
        "numpy"),
    "options that are text": (lambda c: c.update(config="x"), "config"),
    "another width": (lambda c: c["config"]["model"].update(hidden_dim=8192), "hidden_dim 8192"),
}  # fmt: skip


@pytest.mark.parametrize("case", STATES)
def test_states_of_a_run(resumable: tuple[Path, dict[str, Any]], case: str) -> None:
    path, saved = resumable
    change, words = STATES[case]
    change(saved)
    torch.save(saved, path)
    before = path.read_bytes()
    outcome = attack(path.parent, "train", "--resume", path, "--no_tensorboard", memory=10**9,
                     seconds=30)  # fmt: skip
    assert_refused(outcome, words)
    assert path.read_bytes() == before


def fifo(path: Path) -> None:
    os.mkfifo(path)


def loop(path: Path) -> None:
    path.symlink_to(path)


def full_folder(path: Path) -> None:
    path.mkdir()
    (path / "x").touch()


def zero(path: Path) -> None:
    path.symlink_to("/dev/zero")


def socket_file(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # an address has at most 107 bytes
    try:
        with socket.socket(socket.AF_UNIX) as opened:
            opened.bind(path.name)
    finally:
        os.chdir(here)


NO_FILES = (fifo, loop, full_folder, zero, socket_file)


@pytest.mark.parametrize("make", NO_FILES)
@pytest.mark.parametrize("what", ["x.json", "a.png", "x.yaml", "x.pth", "found.json", "set.xml",
                                  "set.txt", "hf/config.json"])  # fmt: skip
def test_what_is_no_file(tmp_path: Path, what: str, make: Callable[[Path], None]) -> None:
    annotations = coco(tmp_path, content())
    for name in ("set/JPEGImages", "set/Annotations", "yolo/images", "yolo/labels", "hf"):
        (tmp_path / name).mkdir(parents=True)
    png(tmp_path / "set" / "JPEGImages")
    png(tmp_path / "yolo" / "images")
    (tmp_path / "set" / "Annotations" / "b.xml").write_text(XML.format(""))
    (tmp_path / "yolo" / "classes.txt").write_text("cat\n")
    (tmp_path / "yolo" / "labels" / "b.txt").write_text("0 0.5 0.5 0.1 0.1\n")
    places = {"set.xml": "set/Annotations/a.xml", "set.txt": "yolo/labels/a.txt"}
    path = tmp_path / places.get(what, what)
    path.unlink(missing_ok=True)
    make(path)
    truth = ("--val_annotations", tmp_path / "x.json")
    commands: dict[str, Arguments] = {
        "x.json": ("check", *annotations), "a.png": ("check", *annotations),
        "x.yaml": ("train", "--config", path), "x.pth": ("eval", "--checkpoint", path),
        "found.json": ("eval", "--detections", path, *truth),
        "set.xml": ("check", "--data_path", tmp_path / "set", "--splits", "train"),
        "set.txt": ("check", "--data_path", tmp_path / "yolo", "--splits", "train"),
        "hf/config.json": ("eval", "--checkpoint", tmp_path / "hf"),
    }  # fmt: skip
    outcome = attack(tmp_path, *commands[what])
    assert outcome.code in ((1, 2) if commands[what][0] == "check" else (2,)), outcome.output


@pytest.mark.parametrize("make", some([fifo, loop, full_folder], full_folder))
@pytest.mark.parametrize("name", ["metrics.jsonl", "log.txt", "tensorboard", "config.yaml",
                                  "data_report.json", "curves.png", "pictures", "nonfinite",
                                  "best.pth", "last.pth"])  # fmt: skip
def test_what_is_in_the_way_of_a_run(
    tmp_path: Path, name: str, make: Callable[[Path], None]
) -> None:
    """The run ends in one line before it has computed, or replaces it."""
    (tmp_path / "out").mkdir()
    make(tmp_path / "out" / name)
    given = [word for word in train(tmp_path, content()) if word != "--no_tensorboard"]
    outcome = attack(tmp_path, *given, "--num_workers", "0", **USUAL)
    if outcome.code:
        assert_refused(outcome, str(tmp_path / "out"))


UNKNOWN = 54321


def be_unknown() -> None:
    """Be a user whom this machine does not know, as in many containers; files open as before."""
    os.setresuid(UNKNOWN, -1, -1)


def become_nobody() -> None:
    """Be a user who may do nothing special."""
    os.setgroups([])
    os.setgid(UNKNOWN)
    os.setuid(UNKNOWN)


root_alone = pytest.mark.skipif(
    sys.platform == "linux" and os.geteuid() != 0, reason="only root can become another user"
)


@pytest.fixture
def anywhere() -> Iterator[Path]:
    """A folder that every user may use."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o777)
        yield Path(name)


HOMELESS = {"HOME": None, "USER": None, "LOGNAME": None, "XDG_CACHE_HOME": None,
            "MSDEFORM_CACHE": None, "MSDEFORM_BACKEND": "reference"}  # fmt: skip


@root_alone
def test_a_user_without_name_or_home_trains(anywhere: Path) -> None:
    given = train(anywhere, content())
    (anywhere / "out").mkdir()
    (anywhere / "out").chmod(0o777)
    outcome = attack(anywhere, *given, "--num_workers", "0", **USUAL, environment=HOMELESS,
                     first=be_unknown)  # fmt: skip
    assert outcome.code == 0, outcome.output
    assert (anywhere / "out" / "last.pth").is_file()


@root_alone
def test_what_a_user_may_not_read_or_write_is_one_line(anywhere: Path) -> None:
    library = Path(os.__file__)
    if not all(folder.stat().st_mode & stat.S_IXOTH for folder in library.parents):
        pytest.skip(f"other users may not read {library.parent}")
    given = train(anywhere, content())
    limits: dict[str, Any] = {"environment": HOMELESS, "first": become_nobody}
    (anywhere / "x.json").chmod(0)
    assert_refused(attack(anywhere, *given, **limits), "x.json", "Permission denied")
    (anywhere / "x.json").chmod(0o644)
    (anywhere / "a.png").chmod(0)
    found = attack(anywhere, *check(anywhere, content()), **limits)
    assert found.code == 1, found.output
    (anywhere / "a.png").chmod(0o644)
    (anywhere / "out").mkdir(mode=0o755)
    assert_refused(attack(anywhere, *given, **limits), "is not writable", str(anywhere / "out"))


@pytest.mark.parametrize("seconds", [-(10**9), 10**11])  # 1938 and 5138
def test_files_of_another_time(tmp_path: Path, seconds: int) -> None:
    """Such as after the battery of a clock has run out."""
    given = train(tmp_path, content())
    for name in ("x.json", "a.png"):
        os.utime(tmp_path / name, (seconds, seconds))
    first = attack(tmp_path, *given, **USUAL)
    assert first.code == 0, first.output
    saved = tmp_path / "out" / "last.pth"
    os.utime(saved, (seconds, seconds))
    again = attack(tmp_path, "train", "--resume", saved, "--max_steps", "2", memory=2**30,
                   seconds=60)  # fmt: skip
    assert again.code == 0, again.output


SENSELESS: dict[str, Arguments] = {
    "batch": ("--batch_size", "1e12"), "workers": ("--num_workers", "100000"),
    "queries": ("--num_queries", "1e11"), "layers": ("--enc_layers", "1e9"),
    "no heads": ("--nheads", "0"), "digits": ("--epochs", NINES),
    "exponent": ("--epochs", "1e999999999"), "negative": ("--max_size", "-5"),
    "rate": ("--lr", "nan"), "device": ("--device", "meta"), "GPU": ("--device", "cuda:99"),
    "seed": ("--seed", "1e30"), "processes": ("--gpus", "1000000"),
    "pixels": ("--max_pixels", "0"),
    "letters": ("--backbone", "\x1b[2J" * 1000), "long": ("--backbone_weights", "x" * 100_000),
    "scales": ("--train_scales", "1e9"), "kept": ("--keep_checkpoints", "1e300"),
}  # fmt: skip


@pytest.mark.parametrize("case", SENSELESS)
def test_options_beyond_sense(tmp_path: Path, case: str) -> None:
    given = train(tmp_path, content())
    assert_refused(attack(tmp_path, *given, *SENSELESS[case]))


@pytest.mark.parametrize("name", ["o" * 5000, "a/" * 3000, "o" * 256, "\0", "\x1b[2J\n" * 60])
def test_output_folders_that_cannot_be(tmp_path: Path, name: str) -> None:
    given = train(tmp_path, content())
    outcome = attack(tmp_path, *given, "--output_dir", tmp_path / name, **USUAL)
    assert_refused(outcome, "--output_dir")


def test_a_terminal_is_told_nothing(tmp_path: Path) -> None:
    """Names of classes and files are written out by every command that prints them."""
    evil = "\x1b]0;owned\x07\x1b[2J\u202e\ncat"
    name = "\x1b[31m\ta.png"
    text = content(categories=[{"id": 1, "name": evil}], images=[{**IMAGE, "file_name": name}])
    given = train(tmp_path, text)
    os.rename(tmp_path / "a.png", tmp_path / name)
    done = attack(tmp_path, *given, "--num_workers", "0", **USUAL)
    assert done.code == 0, done.output
    assert r"\x1b" in done.output
    last = tmp_path / "out" / "last.pth"
    for command in (
        ("eval", "--checkpoint", last),
        ("predict", "--checkpoint", last, "--input", tmp_path / name, "--score_threshold", "0"),
        ("preview", "--config", tmp_path / "out" / "config.yaml"),
    ):
        outcome = attack(tmp_path, *command, "--output_dir", tmp_path / command[0], **USUAL)
        assert outcome.code == 0, outcome.output


@pytest.fixture
def abyss(tmp_path: Path) -> Iterator[Path]:
    """A folder with folders in each other, 1,100 deep, which `Path.rglob` cannot walk."""
    root, here = tmp_path / "abyss", Path.cwd()
    root.mkdir()
    os.chdir(root)
    for _ in range(1100):
        os.mkdir("a")
        os.chdir("a")
    os.chdir(here)
    yield root
    os.chdir(root)
    for _ in range(1100):
        os.chdir("a")
    for _ in range(1100):
        os.chdir("..")
        os.rmdir("a")
    os.chdir(here)


@pytest.mark.parametrize("what", ["coco", "yolo", "voc", "predict"])
def test_folders_without_end(tmp_path: Path, abyss: Path, what: str) -> None:
    """Deep ones, and links that lead back, two of which double the paths at every level."""
    for name in "bc":
        (abyss / name).symlink_to(abyss)
    (abyss / "0.png").symlink_to("0.png")  # before the others in every list
    (abyss / "0.json").symlink_to("0.json")
    png(abyss)
    given: dict[str, Arguments] = {
        "coco": ("--train_annotations", abyss / "x.json", "--train_images", abyss),
        "yolo": ("--data_path", abyss / "data.yaml", "--splits", "train"),
        "voc": ("--data_path", abyss, "--splits", "train"),
    }
    if what == "coco":
        coco(abyss, content(images=[{**IMAGE, "file_name": "other/A.PNG"}]))
    elif what == "yolo":
        (abyss / "data.yaml").write_text("train: .\nval: .\nnames: [cat]\n")
        (abyss / "a.txt").write_text("0 0.5 0.5 0.5 0.5\n")
    elif what == "voc":
        (abyss / "a.xml").write_text(XML.format(""))
    if what == "predict":
        _, saved = tiny_model()
        torch.save(saved, tmp_path / "x.pth")
        outcome = attack(tmp_path, "predict", "--checkpoint", tmp_path / "x.pth", "--input", abyss,
                         "--output_dir", tmp_path / "o", **USUAL)  # fmt: skip
        assert outcome.code == 0, outcome.output
        return
    outcome = attack(tmp_path, "check", *given[what], "--num_workers", "0")
    assert outcome.code in (0, 1), outcome.output
    assert "1 image" in outcome.output
