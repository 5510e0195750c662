"""A detector that is loaded, used and measured in a line each; `predict` and `eval` use it too."""

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from configs.load import Given
from configs.schema import Config, DataConfig
from configs.tiles import TileOptions
from datasets.build import build_dataset, build_transform, load_index, tiling_of
from datasets.dataset import CocoDetection, ImageList, ImageSource
from datasets.eval_loader import eval_loader
from datasets.images import limit_pixels
from datasets.tile_batches import TileBatches
from datasets.tiled import cut_index
from datasets.tiles import Tiling, tiles_of
from datasets.workers import loader_processes
from engine.claims import check_claims
from engine.evaluation.evaluate import detect, evaluate
from engine.evaluation.evaluator import Backend, EvalResult, Evaluator
from engine.evaluation.matching import Truth
from engine.evaluation.tiling import by_image
from engine.explain.explanation import Choice, Explanation, explain
from engine.exported.model import ExportedModel, is_exported, open_exported
from engine.optim import Precision
from models.build import build_model
from models.deformable_detr import DeformableDETR
from models.postprocess import PostProcess
from models.recipes import KnownRecipes
from models.weights.load import Pretrained, load_pretrained
from models.weights.transfer import RECIPES, load_strict
from util.batch import Batch
from util.classes import Classes
from util.console import console
from util.device import pick_device
from util.errors import CheckpointError, ConfigError, DataError, brief
from util.world import World

DEFAULT_THRESHOLD = 0.3  # of classes for which the checkpoint has none
_LARGEST_BATCH = 65536  # that a checkpoint may ask for

AnyImage = str | os.PathLike[str] | Image.Image | NDArray[np.uint8] | Tensor


@dataclass(frozen=True)
class Box:
    """A detected object.

    `score` is in 0..1; `xyxy` are the left, top, right and bottom edges in pixels of the upright
    original image, not clipped to it.
    """

    name: str
    category_id: int
    score: float
    xyxy: tuple[float, float, float, float]


class Detector:
    """A model with what it needs to turn images into named boxes.

    `thresholds` has the best score threshold by class name, of classes for which one is known.
    `data` holds the data options of the model's training run: the image size, which detections are
    kept, and where the run's validation data is. `tiles` says how large images are cut, as in that
    run if it was trained on tiles. `mean` and `std` are per channel, in 0..1.
    """

    def __init__(
        self,
        model: DeformableDETR | ExportedModel,
        classes: Classes,
        *,
        data: DataConfig,
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device,
        thresholds: Mapping[str, float] | None = None,
        batch_size: int = 1,
        tiles: TileOptions | None = None,
    ) -> None:
        self.network = model.to(device).eval()
        self.classes = classes
        self.data = data
        self.mean, self.std = mean, std
        self.device = device
        self.thresholds = dict(thresholds or {})
        self.batch_size = batch_size
        self.tiles = tiles or TileOptions()

    @classmethod
    def load(
        cls,
        source: str | os.PathLike[str],
        *,
        device: str | torch.device = "auto",
        ema: bool = True,
        eval_scale: int | None = None,
        max_size: int | None = None,
        num_select: int | None = None,
        nms_iou: float | None = None,
        max_pixels: int | None = None,
        prompt: str = "",
    ) -> "Detector":
        """Load our own checkpoint, an official file, a Hugging Face folder, or `hf:NAME`.

        Also a file that `export` has written, which runs on the CPU in a runtime of its own.

        `ema` takes the averaged weights, where there are any. The five after it replace what the
        checkpoint says: the short side and the maximum long side of an image in pixels, the
        detections kept per image, the NMS IoU threshold (1 disables NMS), and the pixels of the
        largest image that is read. A Grounding DINO finds what `prompt` names, phrases with dots
        between them: `kettle . mug`.

        Raises:
            CheckpointError: the source cannot be read, or does not say what model it is of.
            ConfigError: the device cannot be used, or a value is out of range.
        """
        source = os.fspath(source)
        if not source:
            raise ConfigError("checkpoint: give a file, a Hugging Face folder or hf:NAME.")
        replaced = {
            "eval_scale": eval_scale,
            "max_size": max_size,
            "num_select": num_select,
            "nms_iou": nms_iou,
            "max_pixels": max_pixels,
        }
        given = Given(
            {"data": {name: value for name, value in replaced.items() if value is not None}},
            KnownRecipes(),
        )
        if is_exported(source):
            if prompt:
                raise ConfigError("prompt: an exported file reads none. Leave it out.")
            return cls._of_exported(source, given)
        device = pick_device(str(device))
        pretrained = load_pretrained(source, ema=ema)
        _check_known(pretrained, prompt, source)
        config = given.on(_options_of(pretrained, given, source)).config()
        model, classes = _built(pretrained, config, prompt, source)
        optim = (pretrained.config or {}).get("optim", {})
        return cls(
            model,
            classes,
            data=config.data,
            mean=pretrained.image_mean or model.backbone.mean,
            std=pretrained.image_std or model.backbone.std,
            device=device,
            thresholds=pretrained.thresholds,
            batch_size=_batch_size(optim.get("eval_batch_size") or optim.get("batch_size")),
            tiles=config.tiles,
        )

    @classmethod
    def _of_exported(cls, source: str, given: Given) -> "Detector":
        network = open_exported(source)
        about = network.about
        saved = saved_options(given, {"data": about.data, "tiles": about.tiles}, source)
        config = given.on(saved).config()
        return cls(
            network,
            about.classes,
            data=config.data,
            mean=about.mean,
            std=about.std,
            device=torch.device("cpu"),
            thresholds=about.thresholds,
            batch_size=_batch_size(about.batch_size),
            tiles=config.tiles,
        )

    @property
    def model(self) -> DeformableDETR:
        """The PyTorch module.

        Raises:
            ConfigError: there is none: this detector is an exported file.
        """
        if isinstance(self.network, ExportedModel):
            raise ConfigError(
                "checkpoint: an exported file has no PyTorch module. Load the checkpoint that it "
                "was made of."
            )
        return self.network

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the classes it detects; a class without a name goes by its id."""
        return tuple(
            self.classes.shown(label)
            for label in range(len(self.classes))
            if self.classes.in_use(label)
        )

    @property
    def tiling(self) -> Tiling | None:
        """How large images are cut, None if they stay whole."""
        return tiling_of(self.tiles, self.data.eval_scale)

    def take(self, given: Given) -> None:
        """Put options of data and tiles on those of the checkpoint.

        Raises:
            ConfigError: two options contradict each other.
        """
        own = Given({"data": asdict(self.data), "tiles": asdict(self.tiles)})
        config = given.on(own).config()
        self.data, self.tiles = config.data, config.tiles

    @property
    def postprocess(self) -> PostProcess:
        """What turns the network's outputs into boxes in pixels."""
        chosen = self.data.num_select, self.data.nms_iou
        if isinstance(self.network, ExportedModel):
            return self.network.postprocess(*chosen)
        return PostProcess(max_detections=chosen[0], nms_iou=chosen[1])

    def min_scores(self, threshold: float | None = None) -> dict[str, float]:
        """Return the score from which on each class's boxes count, by name.

        That is `threshold` or, by default, what is best for a class, or 0.3 where that is unknown.
        """
        if threshold is not None:
            return dict.fromkeys(self.names, threshold)
        return {name: self.thresholds.get(name, DEFAULT_THRESHOLD) for name in self.names}

    @overload
    def predict(
        self, images: AnyImage, threshold: float | None = None, *, batch_size: int = 1
    ) -> list[Box]: ...

    @overload
    def predict(
        self,
        images: list[Any] | tuple[Any, ...],
        threshold: float | None = None,
        *,
        batch_size: int = 1,
    ) -> list[list[Box]]: ...

    def predict(
        self, images: Any, threshold: float | None = None, *, batch_size: int = 1
    ) -> list[Box] | list[list[Box]]:
        """Return the boxes of an image, best first, or a list of them for a list of images.

        An image is a path, a Pillow image, an RGB array [H,W,3] uint8, or an RGB tensor [3,H,W],
        uint8 or float in 0..1. Files and Pillow images are turned upright. `threshold` is the
        minimum score; by default that of each class in the checkpoint, else 0.3. Images of one
        size are computed `batch_size` at once; large ones are cut as `tiling` says.

        Raises:
            DataError: an image cannot be read.
            TypeError: something is not an image.
        """
        if threshold is not None and not 0 <= threshold <= 1:
            raise ConfigError(f"threshold: must be in 0..1, got {threshold}.")
        many = isinstance(images, (list, tuple))
        sources = [_image_source(image) for image in (images if many else [images])]
        min_scores = self.min_scores(threshold)
        found = {
            i: [box for box in boxes if box.score >= min_scores[box.name]]
            for i, boxes in self.detect(
                sources, batch_size=batch_size, skip_unreadable=False, tiling=self.tiling
            )
        }
        return [found[i] for i in range(len(sources))] if many else found[0]

    def detect(
        self,
        images: Sequence[ImageSource],
        *,
        batch_size: int = 1,
        num_workers: int = 0,
        skip_unreadable: bool = True,
        description: str | None = None,
        tiling: Tiling | None = None,
    ) -> Iterator[tuple[int, list[Box]]]:
        """Yield the position of each image and its boxes of every score, best first.

        Images of one size come together, large ones first. With a `description`, a progress bar
        is shown. With `tiling`, large images are cut, `batch_size` tiles are computed at once, and
        an image has as many boxes as its tiles have.

        Raises:
            DataError: an image cannot be read, unless those are skipped.
        """
        limit_pixels(self.data.max_pixels)
        dataset = ImageList(
            images, build_transform(self.data, train=False, mean=self.mean, std=self.std)
        )
        batches: Iterable[Batch]
        if tiling is None:
            batches = eval_loader(dataset, batch_size=batch_size, num_workers=num_workers)
        else:
            batches = TileBatches(dataset, tiling, batch_size=batch_size)
        results = detect(
            self.network,
            self.postprocess,
            batches,
            device=self.device,
            description=description,
            skip_unreadable=skip_unreadable,
        )
        for target, detection in by_image(results, tiling):
            columns = (detection[key].tolist() for key in ("labels", "scores", "boxes"))
            yield (
                int(target["image_id"]),
                [
                    Box(
                        self.classes.shown(label),
                        self.classes.ids[label],
                        score,
                        tuple(corners),
                    )
                    for label, score, corners in zip(*columns, strict=True)
                    if self.classes.in_use(label)  # some labels stand for no class
                ],
            )

    def explain(
        self,
        image: AnyImage,
        threshold: float | None = None,
        *,
        box: int | None = None,
        query: int | None = None,
        point: tuple[float, float] | None = None,
        class_name: str | None = None,
        count: int = 5,
        token: tuple[float, float, int] | None = None,
    ) -> Explanation:
        """Return where the model looked for what it found in an image, as arrays.

        `image` and `threshold` are as in `predict`. An image that `predict` would cut is refused:
        the model would see the whole of it here, and find other boxes. By default the best `count`
        boxes are explained. `box` chooses one by its position in what `predict` returns, `point`,
        (x, y) in pixels, the smallest box around it, and `query` one by its query, whatever its
        score; `class_name` leaves only detections of a class. With `token`, (x, y) in pixels and a
        level counted from 0, that cell of the encoder's feature maps is explained as well.

        Raises:
            ConfigError: nothing is there to choose, the encoder has no sampling points, or the
                image would be cut.
            DataError: the image cannot be read.
            TypeError: it is not an image.
        """
        choice = Choice(box, query, point, class_name, count, token)
        model = self.model  # an exported file has none
        limit_pixels(self.data.max_pixels)
        images = ImageList(
            [_image_source(image)],
            build_transform(self.data, train=False, mean=self.mean, std=self.std),
        )
        tiles = 1 if self.tiling is None else len(tiles_of(*images.image_sizes()[0], self.tiling))
        if tiles > 1:
            raise ConfigError(
                f"tile: this image is cut into {tiles} tiles, and only a whole image can be "
                "explained. Give a part of it, or the whole by `no_tile`."
            )
        return explain(
            model,
            self.postprocess,
            images,
            choice,
            device=self.device,
            classes=self.classes,
            min_scores=self.min_scores(threshold),
        )

    def evaluate(
        self,
        images: str | os.PathLike[str] | None = None,
        annotations: str | os.PathLike[str] | None = None,
        *,
        batch_size: int | None = None,
        precision: str = "fp32",
    ) -> dict[str, float]:
        """Return COCO's 12 numbers by name; NaN where there is nothing to measure on.

        `images` is a folder and `annotations` its COCO-format file; without them the validation
        data of the model's training run is taken.

        Raises:
            DataError: the data cannot be used, or only one of the two is given.
        """
        data = self.data
        if images is not None and annotations is not None:
            data = replace(
                data,
                coco_path="",
                data_path="",
                val_images=os.fspath(images),
                val_annotations=os.fspath(annotations),
            )
        elif images is not None or annotations is not None:
            raise DataError("images and annotations: give both of them, or neither.")
        result, _ = self.measure(
            self.validation_set(data), batch_size=batch_size, precision=precision
        )
        return {name: v if v >= 0 else math.nan for name, v in result.stats.items()}

    def validation_set(self, data: DataConfig, world: World | None = None) -> CocoDetection:
        """Return the validation images that data options name, with the labels of the model.

        Of the processes of `world`, the main one reads the annotations for all.

        Raises:
            DataError: they cannot be used, or have a class that the model lacks.
        """
        index = load_index(data, "val", need_boxes=False, classes=self.classes, world=world)
        dataset = build_dataset(
            data, index, train=False, mean=self.mean, std=self.std, classes=self.classes
        )
        seen = index if self.tiling is None else cut_index(index, self.tiling)
        console(seen.report(self.network.num_queries))
        return dataset

    def measure(
        self,
        dataset: CocoDetection,
        *,
        batch_size: int | None = None,
        precision: str = "fp32",
        world: World | None = None,
        backend: Backend = "fast",
        max_dets: int = 0,
        area_bounds: tuple[float, float] | None = None,
    ) -> tuple[EvalResult, Evaluator]:
        """Evaluate on a data set, each process of `world` on its part of the images.

        Large images are cut as `tiling` says.

        Returns the result, and the evaluator that has collected the detections: of all processes
        in the main one.
        """
        if isinstance(self.network, ExportedModel) and precision != "fp32":
            raise ConfigError(
                f"precision: an exported file computes as it was exported, not in {precision}. "
                "Leave it out."
            )
        world = world or World()
        evaluator = Evaluator(
            Truth.of(dataset.index),
            dataset.label_to_category,
            backend=backend,
            max_dets=max_dets,
            area_bounds=area_bounds,
        )
        share: dict[str, Any] = {"rank": world.rank, "world_size": world.size}
        batch_size = batch_size or self.batch_size
        workers = loader_processes(self.data.num_workers, local_size=world.local_size)
        batches: Iterable[Batch]
        tiling = self.tiling
        if tiling is None:
            batches = eval_loader(dataset, batch_size=batch_size, num_workers=workers, **share)
        else:
            batches = TileBatches(dataset, tiling, batch_size=batch_size, **share)
        result, _ = evaluate(
            self.network,
            self.postprocess,
            batches,
            evaluator,
            device=self.device,
            autocast=Precision(precision, self.device).autocast,
            world=world,
            tiling=tiling,
        )
        return result, evaluator


def _check_known(pretrained: Pretrained, prompt: str, source: str) -> None:
    """Refuse weights without a backbone that is known, and those that a prompt does not fit.

    Raises:
        CheckpointError: they are such.
    """
    if bool(pretrained.other_backbone) != bool(prompt):
        raise CheckpointError(
            f"{source}: is not a Grounding DINO, which alone reads prompts. Leave `prompt` out."
            if prompt
            else f"{source}: is a Grounding DINO, which finds what a text names. Use `predict` "
            "with `prompt`, or train a detector from it with `finetune`."
        )
    if "backbone" not in pretrained.model_options:
        raise CheckpointError(
            f"{source}: these weights come without options, and their backbone is not a "
            "torchvision ResNet, so it is not known which. Use the whole checkpoint they come "
            "from."
        )


def _built(
    pretrained: Pretrained, config: Config, prompt: str, source: str
) -> tuple[DeformableDETR, Classes]:
    """Return a model with weights that were read, and its classes or what a prompt names."""
    check_claims(config.model, pretrained.state_dict, source, recipes=config.recipes)
    if prompt:
        from engine.prompted import prompted_model  # for prompts alone

        return prompted_model(source, pretrained, config.model, prompt)
    classes, weights = pretrained.classes, pretrained.state_dict
    model = build_model(config.model, num_classes=len(classes), recipes=config.recipes)
    if pretrained.config is None:  # of others' files, what only trains has no place here
        weights = {k: tensor for k, tensor in weights.items() if not k.startswith(RECIPES)}
    load_strict(model, weights, source)
    return model, classes


def _options_of(pretrained: Pretrained, given: Given, source: str) -> Given:
    """Return the options that weights come with, as far as a detector reads them.

    The other sections are left out: they may be of a newer version.
    """
    saved = pretrained.config or {}
    size = dict(zip(("eval_scale", "max_size"), pretrained.image_size or (), strict=False))
    content = {
        "model": pretrained.model_options,
        "data": saved.get("data", size),
        "tiles": saved.get("tiles", {}),
        "recipes": saved.get("recipes", {}),
    }
    return saved_options(given, content, source)


def _image_source(image: Any) -> ImageSource:
    """Check that something is an image, and return a tensor for an array or tensor.

    Raises:
        TypeError: it is not.
    """
    if isinstance(image, (str, os.PathLike)):
        return Path(image)
    if isinstance(image, Image.Image):
        return image
    got = type(image).__name__
    if isinstance(image, (np.ndarray, Tensor)):
        got += f" of {image.dtype} with shape {tuple(image.shape)}"
        if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.shape[2:] == (3,):
            image = torch.from_numpy(image.copy()).permute(2, 0, 1)  # a view may run backwards
        if isinstance(image, Tensor) and image.ndim == 3 and len(image) == 3 and image.numel():
            pixels = image.detach().cpu()
            if pixels.dtype == torch.uint8:
                return pixels
            if pixels.is_floating_point() and pixels.min() >= 0 and pixels.max() <= 1:
                return (pixels.float() * 255).round().to(torch.uint8)
            got += f" and values in {pixels.min():.3g}..{pixels.max():.3g}"
    raise TypeError(
        f"cannot predict on a {got}. Give a path, a Pillow image, an RGB array [H,W,3] of uint8, "
        "an RGB tensor [3,H,W] of uint8 or of floats in 0..1, or a list of these."
    )


def _batch_size(saved: object) -> int:
    """Return the batch size that a checkpoint names, 1 where that makes no sense."""
    return saved if type(saved) is int and 0 < saved <= _LARGEST_BATCH else 1


def saved_options(given: Given, values: Mapping[str, Any], source: str) -> Given:
    """Return options as a checkpoint holds them, for others that are given on top.

    Raises:
        CheckpointError: one is unknown here, or of another type, or a recipe is not registered.
    """
    recipes = values.get("recipes")
    for name in recipes if isinstance(recipes, Mapping) else ():
        if name not in given.recipes:
            raise CheckpointError(
                f"{source}: was trained with the recipe {brief(name)}, which is not registered "
                "here. Add its file and its line in `RECIPES` (docs/extending.md)."
            )
    try:
        return given.saved(values, source)
    except ConfigError as error:
        raise CheckpointError(
            f"{str(error).partition(' Known: ')[0]} The checkpoint may come from a newer version."
        ) from error
