"""`main.py preview`: what a model would see of its training data."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.ops import box_convert

from configs.options import Checked, option
from configs.schema import SECTIONS as RUN
from configs.schema import Config
from datasets.build import build_dataset, load_index, seen_index, split_batch
from datasets.loader import TrainLoader
from models.backbones import create_backbone
from models.recipes import KnownRecipes
from util.batch import Target
from util.classes import Classes
from util.console import console
from util.draw import draw_boxes
from util.errors import ConfigError
from util.files import make_output_dir

_CELL = 360  # pixels: the sides of an image in the overview are at most this
_BAR, _GAP, _PAPER, _INK = 20, 8, (255, 255, 255), (40, 40, 40)


@dataclass(frozen=True, kw_only=True)
class PreviewOptions(Checked):
    """What `preview` shows of a training run."""

    count: int = option(16, "images to write", low=1)
    epoch: int = option(0, "epoch whose images are written, counted from 0", low=0)


SECTIONS = {**RUN, "preview": PreviewOptions}
RECIPES = KnownRecipes()  # a run's file may name some
RELEVANT = {
    "model": ("backbone", "num_queries"),
    "optim": ("batch_size", "effective_batch_size", "epochs", "pad_multiple"),
    "loss": (),
    "run": ("output_dir", "seed"),
    "recipes": (),
}


def main(config: Config, options: PreviewOptions) -> int:
    """Write training images as the model would see them, with boxes."""
    if not config.run.output_dir:
        raise ConfigError("output_dir: is missing. Name a folder for the images.")
    index = load_index(config.data, "train")
    index = seen_index(index, config.tiles, config.data.eval_scale, train=True)
    console(index.report(config.model.num_queries))
    # any weights: only how images are normalised is asked
    backbone = create_backbone(config.model.backbone, weights="none")
    dataset = build_dataset(
        config.data,
        index,
        train=True,
        mean=backbone.mean,
        std=backbone.std,
        seed=config.run.seed,
        epochs=config.optim.epochs,
    )
    loader = TrainLoader(
        dataset,
        split_batch(config.optim.effective_batch_size, max_size=config.optim.batch_size),
        num_workers=0,
        seed=config.run.seed,
        aspect_ratio_grouping=config.data.aspect_ratio_grouping,
        pad_multiple=config.optim.pad_multiple,
    )
    loader.set_epoch(options.epoch)
    folder = Path(config.run.output_dir) / "preview"
    make_output_dir(folder)
    tiles, titles = [], []
    for number, (image, target) in enumerate(islice(seen(loader), options.count)):
        shown = to_image(image, backbone.mean, backbone.std)
        name = f"epoch{options.epoch}_{number:03d}_image_{int(target['image_id'])}"
        height, width = target["size"].tolist()  # without padding
        draw(shown, target, (width, height), dataset.classes).save(folder / f"{name}.png")
        scale = _CELL / max(width, height)
        cell = (max(1, round(width * scale)), max(1, round(height * scale)))
        small = shown.crop((0, 0, width, height)).resize(cell, Image.Resampling.BICUBIC)
        tiles.append(draw(small, target, cell, dataset.classes))
        titles.append(f"{int(target['image_id'])}: {width}x{height}, {len(target['labels'])} boxes")
    overview(tiles, titles).save(folder / f"epoch{options.epoch}.png")
    console(f"written: {len(tiles)} images and an overview, {folder / f'epoch{options.epoch}.png'}")
    return 0


def seen(loader: TrainLoader) -> Iterator[tuple[Tensor, Target]]:
    """Return the images [3,H,W] of a loader's batches, padded as they come, with their targets."""
    for batch in loader:
        for lost in batch.unreadable:
            console(f"cannot be read: {lost.path}: {lost.reason}")
        if batch.images is not None:
            yield from zip(batch.images.images, batch.targets, strict=True)


def to_image(image: Tensor, mean: Sequence[float], std: Sequence[float]) -> Image.Image:
    """Undo the normalisation of an image [3,H,W], exactly to 8 bits."""
    scale, shift = (torch.tensor(values).view(3, 1, 1) for values in (std, mean))
    pixels = ((image * scale + shift) * 255).round().clamp(0, 255).to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


def draw(
    image: Image.Image, target: Target, size: tuple[int, int], classes: Classes
) -> Image.Image:
    """Return the image with its boxes, which are fractions of `size`, its width and height."""
    corners = box_convert(target["boxes"], "cxcywh", "xyxy") * torch.tensor(size * 2)
    labels = target["labels"].tolist()
    return draw_boxes(image, corners, labels, [classes.shown(label) for label in labels])


def overview(tiles: Sequence[Image.Image], titles: Sequence[str]) -> Image.Image:
    """Return images in rows, each under its title; a row is as high as its tallest image."""
    columns = max(1, math.ceil(math.sqrt(len(tiles))))
    rows = [list(range(len(tiles)))[i : i + columns] for i in range(0, len(tiles), columns)]
    heights = [_BAR + max(tiles[i].height for i in row) + _GAP for row in rows]
    sheet = Image.new("RGB", (columns * (_CELL + _GAP) + _GAP, sum(heights) + _GAP), _PAPER)
    canvas, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=13)
    for number, row in enumerate(rows):
        top = _GAP + sum(heights[:number])
        for column, i in enumerate(row):
            left = _GAP + column * (_CELL + _GAP)
            canvas.text((left, top), titles[i], fill=_INK, font=font)
            sheet.paste(tiles[i], (left, top + _BAR))
    return sheet
