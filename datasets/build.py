"""Turn data options into data sets."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Literal

import numpy as np

from configs.schema import AnnotationOptions, DataConfig
from configs.tiles import TileOptions, TrainTileOptions
from datasets.checks.findings import SplitReport, first_few
from datasets.dataset import CocoDetection, ImageCache
from datasets.formats.coco import read_coco_file
from datasets.formats.coco_layouts import find_coco
from datasets.formats.detect import Located, locate
from datasets.formats.registry import FORMATS, Reading, Source
from datasets.formats.stamps import Stamp
from datasets.images import limit_pixels
from datasets.index import CocoIndex
from datasets.mixing import Affine, Mixing
from datasets.sample import CHANNELS, mean_colour
from datasets.split import BatchSplit
from datasets.tiled import TileDetection, TiledIndex, cut_index
from datasets.tiles import Tiling
from datasets.transforms import EvalTransform, TrainTransform, Transform
from util.classes import Classes
from util.console import console
from util.errors import ConfigError, DataError
from util.main_process import from_main
from util.world import World

Split = Literal["train", "val"]


def read_split(cfg: DataConfig, split: Split) -> Source:
    """Read a split's data, of whatever format, unchecked.

    From here on, images are read up to the size that `max_pixels` says.

    `train_images` and `train_annotations` (or `val_...`) override `data_path`, which overrides
    `coco_path`.

    Raises:
        ConfigError: there is no such data format.
        DataError: see `data_paths`, `locate` and `read_source`.
    """
    limit_pixels(cfg.max_pixels)
    located = _locate(cfg, split)
    if located is None:
        source = read_coco_file(*data_paths(cfg, split))
    else:
        options = format_options(cfg, located.data_format)
        source = located.read(getattr(cfg, f"{split}_split"), **options)
    return replace(source, reading=reading_of(cfg))


def reading_of(cfg: AnnotationOptions) -> Reading:
    """Return what flags of annotations mean."""
    return Reading(cfg.crowd, cfg.ignore_key)


def format_options(cfg: object, data_format: str) -> dict[str, str]:
    """Return the options of a data format, from a config that has them.

    Raises:
        ConfigError: there is no such data format.
    """
    return {name: getattr(cfg, name) for name in FORMATS[data_format].options}


def _locate(cfg: DataConfig, split: Split) -> Located | None:
    """Return where `data_path` has a split and in which format, None where it does not count."""
    if not cfg.data_path or any(_explicit_paths(cfg, split)):
        return None
    return locate(Path(cfg.data_path), cfg.data_format)


def _explicit_paths(cfg: DataConfig, split: Split) -> tuple[str, str]:
    return getattr(cfg, f"{split}_images"), getattr(cfg, f"{split}_annotations")


def data_paths(cfg: DataConfig, split: Split) -> tuple[Path, Path]:
    """Return the annotation file and the image folder of a split in COCO's format.

    `train_images` and `train_annotations` (or `val_...`) override `data_path`, which overrides
    `coco_path`.

    Raises:
        DataError: no option says where the data is, or only one of the two.
    """
    images, annotations = _explicit_paths(cfg, split)
    if bool(images) != bool(annotations):
        given, lacking = ("images", "annotations") if images else ("annotations", "images")
        raise DataError(f"`{split}_{given}`: needs `{split}_{lacking}` too. Set both.")
    if images:
        return Path(annotations), Path(images)
    if cfg.data_path:
        return find_coco(Path(cfg.data_path), getattr(cfg, f"{split}_split"))
    if cfg.coco_path:
        return find_coco(Path(cfg.coco_path), split)
    raise DataError(
        f"{split} data: no option says where it is. Set `coco_path`, or `{split}_images` and "
        f"`{split}_annotations`, or `data_path`."
    )


def build_transform(
    cfg: DataConfig,
    *,
    train: bool,
    mean: Sequence[float],
    std: Sequence[float],
    epochs: int | None = 0,
) -> Transform:
    """Return the preparation of images for evaluation, or for a training of `epochs` epochs."""
    if not train:
        return EvalTransform(
            eval_scale=cfg.eval_scale, max_size=cfg.max_size, mean=tuple(mean), std=tuple(std)
        )
    start, _, last = phases(cfg, epochs)
    return TrainTransform(
        train_scales=(cfg.eval_scale,) if cfg.augment == "none" else cfg.train_scales,
        max_size=cfg.max_size,
        hflip=cfg.hflip,
        random_crop=cfg.random_crop,
        crop_scales=cfg.crop_scales,
        crop_size=cfg.crop_size,
        one_scale_per_batch=cfg.one_scale_per_batch,
        mean=tuple(mean),
        std=tuple(std),
        scale_jitter=cfg.scale_jitter,
        zoom_out=cfg.zoom_out,
        color_jitter=cfg.color_jitter,
        fixed_size=cfg.fixed_size,
        strong_epochs=range(start, last) if cfg.augment_phases else None,
    )


def build_mixing(cfg: DataConfig, *, mean: Sequence[float], epochs: int | None) -> Mixing | None:
    """Return what makes one image of several in a training of `epochs` epochs, if anything does."""
    if not (cfg.mosaic or cfg.mixup or cfg.copy_blend):
        return None
    start, until, last = phases(cfg, epochs)
    return Mixing(
        mosaic=cfg.mosaic,
        mixup=cfg.mixup,
        until=until,
        copy_blend=cfg.copy_blend,
        paste_until=last,
        since=start,
        affine=Affine(*cfg.mosaic_affine) if cfg.mosaic_affine else None,
        fill=mean_colour(mean),
    )


def phases(cfg: DataConfig, epochs: int | None) -> tuple[int, int, int]:
    """Return the first epoch with strong augmentation, the first after mosaics, and after all.

    Without `augment_phases`, `close_augment_epochs` says when all that mixes images ends; where
    the number of epochs is not known, `CocoDetection.mix_until` will.

    Raises:
        ConfigError: `augment_phases` are parts of an unknown number.
    """
    if epochs is None:
        if cfg.augment_phases:
            raise ConfigError(
                "augment_phases: are shares of the epochs, whose number `max_hours` leaves open. "
                "Give `epochs` instead, or leave `augment_phases` empty for "
                "`close_augment_epochs`."
            )
        return 0, sys.maxsize, sys.maxsize
    if not cfg.augment_phases:
        until = epochs - cfg.close_augment_epochs
        return 0, until, until
    start, until, last = (round(share * epochs) for share in cfg.augment_phases)
    return start, until, last


def load_index(
    cfg: DataConfig,
    split: Split,
    *,
    need_boxes: bool = True,
    classes: Classes | None = None,
    world: World | None = None,
) -> CocoIndex:
    """Read and check a split's annotations; without `need_boxes` there may be none.

    `classes` are the categories of a COCO-format file that has none. Of the processes of `world`,
    the main one reads, and all get the same.

    Raises:
        DataError: see `read_split` and `CocoIndex.from_source`; or the images are not on this
            process's machine.
    """
    world = world or World()
    limit_pixels(cfg.max_pixels)
    index = from_main(
        world, lambda: _read_index(cfg, split, need_boxes=need_boxes, classes=classes)
    )
    if not world.main and world.local_rank == 0:
        index.require_images()
    if split == "train" and cfg.empty_images < 1:
        whole, index = len(index), index.with_background(cfg.empty_images)
        console(
            f"notice: empty_images {cfg.empty_images:g}: {whole - len(index)} of {whole} training "
            "images are left out: they have no boxes"
        )
    return index


def _read_index(
    cfg: DataConfig, split: Split, *, need_boxes: bool, classes: Classes | None
) -> CocoIndex:
    located = _locate(cfg, split)
    if located and located.data_format != "coco":
        return CocoIndex.kept(
            _stamp(cfg, located, split) if cfg.index_cache else None,
            lambda: read_split(cfg, split),
            need_boxes=need_boxes,
        )
    name = getattr(cfg, f"{split}_split")
    file, image_dir = find_coco(located.place, name) if located else data_paths(cfg, split)
    index = CocoIndex.load(
        file,
        image_dir,
        need_boxes=need_boxes,
        cache=cfg.index_cache,
        reading=reading_of(cfg),
        classes=classes,
    )
    if located is None:
        return index
    report = SplitReport(Source({}, image_dir, file))
    for kind, found in located.told(name, image_dir).items():
        report.report_places(kind, found)
    return replace(index, findings=(*report.notices, *index.findings))


def _stamp(cfg: DataConfig, located: Located, split: Split) -> Stamp | None:
    options = format_options(cfg, located.data_format)
    values = (options, asdict(reading_of(cfg)), cfg.max_pixels)
    return located.stamp(getattr(cfg, f"{split}_split"), *values)


def split_batch(effective: int, *, max_size: int, rank: int = 0, world_size: int = 1) -> BatchSplit:
    """Divide an effective batch among processes, and each part into micro-batches.

    A micro-batch has at most `max_size` images; an effective batch of 0 means one such in each
    process.

    Raises:
        ConfigError: the processes cannot share it evenly.
    """
    if effective == 0:
        return BatchSplit(max_size, 1, rank, world_size)
    own, remainder = divmod(effective, world_size)
    if remainder:
        raise ConfigError(
            f"effective_batch_size {effective}: not a multiple of the {world_size} processes. "
            f"Use {max(own, 1) * world_size}, or another number of processes."
        )
    size = next(size for size in range(min(max_size, own), 0, -1) if own % size == 0)
    return BatchSplit(size, own // size, rank, world_size)


def tiling_of(options: TileOptions, eval_scale: int) -> Tiling | None:
    """Return how images are cut, None if they stay whole."""
    if not options.tile:
        return None
    tiling = Tiling(
        size=options.tile_size or eval_scale,
        overlap=options.tile_overlap,
        measure=options.tile_merge,
        threshold=options.tile_nms,
    )
    if isinstance(options, TrainTileOptions):
        tiling = replace(tiling, min_seen=options.tile_min_seen)
    return tiling


def seen_index(
    index: CocoIndex, options: TrainTileOptions, eval_scale: int, *, train: bool
) -> CocoIndex:
    """Return the images that a model sees: those of an index, or their tiles.

    All tiles, or of those without boxes only some if `train`.
    """
    tiling = tiling_of(options, eval_scale)
    if tiling is None:
        return index
    return cut_index(index, tiling, empty=options.tile_empty if train else 1.0)


def build_dataset(
    cfg: DataConfig,
    index: CocoIndex,
    *,
    train: bool,
    mean: Sequence[float],
    std: Sequence[float],
    seed: int = 0,
    classes: Classes | None = None,
    epochs: int | None = 0,
) -> CocoDetection:
    """Return an index's images or tiles, augmented if `train`, labelled in `classes` if given.

    `epochs` are those of the run, of which the last mix no images; None: not known yet.

    Raises:
        DataError: `classes` lacks a class that annotations of the data have, or all classes.
    """
    for notice in _unused(cfg, epochs) if train else ():
        console(f"notice: {notice}")
    mixing = build_mixing(cfg, mean=mean, epochs=epochs) if train else None
    cache = None
    if train and cfg.cache_images:
        images = index.whole.images if isinstance(index, TiledIndex) else index.images
        whole = CHANNELS * int(images.sizes.astype(np.int64).prod(axis=1).sum())
        cache = ImageCache(len(images.ids), max(1, min(int(cfg.cache_images * 1e9), whole)))
    kind = TileDetection if isinstance(index, TiledIndex) else CocoDetection
    dataset = kind(
        index,
        build_transform(cfg, train=train, mean=mean, std=std, epochs=epochs),
        seed=seed,
        classes=classes,
        mixing=mixing,
        cache=cache,
    )
    if dataset.unknown_classes:
        console(
            "notice: classes that the model does not know, but no annotation has, left out: "
            f"{first_few(map(repr, dataset.unknown_classes))}"
        )
    return dataset


def _unused(cfg: DataConfig, epochs: int | None) -> Iterator[str]:
    """Yield a line on each option that has no effect because of others."""
    if cfg.fixed_size:
        if cfg.train_scales != DataConfig.train_scales:
            yield f"fixed_size {cfg.fixed_size}: `train_scales` and `max_size` have no effect."
    elif cfg.augment == "none" and cfg.train_scales not in (
        DataConfig.train_scales,
        (cfg.eval_scale,),
    ):
        yield (
            f"augment none: images have a short side of `eval_scale {cfg.eval_scale}`; "
            "`train_scales` has no effect."
        )
    if cfg.mosaic_affine and not cfg.mosaic:
        yield "mosaic 0: `mosaic_affine` has no effect."
    mixed = cfg.mosaic or cfg.mixup or cfg.copy_blend
    if cfg.augment_phases:
        if cfg.close_augment_epochs != DataConfig.close_augment_epochs:
            yield "augment_phases: replaces `close_augment_epochs`, which has no effect."
    elif mixed and epochs is not None and epochs <= cfg.close_augment_epochs:
        yield (
            f"close_augment_epochs {cfg.close_augment_epochs} covers all {epochs} epochs: there "
            "will be no mosaic and no mixup. Lower it, or train longer."
        )
