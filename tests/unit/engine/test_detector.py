"""A detector from a checkpoint, whatever that lacks; the first weights of a run from another's."""

import copy
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import nn
from torchvision.transforms.functional import pil_to_tensor

from configs.options import Checked, option
from configs.schema import Config, ModelConfig, OptimConfig, RunConfig
from engine.build import build_training_model
from engine.detector import Detector
from engine.evaluation.evaluate import detect
from engine.plan import RunPlan
from models.build import build_model
from models.postprocess import PostProcess
from models.recipes import RECIPES, Recipe
from models.transformer import DeformableTransformer
from models.weights.load import load_pretrained
from util.batch import Batch, pad_images
from util.classes import Classes
from util.errors import CheckpointError, ConfigError, DataError, UserError

TINY = ModelConfig(
    backbone="resnet18", hidden_dim=32, dim_feedforward=16, enc_layers=1, dec_layers=2,
    num_queries=6,
)  # fmt: skip
CLASSES = Classes((3, 7, 90), ("cat", "dog", "cow"))
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def content() -> dict[str, Any]:
    """What a run saves, as far as others read it."""
    return {
        "model": build_model(TINY, num_classes=3).state_dict(),
        "config": asdict(Config(model=TINY)),
        "classes": CLASSES.to_json(),
        "preprocessing": {"mean": [0.5, 0.4, 0.3], "std": [0.5, 0.5, 0.5]},
        "thresholds": {"dog": 0.25},
    }


def save(content: dict[str, Any], folder: Path, **changes: Any) -> str:
    """Write a checkpoint with other parts; None leaves one out."""
    changed = {k: v for k, v in {**content, **changes}.items() if v is not None}
    torch.save(changed, folder / "a.pth")
    return str(folder / "a.pth")


def test_a_checkpoint_without_class_names_goes_by_numbers(
    content: dict[str, Any], tmp_path: Path
) -> None:
    source = save(content, tmp_path, classes=None, thresholds=None, preprocessing=None)
    detector = Detector.load(source, device="cpu")
    assert detector.classes == Classes((0, 1, 2), ("", "", ""))
    assert detector.names == ("0", "1", "2")
    assert all(t.equal(content["model"][k]) for k, t in detector.model.state_dict().items())
    assert detector.mean == detector.model.backbone.mean
    assert not detector.thresholds


@pytest.mark.parametrize("section", ["model", "data"])
def test_an_option_of_a_later_version_is_reported(
    content: dict[str, Any], tmp_path: Path, section: str
) -> None:
    config = copy.deepcopy(content["config"])
    config[section]["twist"] = 1
    source = save(content, tmp_path, config=config)
    with pytest.raises(CheckpointError, match=rf"a\.pth: unknown option '{section}\.twist'.*newer"):
        Detector.load(source, device="cpu")


@pytest.mark.long
def test_evaluation_ignores_training_options_of_later_versions(
    content: dict[str, Any], tmp_path: Path
) -> None:
    config = copy.deepcopy(content["config"])
    config["optim"]["twist"] = 1
    expected = Detector.load(save(content, tmp_path), device="cpu").data
    source = save(content, tmp_path, config=config)
    assert Detector.load(source, device="cpu").data == expected


@dataclass(frozen=True, kw_only=True)
class ShiftOptions(Checked):
    """Options of the recipe below."""

    shift: float = option(0.0, "what is added to the memory at first")


class Shift(Recipe):
    """Adds something learned to the memory, in detection too."""

    options_class = ShiftOptions

    def __init__(
        self, options: ShiftOptions, transformer: DeformableTransformer, *, num_classes: int
    ) -> None:
        super().__init__(options, transformer, num_classes=num_classes)
        self.shift = nn.Parameter(torch.full((transformer.d_model,), options.shift))
        transformer.encoder.register_forward_hook(lambda _, inputs, memory: memory + self.shift)


@pytest.mark.long
def test_a_recipe_that_detection_needs_is_there(
    content: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = asdict(Config(model=TINY)) | {"recipes": {"shift": {"shift": 0.5}}}
    shift = torch.randn(32)
    weights = {**content["model"], "recipes.shift.shift": shift}
    source = save(content, tmp_path, model=weights, config=config)
    with pytest.raises(CheckpointError, match=r"a\.pth: .* recipe 'shift', .* not registered"):
        Detector.load(source, device="cpu")
    monkeypatch.setitem(RECIPES._entries, "shift", Shift)
    detector = Detector.load(source, device="cpu", eval_scale=64)
    assert detector.model.state_dict()["recipes.shift.shift"].equal(shift)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8))
    found = detector.predict(image, threshold=0)
    # as if another had the same parameter in its encoder
    plain = Detector.load(save(content, tmp_path), device="cpu", eval_scale=64)
    assert plain.predict(image, threshold=0) != found
    plain.model.transformer.encoder.register_forward_hook(lambda _, inputs, memory: memory + shift)
    assert plain.predict(image, threshold=0) == found


@pytest.mark.parametrize(
    "changes",
    [
        {"config": "none"},
        {"config": {"data": {}}},
        {"classes": ["cat", "dog", "cow"]},
        {"classes": {"ids": [3, 3, 7], "names": ["a", "b", "c"]}},
        {"preprocessing": {"mean": [1.0]}},
        {"thresholds": [0.5]},
    ],
    ids=str,
)
def test_parts_of_wrong_types_are_one_line_errors(
    content: dict[str, Any], tmp_path: Path, changes: dict[str, Any]
) -> None:
    source = save(content, tmp_path, **changes)
    with pytest.raises(
        CheckpointError, match=r"a\.pth: is not a valid checkpoint of a run"
    ) as caught:
        load_pretrained(source)
    assert "\n" not in str(caught.value)


def test_weights_with_an_unrecognised_backbone(content: dict[str, Any], tmp_path: Path) -> None:
    missing = "backbone.0.body.layer1."
    kept = {k: v for k, v in content["model"].items() if not k.startswith(missing)}
    torch.save(kept, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=r"a\.pth: these weights come without options"):
        Detector.load(tmp_path / "a.pth", device="cpu")
    # for a start the user may say it; what is not said right would stay random
    plan = RunPlan(Config(model=TINY), load_pretrained(str(tmp_path / "a.pth")))
    with pytest.raises(CheckpointError, match="^`backbone resnet18`: does not match the weights"):
        build_training_model(plan, CLASSES)


@pytest.mark.long
def test_numbers_that_are_not_finite_are_no_detections(
    content: dict[str, Any], tmp_path: Path
) -> None:
    weights = {key: tensor.clone() for key, tensor in content["model"].items()}
    weights["transformer.decoder.layers.1.linear1.bias"][3] = float("nan")
    model = Detector.load(save(content, tmp_path, model=weights), device="cpu").model
    target = {"image_id": torch.tensor(5), "orig_size": torch.tensor([128, 128])}
    batch = Batch(pad_images([torch.rand(3, 128, 128)]), [target], [])
    with pytest.raises(UserError, match="image 5: the model produced NaN or infinite scores"):
        list(detect(model, PostProcess(), [batch], device=CPU, description=""))


@pytest.mark.long
@pytest.mark.parametrize("freeze", ["none", "backbone"])
def test_another_backbone_keeps_its_own_weights(
    content: dict[str, Any],
    tmp_path: Path,
    freeze: Literal["none", "backbone"],
    capsys: pytest.CaptureFixture[str],
) -> None:
    # many tensors of torchvision's resnet34 have the names and shapes of its resnet18
    pretrained = load_pretrained(save(content, tmp_path))
    config = Config(
        model=replace(TINY, backbone="resnet34"),
        run=RunConfig(backbone_weights="none"),
        optim=OptimConfig(freeze=freeze),
    )
    torch.manual_seed(1)
    if freeze == "backbone":
        with pytest.raises(ConfigError, match=r"'backbone\.0\..*' would stay random"):
            build_training_model(RunPlan(config, pretrained), CLASSES)
        return
    model, mean, _ = build_training_model(RunPlan(config, pretrained), CLASSES)
    torch.manual_seed(1)
    untouched = build_model(config.model, num_classes=3).state_dict()
    for name, tensor in model.state_dict().items():
        own = name.startswith("backbone.0.")
        assert tensor.equal(untouched[name] if own else content["model"][name]), name
    assert mean == model.backbone.mean
    assert "that of `finetune` is resnet18 and is not used" in capsys.readouterr().out


@pytest.fixture(scope="module")
def detector(content: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Detector:
    source = save(content, tmp_path_factory.mktemp("checkpoint"))
    return Detector.load(source, device="cpu", eval_scale=64, max_size=96)


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an image that its EXIF data say to turn; stored 90 x 70, upright 70 x 90."""
    pixels = np.random.default_rng(0).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).resize((90, 70))
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    image.save(path, exif=exif)
    return path


def upright(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return ImageOps.exif_transpose(image).convert("RGB")


def backwards(array: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return the same values in a view with a negative stride, as of OpenCV's BGR turned to RGB."""
    flipped: NDArray[np.uint8] = array[..., ::-1].copy()
    return flipped[..., ::-1]


READERS: dict[str, Callable[[Path], Any]] = {
    "text": str,
    "pillow": Image.open,
    "pillow, upright": upright,
    "pillow, palette": lambda path: upright(path).quantize(256),
    "array": lambda path: np.asarray(upright(path)),
    "array, a view that runs backwards": lambda p: np.array(upright(p))[..., ::-1].copy()[
        ..., ::-1
    ],
    "tensor": lambda path: pil_to_tensor(upright(path)),
    "tensor of floats": lambda path: pil_to_tensor(upright(path)) / 255,
}


@pytest.mark.parametrize("kind", READERS)
def test_every_kind_of_image_gives_the_same_boxes(
    detector: Detector, photo: Path, kind: str
) -> None:
    source = photo
    if "palette" in kind:  # a file of few colours, which the palette keeps
        source = photo.with_name("few.png")
        upright(photo).quantize(16).convert("RGB").save(source)
    expected = detector.predict(source, threshold=0)
    assert len(expected) == 18  # every query as every class
    assert detector.predict(READERS[kind](source), threshold=0) == expected


def test_boxes_are_named_ordered_and_in_pixels_of_the_upright_image(
    detector: Detector, photo: Path
) -> None:
    image = upright(photo)
    pixels = pil_to_tensor(image.resize((64, 82), Image.Resampling.BILINEAR)) / 255
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (detector.mean, detector.std))
    with torch.inference_mode():
        outputs = detector.model(pad_images([(pixels - mean) / std]))
    scores = outputs["pred_logits"][0].sigmoid()
    found = detector.predict(photo, threshold=0)
    assert [box.score for box in found] == sorted((b.score for b in found), reverse=True)
    for box in found:
        label = CLASSES.names.index(box.name)
        assert box.category_id == CLASSES.ids[label]
        query = int((scores[:, label] - box.score).abs().argmin())
        x, y, w, h = outputs["pred_boxes"][0, query].tolist()
        corners = [70 * (x - w / 2), 90 * (y - h / 2), 70 * (x + w / 2), 90 * (y + h / 2)]
        assert box.xyxy == pytest.approx(corners, abs=1e-2)


def test_a_list_gives_a_list_for_each_and_batches_change_nothing(
    detector: Detector, photo: Path
) -> None:
    wide, red = Image.new("RGB", (40, 30)), Image.new("RGB", (60, 45), "red")
    images: list[Path | Image.Image] = [photo, wide, upright(photo), red]
    single = [detector.predict(image, threshold=0) for image in images]
    assert detector.predict(images, threshold=0) == single
    assert detector.predict(tuple(images), 0) == single
    for boxes, expected in zip(detector.predict(images, 0, batch_size=3), single, strict=True):
        assert [box.score for box in boxes] == pytest.approx([b.score for b in expected], abs=1e-5)
    assert detector.predict([]) == []


def test_thresholds_are_those_of_the_checkpoint_unless_given(
    detector: Detector, photo: Path
) -> None:
    every = detector.predict(photo, threshold=0)
    assert detector.thresholds == {"dog": 0.25}
    assert detector.min_scores() == {"cat": 0.3, "dog": 0.25, "cow": 0.3}
    assert detector.min_scores(0.1) == {"cat": 0.1, "dog": 0.1, "cow": 0.1}
    assert detector.predict(photo) == []  # the scores of an untrained model are about 0.01
    least = min(box.score for box in every if box.name == "dog")
    detector.thresholds["dog"] = least
    try:
        assert detector.predict(photo) == [box for box in every if box.name == "dog"]
    finally:
        detector.thresholds["dog"] = 0.25
    assert detector.predict(photo, every[3].score) == every[:4]
    with pytest.raises(ConfigError, match=r"threshold: must be in 0\.\.1, got 30"):
        detector.predict(photo, threshold=30)


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (7, "cannot predict on a int"),
        (None, "cannot predict on a NoneType"),
        (np.zeros((4, 4), np.uint8), r"ndarray of uint8 with shape \(4, 4\)"),
        (np.zeros((4, 4, 3)), r"ndarray of float64 with shape \(4, 4, 3\)"),
        (np.zeros((4, 0, 3), np.uint8), r"shape \(4, 0, 3\)"),
        (torch.zeros(2, 3, 4, 4), r"Tensor of torch.float32 with shape \(2, 3, 4, 4\)"),
        (torch.full((3, 4, 4), 2.0), r"values in 2\.\.2\. Give a path"),
        ((image for image in "ab"), "cannot predict on a generator"),
        (["photo.png", 7], "cannot predict on a int"),
    ],
    ids=range(9),
)
def test_inputs_that_are_not_images_are_type_errors_that_list_the_types(
    detector: Detector, image: Any, words: str
) -> None:
    with pytest.raises(TypeError, match=words) as caught:
        detector.predict(image)
    assert "an RGB array [H,W,3] of uint8" in str(caught.value)


def test_a_file_that_cannot_be_read_is_named(detector: Detector, photo: Path) -> None:
    with pytest.raises(DataError, match=r"none\.jpg: cannot be read .*Check the file"):
        detector.predict([photo, "none.jpg"])
    broken = photo.with_name("broken.png")
    broken.write_bytes(photo.read_bytes()[:200])
    with pytest.raises(DataError, match=r"broken\.png: cannot be read"):
        detector.predict(Image.open(broken))


def test_predicting_prints_nothing(
    detector: Detector, photo: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    detector.predict([photo, photo])
    with pytest.raises(DataError):
        detector.predict("none.jpg")
    assert capsys.readouterr() == ("", "")


def test_options_replace_those_of_the_checkpoint(content: dict[str, Any], tmp_path: Path) -> None:
    source = Path(save(content, tmp_path))
    detector = Detector.load(source, device="cpu", eval_scale=96, nms_iou=0.5, num_select=300)
    assert (detector.data.eval_scale, detector.data.max_size) == (96, 1333)
    assert (detector.data.nms_iou, detector.data.num_select) == (0.5, 300)
    with pytest.raises(ConfigError, match="nms_iou"):
        Detector.load(source, device="cpu", nms_iou=1.5)
    with pytest.raises(ConfigError, match="checkpoint: give a file"):
        Detector.load("")


@pytest.mark.long
def test_a_checkpoint_of_before_keeps_100_detections_unless_told_otherwise(
    content: dict[str, Any], tmp_path: Path, photo: Path
) -> None:
    config = copy.deepcopy(content["config"])
    del config["data"]["num_select"]
    del config["optim"]["max_hours"]
    source = save(content, tmp_path, config=config)
    assert Detector.load(source, device="cpu").data.num_select == 100
    every, few = (
        Detector.load(source, device="cpu", eval_scale=64, num_select=number).predict(photo, 0.0)
        for number in (300, 4)
    )
    assert len(every) == 6 * 3  # queries x classes
    assert few == every[:4]


def test_evaluation_needs_both_images_and_annotations(detector: Detector, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="images and annotations: give both"):
        detector.evaluate(images=tmp_path)
    with pytest.raises(DataError, match="val data"):
        detector.evaluate()
