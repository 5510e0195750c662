"""Fine-tuning from an official file: rows by class name, frozen parts, thresholds."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from configs.schema import ModelConfig
from main import main
from models.build import build_model
from models.weights.official import save_official
from tests.integration.conftest import Cli
from tests.integration.runs import errors, metrics, start
from tests.unit.models.weights.grounding import save_folder

OPTIONS: dict[str, Any] = {
    "backbone": "resnet18", "hidden_dim": 32, "nheads": 4, "enc_layers": 1, "dec_layers": 2,
    "dim_feedforward": 32, "num_queries": 10, "with_box_refine": True,
}  # fmt: skip
SMALL = ("--train_scales", "64", "--eval_scale", "64", "--max_size", "96", "--num_workers", "0",
         "--batch_size", "2", "--epochs", "9", "--num_images", "0", "--no_random_crop",
         "--no_tensorboard", "--no_probe", "--device", "cpu")  # fmt: skip
STILL = ("--lr", "1e-30", "--lr_backbone", "1e-30")  # moves no bit of a weight


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file as the official code writes it, with 91 logits."""
    torch.manual_seed(3)
    model = build_model(ModelConfig(**OPTIONS), num_classes=91)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.startswith("backbone."):
                parameter.add_(torch.randn_like(parameter) * 0.1)
    path = tmp_path_factory.mktemp("official") / "coco.pth"
    save_official(path, model.state_dict(), options=OPTIONS, epoch=49)
    return path


@pytest.fixture(scope="module")
def people(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six images of "people" and "dogs", whose ids are in the order of neither head."""
    folder = tmp_path_factory.mktemp("people")
    images: list[dict[str, Any]] = []
    boxes: list[dict[str, Any]] = []
    for i in range(6):
        Image.new("RGB", (80, 60), (40 * i, 90, 120)).save(folder / f"{i}.png")
        images.append({"id": i, "file_name": f"{i}.png", "width": 80, "height": 60})
        for category, x in ((9, 5), (4, 40)):
            boxes.append({"id": len(boxes), "image_id": i, "category_id": category,
                          "bbox": [x, 10, 30, 40], "area": 1200, "iscrowd": 0})  # fmt: skip
    categories = [{"id": 9, "name": "person"}, {"id": 4, "name": "dog"}]
    content = {"images": images, "annotations": boxes, "categories": categories}
    (folder / "boxes.json").write_text(json.dumps(content))
    return folder


def data(images: Path, annotations: Path) -> tuple[str | Path, ...]:
    return ("--train_images", images, "--train_annotations", annotations,
            "--val_images", images, "--val_annotations", annotations)  # fmt: skip


def train(folder: Path, *options: str | Path, code: int = 0) -> str:
    """Run `train`; return what it printed."""
    output = folder.with_name(f"{folder.name}.output")
    running = start(output, "train", "--output_dir", folder, *options)
    found = running.end()
    assert found == code, running.output
    return running.output


def weights(path: Path) -> dict[str, Tensor]:
    content: dict[str, Any] = torch.load(path, weights_only=False)
    found: dict[str, Tensor] = content["model"]
    return found


def test_blood_cells_take_all_but_the_rows(official: Path, shared: Any, tmp_path: Path) -> None:
    bccd = shared("datasets/bccd")
    content = json.loads((bccd / "annotations" / "instances_train.json").read_text())
    content["images"] = content["images"][:4]
    kept = {image["id"] for image in content["images"]}
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] in kept]
    few = tmp_path / "few.json"
    few.write_text(json.dumps(content))
    output = train(tmp_path / "run", "--finetune", official, *SMALL, *STILL, "--max_steps", "1",
                   *data(bccd / "BCCD" / "JPEGImages", few))  # fmt: skip
    assert "0 of 3 classes known, fresh: RBC, WBC, Platelets" in output
    checkpoint = torch.load(tmp_path / "run" / "last.pth", weights_only=True)
    assert checkpoint["classes"] == {"ids": [1, 2, 3], "names": ["RBC", "WBC", "Platelets"]}
    before, after = weights(official), checkpoint["model"]
    assert before.keys() == after.keys()
    for name, tensor in after.items():
        if name.startswith("class_embed."):
            assert len(tensor) == 3
        else:
            assert tensor.equal(before[name]), name


def test_person_and_dog_are_the_official_rows(official: Path, people: Path, tmp_path: Path) -> None:
    output = train(tmp_path / "run", "--finetune", official, *SMALL, *STILL, "--max_steps", "1",
                   "--num_queries", "6", *data(people, people / "boxes.json"))  # fmt: skip
    assert "2 of 2 classes known" in output
    assert "query_embed.weight (10 queries to 6)" in output
    checkpoint = torch.load(tmp_path / "run" / "last.pth", weights_only=True)
    assert checkpoint["classes"] == {"ids": [4, 9], "names": ["dog", "person"]}
    before, after = weights(official), checkpoint["model"]
    for layer in range(2):
        for part in ("weight", "bias"):
            name = f"class_embed.{layer}.{part}"
            assert after[name].equal(before[name][[18, 1]]), name  # COCO's dog and person
    rows = {tuple(row) for row in before["query_embed.weight"].tolist()}
    kept = {tuple(row) for row in after["query_embed.weight"].tolist()}
    assert len(kept) == 6
    assert kept <= rows


@pytest.mark.slow
def test_a_plain_detector_gets_deformable_convolutions(
    official: Path, people: Path, tmp_path: Path
) -> None:
    options = ("--finetune", official, *SMALL, "--max_steps", "1", "--dcn", "v1",
               *data(people, people / "boxes.json"))  # fmt: skip
    train(tmp_path / "run", *options, *STILL)
    before, after = weights(official), weights(tmp_path / "run" / "last.pth")
    offsets = {name for name in after if ".conv_offset." in name}
    assert len(offsets) == 2 * 6  # weights and biases of two blocks in three stages
    for name, tensor in after.items():
        if name in offsets:
            assert tensor.abs().max() < 1e-20, name
        elif not name.startswith("class_embed."):
            assert tensor.equal(before[name]), name
    output = train(tmp_path / "frozen", *options, "--lr_backbone", "0", code=2)
    (line,) = errors(output)
    assert "dcn: the backbone is frozen, and the offsets would stay zero." in line


@pytest.mark.parametrize("dog", [3, 7, 90])
def test_ids_with_gaps_come_back_with_their_names(tmp_path: Path, dog: int) -> None:
    """A detector to which everything is a dog; a set where dog is any of three ids."""
    torch.manual_seed(3)
    model = build_model(ModelConfig(**OPTIONS), num_classes=91)
    with torch.no_grad():
        for head in model.class_embed:
            assert isinstance(head, torch.nn.Linear)
            torch.nn.init.zeros_(head.weight)
            torch.nn.init.constant_(head.bias, -9.0)
            head.bias[18] = 9.0  # COCO's dog
    save_official(tmp_path / "dogs.pth", model.state_dict(), options=OPTIONS, epoch=49)
    Image.new("RGB", (80, 60), "grey").save(tmp_path / "a.png")
    others = [i for i in (90, 3, 7) if i != dog]
    names = {others[0]: "person", dog: "dog", others[1]: "zebra"}
    content = {
        "images": [{"id": 5, "file_name": "a.png", "width": 80, "height": 60}],
        "annotations": [{"id": 0, "image_id": 5, "category_id": dog, "bbox": [9, 9, 40, 30]}],
        "categories": [{"id": i, "name": name} for i, name in names.items()],
    }
    (tmp_path / "boxes.json").write_text(json.dumps(content))
    run = tmp_path / "run"
    train(run, "--finetune", tmp_path / "dogs.pth", *SMALL, *STILL, "--max_steps", "1",
          *data(tmp_path, tmp_path / "boxes.json"))  # fmt: skip
    log = json.loads((run / "log.txt").read_text())
    assert log["train_class_error"] == 0  # it was trained on dogs
    detections = json.loads((run / "eval" / "detections.json").read_text())
    assert {d["category_id"] for d in detections if d["score"] > 0.5} == {dog}
    predict(run / "last.pth", tmp_path, tmp_path / "out", name="a.png")
    found = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert {(d["category_id"], d["category_name"]) for d in found} == set(names.items())
    sure = {(d["category_id"], d["category_name"]) for d in found if d["score"] > 0.5}
    assert sure == {(dog, "dog")}


@pytest.fixture(scope="module")
def frozen_run(official: Path, people: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps with all before the decoder frozen."""
    folder = tmp_path_factory.mktemp("runs") / "frozen"
    train(folder, "--finetune", official, "--freeze", "encoder", "--lr", "1e-3", *SMALL,
          "--max_steps", "2", *data(people, people / "boxes.json"))  # fmt: skip
    return folder


def test_a_resumed_run_stays_frozen(official: Path, frozen_run: Path) -> None:
    begun = weights(frozen_run / "last.pth")
    output = train(frozen_run, "--resume", "auto", "--max_steps", "4")
    assert "resuming at epoch" in output
    before, after = weights(official), weights(frozen_run / "last.pth")
    frozen = ("backbone.", "input_proj.", "transformer.encoder.", "transformer.level_embed")
    moved = {name for name in after if not after[name].equal(begun[name])}
    assert not [name for name in moved if name.startswith(frozen)]
    assert all(after[name].equal(before[name]) for name in after if name.startswith(frozen))
    assert {"query_embed.weight", "class_embed.1.weight"} <= moved
    assert any(name.startswith("transformer.decoder.layers.1.linear1") for name in moved)
    assert [line["step"] for line in metrics(frozen_run)] == [0, 1, 2, 3]


@pytest.mark.parametrize("options", [("--freeze", "none"), ("--freeze", "all_but_heads")])
def test_a_resumed_run_cannot_freeze_other_parts(
    frozen_run: Path, options: tuple[str, ...]
) -> None:
    output = train(frozen_run, "--resume", "auto", *options, code=2)
    assert "freeze: checkpoint encoder, run" in errors(output)[0]
    assert "Traceback" not in output


def test_random_weights_are_not_frozen(people: Path, tmp_path: Path) -> None:
    output = train(tmp_path / "run", "--freeze", "encoder", "--backbone", "timm/test_resnet",
                   "--backbone_weights", "none", *SMALL,
                   *data(people, people / "boxes.json"), code=2)  # fmt: skip
    assert errors(output)[0].startswith("error: --freeze encoder: '")
    assert (
        "would stay random: the weights given lack it. Give --finetune weights" in errors(output)[0]
    )


def predict(
    checkpoint: Path, images: Path, folder: Path, *more: str, name: str = "0.png"
) -> dict[str, float]:
    """Predict on an image; return the thresholds that were used."""
    code = main(["predict", "--checkpoint", str(checkpoint), "--input", str(images / name),
                 "--output_dir", str(folder), "--num_workers", "0", "--device", "cpu",
                 *more])  # fmt: skip
    assert code == 0
    found: dict[str, float] = json.loads((folder / "score_thresholds.json").read_text())
    return found


def test_predict_draws_from_the_thresholds_of_the_checkpoint(
    frozen_run: Path, people: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = torch.load(frozen_run / "last.pth", weights_only=True)
    assert content["thresholds"].keys() <= {"person", "dog"}
    content["thresholds"] = {"dog": 0.0}
    torch.save(content, tmp_path / "with.pth")
    del content["thresholds"]
    torch.save(content, tmp_path / "old.pth")

    assert predict(tmp_path / "with.pth", people, tmp_path / "a") == {"dog": 0.0, "person": 0.3}
    printed = capsys.readouterr().out
    assert "last evaluation: dog 0.00; 0.30 for the other classes. --score_threshold" in printed
    found = json.loads((tmp_path / "a" / "predictions.json").read_text())
    drawn = sum(p["category_name"] == "dog" or p["score"] >= 0.3 for p in found)
    assert drawn > 1
    assert f"1 image with {drawn} boxes at or above the score threshold of their class" in printed

    assert set(predict(tmp_path / "old.pth", people, tmp_path / "b").values()) == {0.3}
    assert "thresholds" not in capsys.readouterr().out
    chosen = predict(tmp_path / "with.pth", people, tmp_path / "c", "--score_threshold", "0.9")
    assert set(chosen.values()) == {0.9}
    assert "boxes at or above score 0.9" in capsys.readouterr().out


def test_grounding_dino_starts_a_detector_of_other_classes(
    cli: Cli, shapes: Path, tmp_path: Path
) -> None:
    save_folder(tmp_path / "theirs")
    done = cli(
        "train", "--finetune", tmp_path / "theirs", "--backbone", "timm/test_resnet",
        "--backbone_weights", "none", "--coco_path", shapes, "--output_dir", tmp_path / "run",
        "--device", "cpu", "--max_steps", "1", "--train_scales", "64", "--eval_scale", "64",
        "--max_size", "96", "--num_workers", "0", "--no_probe", "--no_tensorboard",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "text_backbone" in done.stdout
    assert "is Hugging Face's and is not used" in done.stdout
    done = cli("eval", "--checkpoint", tmp_path / "run" / "last.pth", "--no_analysis")
    assert done.returncode == 0, done.stderr
    done = cli("eval", "--checkpoint", tmp_path / "theirs", "--coco_path", shapes)
    assert done.returncode == 2
    assert "is a Grounding DINO, which finds what a text names" in done.stderr
