"""Proof of an exported file: its outputs in its own runtime against PyTorch's."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from datasets.build import build_transform
from datasets.dataset import ImageList
from datasets.images import limit_pixels
from engine.detector import Detector
from engine.exported.model import ExportedModel
from models.postprocess import PostProcess
from models.queries import DetectorOutput
from models.two_stage import TwoStageTransformer
from util.batch import PaddedBatch, pad_images
from util.errors import DataError

# N batch, R rows (queries, or detections that were selected), C classes.

TIE = 1e-5  # scores this close may be ranked in another order
_TOGETHER = 3  # images of a padded batch
_SHAPES = ((1.0, 1.25), (0.8, 0.75), (1.25, 0.9))  # sides of made images, parts of the short side


@dataclass
class Differences:
    """The largest differences so far: of scores, in 0..1, and of boxes, fractions of the image.

    `compared` rows were compared. `left_out` were not: rank decides whether they are there, and
    their score ties with the last that is.
    """

    scores: float = 0.0
    boxes: float = 0.0
    compared: int = 0
    left_out: int = 0
    images: int = 0

    @property
    def largest(self) -> float:
        """The larger of both; infinite where nothing was compared."""
        return max(self.scores, self.boxes) if self.compared else float("inf")

    def add(self, expected: Tensor, found: Tensor, sure: Tensor, *, in_order: bool) -> None:
        """Compare the rows of an image, scores [C] and boxes [4] side by side.

        Unless they are `in_order`, each row is compared with that of its own, such that the sum of
        distances is minimal.

        Shape: expected and found [R,C+4]; sure [R] bool, False for rows to leave out.
        """
        self.images += 1
        self.compared += int(sure.sum())
        self.left_out += int((~sure).sum())
        if expected.shape != found.shape or not found.isfinite().all():
            self.scores = self.boxes = float("inf")
            return
        if not in_order:
            distance = torch.cdist(expected.double(), found.double(), p=float("inf"))
            found = found[torch.from_numpy(linear_sum_assignment(distance.numpy())[1])]
        difference = (expected - found).abs()[sure]
        if len(difference):
            self.scores = max(self.scores, difference[:, :-4].max().item())
            self.boxes = max(self.boxes, difference[:, -4:].max().item())


def prove(detector: Detector, exported: Detector, images: Sequence[Tensor]) -> Differences:
    """Compare an exported file with the detector that it was made of.

    Each image goes through both by itself, and then with others in padded batches. Queries are
    compared in order, unless proposals were ranked: then as a set, like the selected detections of
    a finished graph.

    Shape: each image [3,H,W], normalised.
    """
    network = exported.network
    assert isinstance(network, ExportedModel)
    about, differences = network.about, Differences()
    in_order = not (about.finished or detector.model.transformer.two_stage)
    with torch.inference_mode():
        for batch in _batches(images):
            expected, found = detector.model(batch), network(batch)
            if about.finished:
                rows, sure = _selected(detector, expected, about.num_select)
                others = _rows_of(dict(found), rows.shape[-1] - 4)
            else:
                rows, others = (
                    torch.cat([output["pred_logits"].sigmoid(), output["pred_boxes"]], dim=-1)
                    for output in (expected, found)
                )
                sure = _sure_queries(detector, expected)
            for values in zip(rows, others, sure, strict=True):
                differences.add(*values, in_order=in_order)
    return differences


def prepared_images(detector: Detector, paths: Sequence[Path], count: int) -> list[Tensor]:
    """Return the first images as the detector prepares them, or made ones where there are none.

    Made images are noise, smooth and rough, of three shapes in turn.

    Raises:
        DataError: one cannot be read.
    """
    if not paths:
        return [_made(detector, number) for number in range(count)]
    limit_pixels(detector.data.max_pixels)
    transform = build_transform(detector.data, train=False, mean=detector.mean, std=detector.std)
    images = []
    for item in (ImageList(list(paths[:count]), transform)[i] for i in range(len(paths[:count]))):
        if not isinstance(item, tuple):
            raise DataError(f"{item.path}: cannot be read ({item.reason}). Check the file.")
        images.append(item[0])
    return images


def _made(detector: Detector, number: int) -> Tensor:
    generator = torch.Generator().manual_seed(number)
    side = detector.data.eval_scale
    height, width = (
        max(32, min(round(side * part), detector.data.max_size))
        for part in _SHAPES[number % len(_SHAPES)]
    )
    coarse = torch.randn(1, 3, 1 + height // 32, 1 + width // 32, generator=generator)
    smooth = F.interpolate(coarse, size=(height, width), mode="bilinear")[0]
    return smooth + 0.3 * torch.randn(3, height, width, generator=generator)


def _batches(images: Sequence[Tensor]) -> Iterator[PaddedBatch]:
    for image in images:
        yield pad_images([image])
    for start in range(0, len(images) - 1, _TOGETHER):
        yield pad_images(images[start : start + _TOGETHER])


def _sure_queries(detector: Detector, output: DetectorOutput) -> Tensor:
    """Return which queries are chosen whatever rounding does. Shape: [N,R] bool."""
    n, queries, _ = output["pred_logits"].shape
    transformer = detector.model.transformer
    if not isinstance(transformer, TwoStageTransformer):
        return torch.ones(n, queries, dtype=torch.bool)
    proposals = next(group for group in output["groups"] if group.name == "_enc").logits[0]
    score = (proposals.amax(-1) if transformer.class_proposals else proposals[..., 0]).sigmoid()
    ranked = score.topk(queries, dim=1).values  # queries are in this order
    return ranked > ranked[:, -1:] + TIE


def _selected(detector: Detector, output: DetectorOutput, count: int) -> tuple[Tensor, Tensor]:
    """Return the rows that post-processing selects, and which it selects whatever rounding does."""
    n, queries, classes = output["pred_logits"].shape
    best = PostProcess(max_detections=count).best(output, torch.ones(n, 2))
    scores = best["scores"]
    sure = _sure_queries(detector, output).gather(1, best["queries"])
    if scores.shape[1] < queries * classes:
        sure &= scores > scores[:, -1:] + TIE
    return _rows_of(best, classes), sure


def _rows_of(selected: dict[str, Tensor], classes: int) -> Tensor:
    """Return detections as rows: a score in the place of its class, and the box."""
    labels, scores = selected["labels"], selected["scores"]
    by_class = F.one_hot(labels.clamp(0, classes - 1), classes) * scores[..., None]
    return torch.cat([by_class, selected["boxes"]], dim=-1)
