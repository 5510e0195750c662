"""Weights from anywhere: our checkpoints, others' files, Hugging Face folders and the hub."""

import argparse
import contextlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from models.weights import detr, grounding_dino, hugging_face
from models.weights.folder import DESCRIPTION, WEIGHTS, read_json
from models.weights.layouts import LAYOUTS, Converted, from_official_keys
from models.weights.official import (
    check_sizes,
    complete_heads,
    is_deformable_detr,
    official_classes,
    official_options,
)
from models.weights.unwrap import find_weights, keys_of, largest_state_dict
from util.classes import Classes
from util.console import log
from util.errors import CheckpointError, brief
from util.tensor_files import load_safely

Triple = tuple[float, float, float]
_LARGEST_VALUE = 1e6  # of a mean or deviation, which are in 0..1 or, of some networks, in 0..255
# What is in every Deformable DETR, and little else; a class head may be stored in one place only.
_EXPECTED = (
    "transformer.level_embed",
    "class_embed.0.bias",
    "transformer.decoder.class_embed.0.bias",
    "transformer.encoder.layers.0.self_attn.sampling_offsets.weight",
    "input_proj.0.0.weight",
)
_IN_RESNETS = ("layer1.0.conv1.weight", "res2.0.conv1.weight", "res2_0_branch2a_w")
_OF_TEXTS = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "special_tokens_map.json")
_USUAL_PLACES = ("", "'model'")  # where the official code saves them
# Kind of a Hugging Face folder -> what reads its config and its weights.
_FOLDERS = {
    "detr": (detr.config_options, detr.from_hugging_face),
    grounding_dino.MODEL_TYPE: (grounding_dino.config_options, grounding_dino.to_ours),
}
_USUAL_FOLDER = (hugging_face.config_options, hugging_face.to_official)
_WEIGHT_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt", ".pkl", ".safetensors")


@dataclass(frozen=True)
class Pretrained:
    """Weights with all that is needed to use them.

    `state_dict` has official keys, and those of recipes for what only trains. `model_options` holds
    `ModelConfig` values as far as the source says. `config` is the saved configuration of our own
    files. `image_mean` and `image_std` are per channel, in 0..1; `image_size` is (short side,
    maximum long side) in pixels; None where the source does not say. `thresholds`, of our own
    files, has the best score threshold by class name, of classes that have one. `other_backbone`
    names that of the source if it is none of ours; its weights are then left out.
    """

    kind: Literal["ours", "official", "hugging_face"]
    state_dict: dict[str, Tensor]
    model_options: dict[str, Any]
    classes: Classes
    config: dict[str, Any] | None = None
    image_mean: Triple | None = None
    image_std: Triple | None = None
    image_size: tuple[int, int] | None = None
    thresholds: Mapping[str, float] = field(default_factory=dict)
    other_backbone: str = ""


def load_pretrained(source: str, *, ema: bool = True) -> Pretrained:
    """Read weights from a file, a Hugging Face folder, or `hf:NAME` on its hub.

    Of a run that averaged its weights, `ema` takes the averages.

    Raises:
        CheckpointError: the source is missing, cannot be reached, is damaged, or holds no
            Deformable DETR.
    """
    place = local_place(source)
    return _from_folder(place, source) if place.is_dir() else _from_file(place, ema=ema)


def local_place(source: str) -> Path:
    """Return the file or folder, that of `hf:NAME` after a download.

    Raises:
        CheckpointError: it cannot be downloaded.
    """
    path = Path(source)
    is_hub_name = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source)
    if source.startswith("hf:") or (
        is_hub_name and not path.exists() and path.suffix not in _WEIGHT_SUFFIXES
    ):
        return _download(source.removeprefix("hf:"), source)
    if path.name == WEIGHTS and (path.parent / DESCRIPTION).is_file():
        path = path.parent  # which says what the weights are of
    return path


def _from_file(path: Path, *, ema: bool) -> Pretrained:
    content = load_safely(path)
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{path}: holds a {type(content).__name__}, not a checkpoint. "
            "Pass our checkpoint, an official file or a state dict."
        )
    config = content.get("config")  # other files may hold one of any kind
    sections = isinstance(config, Mapping) and isinstance(config.get("model"), Mapping)
    if "model" in content and (sections or {"config", "classes"} <= content.keys()):
        with _parts_of(path, "checkpoint of a run"):
            return _ours(content, str(path), ema=ema)
    found = find_weights(content, _EXPECTED, str(path), ema=ema)
    args = content.get("args")
    args = args if isinstance(args, argparse.Namespace) else None
    if found is None:
        for layout in LAYOUTS:
            if other := find_weights(content, layout.expected, str(path), ema=ema):
                log.info(f"{path}: weights in the layout of {layout.program}")
                with _parts_of(path, f"checkpoint of {layout.program}"):
                    return _official(layout.convert(other.tensors, content, str(path)), args, path)
    weights = found.tensors if found else largest_state_dict(content)
    if not weights:
        raise CheckpointError(
            f"{path}: holds no weights; its keys are {keys_of(content)}. Pass our checkpoint, an "
            "official file or a state dict."
        )
    if "model.level_embed" in weights:
        if (path.parent / "config.json").is_file():
            return _from_folder(path.parent, str(path))
        raise CheckpointError(
            f"{path}: there is no config.json beside these Hugging Face weights. "
            "Pass the folder that save_pretrained() wrote."
        )
    if found and found.place not in _USUAL_PLACES:
        log.info(f"{path}: weights of Deformable DETR found in it: {found.place}")
    _check_detector(weights, path)
    with _parts_of(path, "checkpoint"):
        converted = from_official_keys(weights, vars(args) if args else {}, str(path))
        return _official(converted, args, path)


@contextlib.contextmanager
def _parts_of(path: Path, expected: str) -> Iterator[None]:
    """Report in one line that a part is not what it should be."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path}: is not a valid {expected} ({type(error).__name__}: {str(error)[:100]}). "
            "Use another, or weights alone."
        ) from error


def _ours(content: Mapping[str, Any], source: str, *, ema: bool) -> Pretrained:
    preprocessing = content.get("preprocessing") or {}
    config = {title: dict(options) for title, options in content["config"].items()}
    averages = content.get("ema")
    weights = _tensors(averages["model"] if ema and averages else content["model"])
    classes = content.get("classes")
    check_sizes(weights, config["model"], source)
    return Pretrained(
        "ours",
        weights,
        model_options=config["model"],
        classes=Classes.from_json(classes) if classes else official_classes(weights),
        config=config,
        image_mean=_triple(preprocessing.get("mean")),
        image_std=_deviations(preprocessing.get("std")),
        thresholds=_thresholds(content),
    )


def _thresholds(content: Mapping[str, Any]) -> dict[str, float]:
    found = content.get("thresholds") or {}
    return {str(name): float(score) for name, score in found.items()}


def _tensors(found: Mapping[Any, Any]) -> dict[str, Tensor]:
    """Return a state dict, after checking what it holds.

    Raises:
        TypeError: something in it is no tensor, or has no name.
    """
    for name, tensor in found.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise TypeError(f"{brief(name)} is {brief(type(tensor).__name__)}, not a tensor")
    return dict(found)


def _check_detector(weights: Mapping[str, Tensor], source: Path) -> None:
    if not is_deformable_detr(weights):
        backbone = any(key.endswith(_IN_RESNETS) for key in weights)
        hint = (
            "A backbone alone is given as `backbone_weights`."
            if backbone
            else "Other models cannot be loaded."
        )
        raise CheckpointError(
            f"{source}: these are not weights of Deformable DETR. Keys found: {keys_of(weights)}; "
            f"expected: {keys_of(_EXPECTED)}. {hint}"
        )


def _official(converted: Converted, args: argparse.Namespace | None, source: Path) -> Pretrained:
    _check_levels(converted.weights, source)
    options = official_options(converted.weights, args, str(source)) | converted.options
    complete = complete_heads(converted.weights, options)
    return Pretrained(
        "official", complete, options, converted.classes or official_classes(complete)
    )


def _check_levels(weights: Mapping[str, Tensor], source: Path) -> None:
    """Refuse models that also take the backbone's map of stride 4."""
    projections = [t for k, t in weights.items() if re.fullmatch(r"input_proj\.\d+\.0\.weight", k)]
    maps = sum(tensor.shape[-1] == 1 for tensor in projections)
    if maps not in (0, 1, 3):
        raise CheckpointError(
            f"{source}: takes {maps} feature maps of the backbone; only the last three, or the "
            "last, are supported. Use weights of a model with 4 scales."
        )


def _from_folder(folder: Path, source: str) -> Pretrained:
    described = read_json(folder / DESCRIPTION) if (folder / DESCRIPTION).is_file() else {}
    with _parts_of(folder / DESCRIPTION, "description of a model"):
        if "model" in described.get("config", {}):
            weights = load_safely(folder / WEIGHTS)
            return _ours({**described, "model": weights}, source, ema=False)
    pretrained = _of_transformers(folder, source)
    with _parts_of(folder / DESCRIPTION, "description of a model"):
        return _described(pretrained, described)


def _described(pretrained: Pretrained, described: Mapping[str, Any]) -> Pretrained:
    """Add what `push` wrote about a model, unless its weights have changed since."""
    classes = Classes.from_json(described["classes"]) if described else None
    if classes is None or len(classes) != len(pretrained.classes):
        return pretrained
    saved = described["config"]
    config = {"data": dict(saved["data"]), "tiles": dict(saved.get("tiles", {}))}
    return replace(pretrained, classes=classes, config=config, thresholds=_thresholds(described))


def _of_transformers(folder: Path, source: str) -> Pretrained:
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{source}: is not a Hugging Face folder: it has no config.json. "
            "For a training run, name its best.pth or last.pth."
        )
    files = [folder / name for name in (WEIGHTS, "pytorch_model.bin")]
    file = next((f for f in files if f.is_file()), None)
    if file is None:
        raise CheckpointError(
            f"{source}: has neither model.safetensors nor pytorch_model.bin. "
            "Save the model again with save_pretrained()."
        )
    config = read_json(folder / "config.json")
    kind = config.get("model_type")
    prompted = kind == grounding_dino.MODEL_TYPE
    with _parts_of(folder / "config.json", "Hugging Face model description"):
        read, convert = _FOLDERS.get(str(kind), _USUAL_FOLDER)
        options = read(config, source)
    with _parts_of(file, "state dict of Hugging Face"):
        weights = convert(_tensors(load_safely(file)), options, source)
    if not prompted and not is_deformable_detr(weights):
        raise CheckpointError(
            f"{source}: holds the bare model, without detection heads. "
            "Save the one for object detection instead."
        )
    with _parts_of(folder / "config.json", "Hugging Face model description"):
        count = 0 if prompted else len(weights["class_embed.0.bias"])
        classes = hugging_face.config_classes(config, count)
    processor = folder / "preprocessor_config.json"
    preprocessing = read_json(processor) if processor.is_file() else {}
    with _parts_of(processor, "Hugging Face preprocessing description"):
        return Pretrained(
            "hugging_face",
            weights,
            options,
            classes,
            image_mean=_triple(preprocessing.get("image_mean")),
            image_std=_deviations(preprocessing.get("image_std")),
            image_size=_image_size(preprocessing),
            other_backbone="Hugging Face's" if prompted else "",
        )


def _download(name: str, source: str) -> Path:
    from huggingface_hub import snapshot_download  # slow to import

    described = [DESCRIPTION, "config.json", "preprocessor_config.json", *_OF_TEXTS]
    try:
        folder = Path(snapshot_download(name, allow_patterns=[*described, WEIGHTS]))
        if not (folder / WEIGHTS).is_file():
            folder = Path(snapshot_download(name, allow_patterns=[*described, "pytorch_model.bin"]))
    except Exception as error:  # the client and its transports share no base class
        local = "" if source.startswith("hf:") else "no such file or folder here, and "
        reason = " ".join(str(error).split()).split(". ")[0][:120]
        raise CheckpointError(
            f"{source}: {local}it cannot be downloaded from the Hugging Face hub "
            f"({type(error).__name__}: {reason}). Check the name and the network, or download the "
            "repository elsewhere and pass its folder."
        ) from error
    return folder


def _triple(values: Any) -> Triple | None:
    if not values:
        return None
    red, green, blue = map(float, values)
    if not max(abs(red), abs(green), abs(blue)) < _LARGEST_VALUE:
        raise ValueError(f"{brief(values)} is no colour")
    return red, green, blue


def _deviations(values: Any) -> Triple | None:
    found = _triple(values)
    if found and min(found) <= 0:
        raise ValueError(f"{brief(values)} is no deviation")
    return found


def _image_size(preprocessing: Mapping[str, Any]) -> tuple[int, int] | None:
    size = preprocessing.get("size")
    if not isinstance(size, Mapping):  # the short side alone, as old versions wrote it
        size = {"shortest_edge": size, "longest_edge": preprocessing.get("max_size", 1333)}
    short, long = size.get("shortest_edge"), size.get("longest_edge")
    return (int(short), int(long)) if short and long else None
