"""`push` without the way to the hub: the folder it writes, and what loads that."""

import json
import shutil
from base64 import b64decode
from collections.abc import Iterator
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from configs.load import read_options
from configs.tiles import TileOptions, TrainTileOptions
from engine.commands.push import upload
from engine.detector import Detector
from models.build import build_model
from models.recipes import KnownRecipes
from models.weights.official import save_official
from tests.integration.conftest import Cli
from tests.unit.models.small import perturb, small_config
from util.batch import pad_images
from util.classes import Classes
from util.errors import ConfigError
from util.tensor_files import load_safely, save_whole

REPO = ("--repo", "jane/shapes", "--dry_run")


@pytest.fixture(scope="module")
def pushed(cli: Cli, finished_run: Path, shapes: Path, tmp_path_factory: Any) -> Path:
    """The folder of a run whose model transformers lacks."""
    folder: Path = tmp_path_factory.mktemp("hub") / "pushed"
    image = sorted((shapes / "val2017").iterdir())[0]
    done = cli("push", "--checkpoint", finished_run / "best.pth", *REPO, "--output_dir", folder,
               "--input", image, "--license", "apache-2.0")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "in our own format: transformers has no backbone 'timm/test_resnet'" in done.stdout
    assert "nothing was pushed" in done.stdout
    return folder


def card_of(folder: Path) -> tuple[dict[str, Any], str]:
    """Return the header of a card and the rest."""
    _, header, text = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(header), text


def rows_of(text: str, first: str) -> list[list[str]]:
    """Return the rows of the table whose header begins with a word."""
    lines = text.split(f"| {first} |", 1)[1].split("\n\n", 1)[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_card_says_what_the_run_knows(pushed: Path, finished_run: Path, shapes: Path) -> None:
    header, text = card_of(pushed)
    assert header["library_name"] == "deformable-detr"
    assert header["license"] == "apache-2.0"
    assert header["pipeline_tag"] == "object-detection"
    truths = {
        split: json.loads((shapes / f"annotations/instances_{split}2017.json").read_text())
        for split in ("train", "val")
    }
    assert rows_of(text, "data") == [
        [name, str(len(truths[split]["images"])), str(len(truths[split]["annotations"]))]
        for split, name in (("train", "training"), ("val", "validation"))
    ]
    categories = sorted(truths["train"]["categories"], key=lambda c: c["id"])
    classes = rows_of(text, "class")
    assert [row[:2] for row in classes] == [[c["name"], str(c["id"])] for c in categories]
    # the best epoch by AP is that of best.pth
    log = [json.loads(line) for line in (finished_run / "log.txt").open()]
    best = max(log, key=lambda entry: entry["test_coco_eval_bbox"][0])["test_coco_eval_bbox"]
    written = dict(rows_of(text, "COCO metric"))
    assert float(written["AP"]) == pytest.approx(best[0], abs=6e-4)
    assert float(written["AP50"]) == pytest.approx(best[1], abs=6e-4)
    assert header["model-index"][0]["results"][0]["metrics"][0]["value"] == pytest.approx(
        best[0], abs=6e-5
    )
    original = sorted((shapes / "val2017").iterdir())[0]
    with Image.open(pushed / "example.jpg") as picture, Image.open(original) as image:
        assert picture.size == image.size
        assert picture.tobytes() != image.convert("RGB").tobytes()
    assert "(example.jpg)" in text


def test_nothing_in_the_folder_names_a_place(pushed: Path, finished_run: Path) -> None:
    names = sorted(path.name for path in pushed.iterdir())
    assert names == [
        "README.md", "deformable_detr.json", "example.jpg", "model.safetensors", "training.yaml"
    ]  # fmt: skip
    places = {str(finished_run.parent.parent).encode(), str(Path.home()).encode() + b"/"}
    for path in pushed.iterdir():
        assert not [place for place in places if place in path.read_bytes()], path


def test_no_option_that_names_a_place_is_pushed(
    cli: Cli, finished_run: Path, tmp_path: Path
) -> None:
    content = load_safely(finished_run / "best.pth")
    places = {
        "data": ["coco_path", "data_path", "train_images", "train_annotations", "val_images",
                 "val_annotations"],
        "run": ["output_dir", "resume", "finetune", "backbone_weights"],
    }  # fmt: skip
    for title, names in places.items():
        assert set(names) <= content["config"][title].keys()
        content["config"][title] |= {name: f"../hidden_place/{name}.pth" for name in names}
    save_whole(tmp_path / "best.pth", content)
    done = cli("push", "--checkpoint", tmp_path / "best.pth", *REPO, "--output_dir",
               tmp_path / "pushed")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "pushed" / "training.yaml").is_file()
    for path in (tmp_path / "pushed").iterdir():
        assert b"hidden_place" not in path.read_bytes(), path


def test_the_example_has_nothing_of_the_file_but_pixels(
    cli: Cli, finished_run: Path, shapes: Path, tmp_path: Path
) -> None:
    exif = Image.Exif()
    exif[0x010F] = "secret maker"
    with Image.open(sorted((shapes / "val2017").iterdir())[0]) as image:
        image.convert("RGB").save(
            tmp_path / "a.jpg", comment=b"secret comment", xmp=b"<secret/>", exif=exif,
            icc_profile=b"secret profile",
        )  # fmt: skip
    assert (tmp_path / "a.jpg").read_bytes().count(b"secret") == 4
    done = cli("push", "--checkpoint", finished_run / "best.pth", *REPO, "--output_dir",
               tmp_path / "pushed", "--input", tmp_path / "a.jpg")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert b"secret" not in (tmp_path / "pushed" / "example.jpg").read_bytes()


@pytest.mark.parametrize("lacking", [True, False])
def test_tiles_are_pushed(cli: Cli, finished_run: Path, tmp_path: Path, lacking: bool) -> None:
    """Whether transformers lacks the model or has it: images are cut as in training."""
    content = load_safely(finished_run / "best.pth")
    if not lacking:
        config = small_config(backbone="resnet18", with_box_refine=True)
        torch.manual_seed(0)
        model = build_model(config, num_classes=2)
        perturb(model)
        content |= {"model": model.state_dict(), "ema": None, "thresholds": {}}
        content["classes"] = Classes((1, 2), ("a", "b")).to_json()
        content["config"] = {"model": asdict(config), "data": content["config"]["data"]}
    tiles = TrainTileOptions(tile=True, tile_size=96, tile_overlap=0.3, tile_nms=0.4)
    content["config"]["tiles"] = asdict(tiles)
    save_whole(tmp_path / "best.pth", content)
    done = cli("push", "--checkpoint", tmp_path / "best.pth", *REPO, "--output_dir",
               tmp_path / "pushed")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "pushed" / "config.json").is_file() != lacking
    ours, pushed = (Detector.load(tmp_path / name, device="cpu") for name in ("best.pth", "pushed"))
    assert pushed.tiles == ours.tiles
    assert pushed.tiles == tiles
    pixels = np.random.default_rng(0).integers(0, 256, (120, 200, 3), dtype=np.uint8)
    boxes = ours.predict(pixels, 0)
    assert pushed.predict(pixels, 0) == boxes
    ours.tiles = TileOptions()
    assert ours.predict(pixels, 0) != boxes


def test_the_options_of_the_run_are_a_config(pushed: Path, finished_run: Path) -> None:
    recipes = KnownRecipes()
    found, expected = (
        asdict(read_options(str(path), {}, recipes).config())
        for path in (pushed / "training.yaml", finished_run / "config.yaml")
    )
    assert found["model"] == expected["model"]
    assert found["loss"] == expected["loss"]
    assert found["recipes"] == expected["recipes"]
    differing = {
        name
        for title in ("data", "optim", "run")
        for name in expected[title]
        if found[title][name] != expected[title][name]
    }
    assert differing <= {"coco_path", "output_dir", "device"}


@pytest.mark.parametrize("place", ["", "model.safetensors"])
def test_the_folder_detects_as_the_checkpoint_does(
    cli: Cli, pushed: Path, finished_run: Path, shapes: Path, tmp_path: Path, place: str
) -> None:
    written = []
    for name, source in (("ours", finished_run / "best.pth"), ("pushed", pushed / place)):
        done = cli("predict", "--checkpoint", source, "--input", shapes / "val2017",
                   "--output_dir", tmp_path / name, "--no_draw")  # fmt: skip
        assert done.returncode == 0, done.stderr
        written.append(
            [(tmp_path / name / file).read_bytes()
             for file in ("predictions.json", "score_thresholds.json")]
        )  # fmt: skip
    assert written[0] == written[1]
    assert len(written[0][0]) > 1000


def test_a_name_on_the_hub_loads_what_was_pushed(
    pushed: Path, finished_run: Path, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    # as the hub's own client keeps what it has downloaded
    kept = tmp_path / "models--jane--shapes"
    shutil.copytree(pushed, kept / "snapshots" / ("a" * 40))
    (kept / "refs").mkdir()
    (kept / "refs" / "main").write_text("a" * 40)
    image = sorted((shapes / "val2017").iterdir())[0]
    expected = Detector.load(finished_run / "best.pth", device="cpu").predict(image, 0)
    assert Detector.load("jane/shapes", device="cpu").predict(image, 0) == expected
    assert len(expected) == 100


@pytest.mark.long
def test_transformers_loads_what_it_has_a_model_for(cli: Cli, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    options = asdict(small_config(backbone="resnet18", with_box_refine=True))
    torch.manual_seed(0)
    model = build_model(small_config(backbone="resnet18", with_box_refine=True), num_classes=4)
    perturb(model)
    save_official(tmp_path / "official.pth", model.state_dict(), options=options, epoch=7)
    done = cli("push", "--checkpoint", tmp_path / "official.pth", *REPO, "--output_dir",
               tmp_path / "pushed")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "as DeformableDetrForObjectDetection.from_pretrained" in done.stdout
    header, text = card_of(tmp_path / "pushed")
    assert header["library_name"] == "transformers"
    assert "from_pretrained(" in text
    assert "None are recorded" in text
    theirs, info = transformers.DeformableDetrForObjectDetection.from_pretrained(
        tmp_path / "pushed", output_loading_info=True, dtype=torch.float64
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ours = Detector.load(tmp_path / "pushed", device="cpu").model.double()
    images = torch.randn(2, 3, 128, 96, dtype=torch.float64)
    with torch.no_grad():
        expected = theirs.eval()(images, pixel_mask=torch.ones(2, 128, 96, dtype=torch.long))
        outputs = [network(pad_images(list(images))) for network in (ours, model.double().eval())]
    for output in outputs:
        torch.testing.assert_close(output["pred_logits"], expected.logits, atol=1e-9, rtol=1e-9)
        torch.testing.assert_close(output["pred_boxes"], expected.pred_boxes, atol=1e-9, rtol=1e-9)


class Hub(ThreadingHTTPServer):
    """A hub of one repository on this machine, as far as the hub's client asks it for a push."""

    def __init__(self, files: dict[str, bytes], *, private: bool) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.files, self.private = files, private
        self.address = f"http://127.0.0.1:{self.server_address[1]}"


class _Answers(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:  # noqa: N802 - named by the library
        if "/tree/" in self.path:
            entry = {"type": "file", "oid": "b" * 40, "size": 1}
            self._answer([entry | {"path": name} for name in self.server.files])
        else:
            self._answer({"id": "jane/shapes", "private": self.server.private})

    def do_POST(self) -> None:  # noqa: N802
        sent = self.rfile.read(int(self.headers["Content-Length"]))
        address = self.server.address
        if self.path == "/api/repos/create":  # it is there
            self._answer({"url": f"{address}/jane/shapes"}, 409)
        elif "/preupload/" in self.path:
            self._answer(
                {"files": [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                           for file in json.loads(sent)["files"]]}
            )  # fmt: skip
        elif "/commit/" in self.path:
            for line in map(json.loads, sent.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    self.server.files[value["path"]] = b64decode(value["content"])
                elif line["key"] == "deletedFile":
                    del self.server.files[value["path"]]
            self._answer({"commitUrl": f"{address}/jane/shapes/commit/a", "commitOid": "a" * 40})
        else:  # whether the header of the card is valid
            self._answer({"errors": [], "warnings": []})

    def _answer(self, content: object, status: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Print nothing."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub to which a model that transformers has was pushed before, and a file by hand."""
    names = [
        ".gitattributes", "README.md", "config.json", "deformable_detr.json", "example.jpg",
        "model.safetensors", "notes.txt", "preprocessor_config.json", "training.yaml",
    ]  # fmt: skip
    with Hub(dict.fromkeys(names, b"of the last push"), private=False) as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.address)
        monkeypatch.setattr("huggingface_hub.hf_api.get_token", lambda: "hf_none")
        thread = Thread(target=hub.serve_forever)
        thread.start()
        yield hub
        hub.shutdown()
        thread.join()


def test_what_the_last_push_wrote_and_this_one_does_not_goes(pushed: Path, hub: Hub) -> None:
    assert upload(pushed, "jane/shapes", private=False).endswith("jane/shapes")
    new = {path.name: path.read_bytes() for path in pushed.iterdir()}
    by_hand = dict.fromkeys([".gitattributes", "notes.txt"], b"of the last push")
    assert hub.files == new | by_hand


def test_nothing_private_goes_to_a_public_repository(pushed: Path, hub: Hub) -> None:
    before = dict(hub.files)
    with pytest.raises(ConfigError, match=r"private: jane/shapes is there already and public"):
        upload(pushed, "jane/shapes", private=True)
    assert hub.files == before
    hub.private = True
    upload(pushed, "jane/shapes", private=True)
    assert hub.files != before


def test_what_the_hub_does_not_take_is_one_line(
    cli: Cli, finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    done = cli("push", "--checkpoint", finished_run / "best.pth", "--repo", "jane/shapes",
               "--output_dir", tmp_path / "kept")  # fmt: skip
    assert done.returncode == 2
    assert "jane/shapes: cannot be pushed to the Hugging Face hub (" in done.stderr
    assert done.stderr.count("\n") == 1
    assert (tmp_path / "kept" / "README.md").is_file()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--repo", "shapes", "--dry_run"), "--repo: must be USER/NAME on the hub, not 'shapes'"),
        (REPO, "--output_dir: is missing"),
        ((*REPO, "--output_dir", "."), "--output_dir .: is not a new or empty folder"),
        ((*REPO, "--output_dir", "new", "--results", "none.json"), "none.json: cannot be read"),
    ],
)
def test_wrong_use_is_one_line(
    cli: Cli, finished_run: Path, options: tuple[str, ...], reason: str
) -> None:
    done = cli("push", "--checkpoint", finished_run / "best.pth", *options)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert reason in done.stderr
    assert not Path("new").exists()
