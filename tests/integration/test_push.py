"""`push` without the way to the hub: the folder it writes, and what loads that."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from configs.load import read_options
from engine.detector import Detector
from models.build import build_model
from models.recipes import KnownRecipes
from models.weights.official import save_official
from tests.integration.conftest import Cli
from tests.unit.models.small import perturb, small_config
from util.batch import pad_images

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
        ((*REPO, "--output_dir", "."), "--output_dir .: is no new or empty folder"),
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
