"""Train, eval and predict as a user runs them."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from scipy.optimize import linear_sum_assignment
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from configs.schema import ModelConfig
from models.build import build_model
from models.weights.official import save_official
from tests.integration.conftest import TINY, Cli, read_log


def test_run_folder_holds_what_is_promised(finished_run: Path) -> None:
    log = read_log(finished_run)
    assert [line["epoch"] for line in log] == [0, 1]
    for key in ("train_loss", "train_loss_ce", "train_loss_bbox_unscaled", "train_class_error",
                "train_lr", "test_loss", "n_parameters"):  # fmt: skip
        assert isinstance(log[-1][key], (int, float)), key
    assert len(log[-1]["test_coco_eval_bbox"]) == 12
    steps = [json.loads(x)["step"] for x in (finished_run / "metrics.jsonl").open()]
    assert steps == list(range(8))
    for name in ("config.yaml", "last.pth", "best.pth", "curves.png", "eval/results.json",
                 "eval/detections.json"):  # fmt: skip
        assert (finished_run / name).stat().st_size > 0, name
    assert len(list((finished_run / "pictures").glob("*.png"))) == 2


def test_tensorboard_has_curves_and_images(finished_run: Path) -> None:
    events = EventAccumulator(str(finished_run / "tensorboard"))
    events.Reload()
    tags = events.Tags()
    assert {"loss", "grad_norm", "lr_backbone", "lr_transformer", "val/AP"} <= set(tags["scalars"])
    assert len(tags["images"]) == 2
    assert len(events.Scalars("loss")) == 8


def test_checkpoint_loads_with_weights_only(finished_run: Path) -> None:
    content = torch.load(finished_run / "last.pth", weights_only=True)
    assert {"model", "optimizer", "lr_scheduler", "epoch", "classes", "config", "progress",
            "best", "versions", "preprocessing"} <= set(content)  # fmt: skip
    assert content["classes"]["ids"] == [3, 7, 11, 18, 24, 52]
    assert content["epoch"] == 1


def test_eval_repeats_the_training_log_to_the_last_digit(
    cli: Cli, finished_run: Path, shapes: Path, tmp_path: Path
) -> None:
    done = cli("eval", "--checkpoint", finished_run / "last.pth", "--output_dir", tmp_path)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "eval" / "results.json").read_text())
    logged = read_log(finished_run)[-1]["test_coco_eval_bbox"]
    assert [-1 if v is None else v for v in results["stats"].values()] == logged

    truth = COCO(str(shapes / "annotations" / "instances_val2017.json"))
    evaluation = COCOeval(truth, truth.loadRes(str(tmp_path / "eval" / "detections.json")), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    assert evaluation.stats.tolist() == logged


def test_images_without_annotations_are_evaluated_too(
    cli: Cli, finished_run: Path, shapes: Path, tmp_path: Path
) -> None:
    """As a test set whose annotations are kept elsewhere: detections to hand in, numbers n/a."""
    truth = json.loads((shapes / "annotations" / "instances_val2017.json").read_text())
    del truth["annotations"]
    truth["categories"].append({"id": 9000, "name": "alien"})
    (tmp_path / "image_info.json").write_text(json.dumps(truth))
    done = cli("eval", "--checkpoint", finished_run / "last.pth", "--output_dir", tmp_path,
               "--val_images", shapes / "val2017",
               "--val_annotations", tmp_path / "image_info.json")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "n/a: no ground truth" in done.stdout
    assert "classes that the model does not know, but no annotation has, left out: 'alien'" in (
        done.stdout
    )
    expected = json.loads((finished_run / "eval" / "detections.json").read_text())
    assert json.loads((tmp_path / "eval" / "detections.json").read_text()) == expected
    analysis = json.loads((tmp_path / "eval" / "analysis.json").read_text())
    assert set(analysis["stats"].values()) == {None}
    assert analysis["best_thresholds"] == {}


def test_a_file_without_categories_has_those_of_the_checkpoint(
    cli: Cli, finished_run: Path, shapes: Path, tmp_path: Path
) -> None:
    truth = json.loads((shapes / "annotations" / "instances_val2017.json").read_text())
    del truth["categories"]
    (tmp_path / "val.json").write_text(json.dumps(truth))
    done = cli("eval", "--checkpoint", finished_run / "last.pth", "--output-dir", tmp_path,
               "--val-images", shapes / "val2017",
               "--val-annotations", tmp_path / "val.json")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "val.json: has no categories, so the model's are taken" in done.stdout
    expected, actual = (
        json.loads((folder / "eval" / "results.json").read_text())
        for folder in (finished_run, tmp_path)
    )
    assert actual == expected


def test_evaluation_without_classes_keeps_them_in_the_detections(
    cli: Cli, finished_run: Path, tmp_path: Path
) -> None:
    done = cli("eval", "--checkpoint", finished_run / "last.pth", "--output_dir", tmp_path,
               "--class_agnostic", "--area_ranges", "500", "2000")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "medium is from 500 to 2000 square pixels" in done.stdout
    results = json.loads((tmp_path / "eval" / "results.json").read_text())
    assert [row["name"] for row in results["per_class"]] == ["object"]
    expected, actual = (
        json.loads((folder / "eval" / "detections.json").read_text())
        for folder in (finished_run, tmp_path)
    )
    assert actual == expected


@pytest.mark.parametrize("batch_size", ["1", "3"])
def test_detections_do_not_depend_on_the_batch_size(
    cli: Cli, finished_run: Path, tmp_path: Path, batch_size: str
) -> None:
    done = cli("eval", "--checkpoint", finished_run / "last.pth", "--output_dir", tmp_path,
               "--batch_size", batch_size)  # fmt: skip
    assert done.returncode == 0, done.stderr
    expected = json.loads((finished_run / "eval" / "detections.json").read_text())
    actual = json.loads((tmp_path / "eval" / "detections.json").read_text())
    assert_same_detections(actual, expected)


def test_predictions_do_not_depend_on_the_batch_size(
    cli: Cli, finished_run: Path, shapes: Path, tmp_path: Path
) -> None:
    found = []
    for batch_size in ("1", "3"):
        out = tmp_path / batch_size
        done = cli("predict", "--checkpoint", finished_run / "last.pth", "--input",
                   shapes / "val2017", "--output_dir", out, "--batch_size", batch_size)  # fmt: skip
        assert done.returncode == 0, done.stderr
        found.append(json.loads((out / "predictions.json").read_text()))
    assert_same_detections(*found)


def test_predictions_are_evaluated_as_detections_are(
    cli: Cli, finished_run: Path, shapes: Path, tmp_path: Path
) -> None:
    """`predict` numbers images from 0 by name, the data from 1 the other way round."""
    truth = json.loads((shapes / "annotations" / "instances_val2017.json").read_text())
    ids = sorted((image["id"] for image in truth["images"]), reverse=True)
    for image in truth["images"]:
        image["id"] = ids.index(image["id"]) + 1
    for annotation in truth["annotations"]:
        annotation["image_id"] = ids.index(annotation["image_id"]) + 1
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    done = cli("predict", "--checkpoint", finished_run / "last.pth", "--input",
               shapes / "val2017", "--output_dir", tmp_path, "--no_draw")  # fmt: skip
    assert done.returncode == 0, done.stderr
    done = cli("eval", "--detections", tmp_path / "predictions.json", "--val_annotations",
               tmp_path / "truth.json", "--output_dir", tmp_path, "--no_analysis")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "images are named by their files, not by their ids: 7 of 7 names" in done.stdout
    expected, actual = (
        json.loads((folder / "eval" / "results.json").read_text())
        for folder in (finished_run, tmp_path)
    )
    assert actual["num_detections"] == expected["num_detections"]
    assert actual["stats"] == pytest.approx(expected["stats"], abs=1e-4)


def assert_same_detections(actual: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    """Pair the detections of each image; scores that are all but equal may change places."""
    assert [d["image_id"] for d in actual] == [d["image_id"] for d in expected]
    for image_id in {d["image_id"] for d in expected}:
        rows = [
            torch.tensor(
                [[1e6 * d["category_id"], d["score"], *d["bbox"]] for d in side
                 if d["image_id"] == image_id],
                dtype=torch.float64,
            )
            for side in (actual, expected)
        ]  # fmt: skip
        distance = (rows[0][:, None] - rows[1][None]).abs().amax(-1)
        pairs = linear_sum_assignment(distance.numpy())
        assert float(distance[pairs].max()) < 1e-2  # pixels of images 64 high
        torch.testing.assert_close(rows[0][:, 1], rows[1][:, 1], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_tiles_change_nothing_where_images_fit_and_more_where_they_do_not(
    cli: Cli, finished_run: Path, tmp_path: Path
) -> None:
    numbers = []
    for name, more in (("whole", ()), ("one", ("--tile", "--tile_size", "4096")),
                       ("cut", ("--tile", "--tile_size", "32"))):  # fmt: skip
        done = cli("eval", "--checkpoint", finished_run / "last.pth", "--batch_size", "1",
                   "--no_analysis", "--output_dir", tmp_path / name, *more)  # fmt: skip
        assert done.returncode == 0, done.stderr
        numbers.append(json.loads((tmp_path / name / "eval" / "results.json").read_text()))
    assert numbers[0] == numbers[1] != numbers[2]


def test_several_checkpoints_are_evaluated_into_one_table(
    cli: Cli, finished_run: Path, tmp_path: Path
) -> None:
    files = [finished_run / "last.pth", tmp_path / "last.pth"]
    content = torch.load(files[0], weights_only=True)
    for name, tensor in content["model"].items():
        if "class_embed" in name:
            tensor.zero_()
    torch.save(content, files[1])
    done = cli("eval", "--checkpoint", *files, "--no_analysis")
    assert done.returncode == 2
    assert "--output_dir: is missing" in done.stderr
    done = cli("eval", "--checkpoint", *files, "--no_analysis", "--output_dir", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    table = done.stdout.split("checkpoint  ")[-1].splitlines()
    for file, line in zip(files, table[1:], strict=True):
        name = f"{file.parent.name}/last"
        result = json.loads((tmp_path / "out" / name / "eval" / "results.json").read_text())
        expected = [result["stats"][key] for key in ("AP", "AP50", "AP75")]
        assert line.split()[:4] == [name, *(f"{value:.3f}" for value in expected)]


def test_predict_draws_every_image_and_names_the_unreadable(
    cli: Cli, finished_run: Path, shapes: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "in"
    (folder / "deep").mkdir(parents=True)
    source = sorted((shapes / "val2017").iterdir())[0]
    (folder / "one.jpg").write_bytes(source.read_bytes())
    Image.open(source).convert("RGBA").save(folder / "deep" / "two.png")
    (folder / "broken.jpg").write_bytes(source.read_bytes()[:500])
    out = tmp_path / "out"
    done = cli("predict", "--checkpoint", finished_run / "last.pth", "--input", folder,
               "--output_dir", out, "--score_threshold", "0.0", "--batch_size", "2")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "broken.jpg" in done.stdout + done.stderr
    assert Image.open(out / "one.jpg").size == Image.open(source).size
    assert Image.open(out / "deep" / "two.png").size == Image.open(source).size
    predictions = json.loads((out / "predictions.json").read_text())
    assert {p["file_name"] for p in predictions} == {"one.jpg", "deep/two.png"}
    assert {p["category_id"] for p in predictions} <= {3, 7, 11, 18, 24, 52}
    assert set(predictions[0]) >= {"image_id", "category_name", "bbox", "score"}

    name = predictions[0]["category_name"]
    (tmp_path / "list.txt").write_text(f"{folder / 'one.jpg'}\n{folder / 'gone.jpg'}\n")
    (tmp_path / "scores.json").write_text(json.dumps({name: 0.0}))
    done = cli("predict", "--checkpoint", finished_run / "last.pth", "--input",
               tmp_path / "list.txt", "--output_dir", tmp_path / "few", "--classes", name,
               "--score_threshold", "1", "--score_thresholds", tmp_path / "scores.json", "--csv",
               "--save_crops", "--no_draw")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "gone.jpg" in done.stdout + done.stderr
    few = json.loads((tmp_path / "few" / "predictions.json").read_text())
    assert {p["category_name"] for p in few} == {name}
    rows = (tmp_path / "few" / "predictions.csv").read_text().splitlines()[1:]
    assert len(rows) == len(few)
    assert 0 < len(list((tmp_path / "few" / "crops").rglob("*.png"))) <= len(few)
    assert not (tmp_path / "few" / "one.jpg").exists()


def test_finetune_carries_rows_over_by_name(
    cli: Cli, finished_run: Path, shapes: Path, tmp_path: Path
) -> None:
    data = Path(shutil.copytree(shapes, tmp_path / "shapes"))
    for split in ("train", "val"):  # the first class becomes an unknown one, with the last id
        file = data / "annotations" / f"instances_{split}2017.json"
        content = json.loads(file.read_text())
        first = min(content["categories"], key=lambda c: c["id"])
        for annotation in content["annotations"]:
            if annotation["category_id"] == first["id"]:
                annotation["category_id"] = 99
        first.update(id=99, name="dodecahedron")
        file.write_text(json.dumps(content))
    done = cli("train", "--config", TINY, "--coco_path", data, "--output_dir", tmp_path / "run",
               "--finetune", finished_run / "best.pth", "--max_steps", "1", "--lr", "1e-9",
               "--weight_decay", "0")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "5 of 6 classes known" in done.stdout
    before = torch.load(finished_run / "best.pth", weights_only=True)["model"]
    after = torch.load(tmp_path / "run" / "last.pth", weights_only=True)["model"]
    rows = "class_embed.0.weight"  # what were labels 1..5 are labels 0..4 now
    torch.testing.assert_close(after[rows][:5], before[rows][1:], rtol=0, atol=1e-6)


def test_an_official_checkpoint_keeps_its_ids_and_names(cli: Cli, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "backbone": "resnet18", "hidden_dim": 32, "nheads": 2, "enc_layers": 1, "dec_layers": 1,
        "dim_feedforward": 32, "num_queries": 5,
    }  # fmt: skip
    model = build_model(ModelConfig(**options), num_classes=91)
    with torch.no_grad():
        for head in model.class_embed:
            assert isinstance(head, torch.nn.Linear)
            head.bias[18] = 4.0  # every query finds a dog, COCO's category 18
    save_official(tmp_path / "official.pth", model.state_dict(), options=options, epoch=49)
    image = tmp_path / "pictures" / "one.png"
    image.parent.mkdir()
    Image.new("RGB", (64, 48), "grey").save(image)
    truth = {
        "images": [{"id": 1, "file_name": "one.png", "width": 64, "height": 48}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 5, "bbox": [1, 1, 9, 9],
                         "area": 81, "iscrowd": 0}],
        "categories": [{"id": 5, "name": "dog"}],
    }  # fmt: skip
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    common = ("--checkpoint", tmp_path / "official.pth", "--output_dir", tmp_path / "out",
              "--eval_scale", "64", "--num_workers", "0")  # fmt: skip
    done = cli("eval", *common, "--val_images", image.parent, "--val_annotations",
               tmp_path / "truth.json")  # fmt: skip
    assert done.returncode == 0, done.stderr
    detections = json.loads((tmp_path / "out" / "eval" / "detections.json").read_text())
    assert [d["category_id"] for d in detections] == [5] * 5
    done = cli("predict", *common, "--input", image)
    assert done.returncode == 0, done.stderr
    best = json.loads((tmp_path / "out" / "predictions.json").read_text())[0]
    assert (best["category_id"], best["category_name"]) == (18, "dog")


def test_doctor_lists_and_checks_every_backend(cli: Cli) -> None:
    done = cli("doctor")
    assert done.returncode == 0, done.stderr
    lines = [line.split(maxsplit=1) for line in done.stdout.splitlines() if line.startswith("  ")]
    on_cpu = dict(lines[:4])  # the CPU comes first
    assert set(on_cpu) == {"cuda", "cpu", "triton", "reference"}
    assert on_cpu["cpu"].startswith("ok, error ")
    assert on_cpu["reference"].startswith("ok, error ")
    assert "computes on NVIDIA GPUs, not on cpu" in on_cpu["cuda"]


@pytest.mark.slow
def test_a_backend_that_cannot_run_is_a_one_line_error(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, finished_run: Path, shapes: Path, tmp_path: Path
) -> None:
    for name, words in [
        ("cuda", "error: MSDEFORM_BACKEND=cuda on cpu: computes on NVIDIA GPUs, not on cpu"),
        (
            "quick",
            "error: MSDEFORM_BACKEND: no backend 'quick'. Choose from cuda, cpu, triton, refer",
        ),
    ]:
        monkeypatch.setenv("MSDEFORM_BACKEND", name)
        done = cli("predict", "--checkpoint", finished_run / "last.pth", "--input",
                   shapes / "val2017", "--output_dir", tmp_path, "--device", "cpu")  # fmt: skip
        assert done.returncode == 2, done.stderr
        assert done.stderr.strip().splitlines()[-1].startswith(words)
        assert "Traceback" not in done.stderr
