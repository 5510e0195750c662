"""Why the model found what it found in an image: the numbers behind `Detector.explain`."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torchvision.ops import box_convert

from datasets.collate import collate
from datasets.dataset import ImageList
from engine.evaluation.evaluate import detect
from engine.explain.record import (
    Look,
    Record,
    Shapes,
    deformable_attention,
    query_weights,
    recording,
)
from models.deformable_detr import DeformableDETR
from models.postprocess import PostProcess
from models.queries import DetectorOutput
from ops import MSDeformAttn
from util.batch import Batch
from util.classes import Classes
from util.errors import ConfigError, nearest_hint

# Q queries, M heads, L levels, K points.

Floats = NDArray[np.float64]
Corners = tuple[float, float, float, float]


@dataclass(frozen=True)
class Sampling:
    """Where deformable attention reads the feature maps, layer by layer.

    Shape: layers [T], their numbers, counted from 0; points [T,M,L,K,2], (x, y) in pixels of the
    upright image, also outside it, where zeros are read; weights [T,M,L,K], which sum to 1 over
    levels and points; references [T,4], the box (cx, cy, w, h) in pixels that points are placed
    around, or a point, whose w and h are 0.
    """

    layers: NDArray[np.int64]
    points: Floats
    weights: Floats
    references: Floats


@dataclass(frozen=True)
class ExplainedQuery:
    """A query: what it found at last, and how it came to it through the decoder's layers.

    `name`, `category_id`, `score` and `xyxy` are as those of `Box`.

    Shape: boxes [layers,4], xyxy pixels after each layer; scores [layers], what each layer's own
    head gives the class; attention [layers,M,Q], how much the query takes from each query, which
    sums to 1 over queries.
    """

    query: int
    name: str
    category_id: int
    score: float
    xyxy: Corners
    sampling: Sampling
    boxes: Floats
    scores: Floats
    attention: Floats


@dataclass(frozen=True)
class ExplainedToken:
    """A cell of a feature map, and where it looks in the encoder's layers.

    `centre` is that of the cell, in pixels. Layers that leave the token as it is are left out.
    """

    level: int
    row: int
    column: int
    centre: tuple[float, float]
    sampling: Sampling


@dataclass(frozen=True)
class Explanation:
    """What `Detector.explain` returns.

    `size` is the (width, height) of the upright image in pixels, `level_shapes` are the (H, W) of
    the feature maps in cells, finest first. `query_boxes` [layers,Q,4] are the boxes of all queries
    after each layer, xyxy in pixels.
    """

    size: tuple[int, int]
    level_shapes: tuple[tuple[int, int], ...]
    queries: tuple[ExplainedQuery, ...]
    token: ExplainedToken | None
    query_boxes: Floats

    def to_json(self) -> dict[str, Any]:
        """Return the numbers as plain lists."""
        return asdict(
            self,
            dict_factory=lambda entries: {
                name: value.tolist() if isinstance(value, np.ndarray) else value
                for name, value in entries
            },
        )


@dataclass(frozen=True)
class Choice:
    """Which of an image's detections to explain: by default the best `count`.

    Detections are those that `Detector.predict` returns, of the class `class_name` if it is given.
    `box` is a position among them, best first and counted from 0; `point` is (x, y) in pixels and
    chooses the smallest box around it; `query` is a query of the model, whatever its score. A
    `token` is (x, y) in pixels and the level, counted from 0.
    """

    box: int | None = None
    query: int | None = None
    point: tuple[float, float] | None = None
    class_name: str | None = None
    count: int = 5
    token: tuple[float, float, int] | None = None

    def __post_init__(self) -> None:
        given = [name for name in ("box", "query", "point") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ConfigError(f"{given[0]}: leaves nothing to choose by `{given[1]}`. Give one.")
        numbers = {"box": self.box, "query": self.query, "count": self.count - 1}
        if self.token is not None:
            numbers["token"] = self.token[2]
        for name, value in numbers.items():
            if value is not None and value < 0:
                raise ConfigError(f"{name}: must not be negative; a count is at least 1.")


@dataclass(frozen=True)
class _Found:
    """A detection, and the query that it is of."""

    query: int
    label: int
    score: float
    xyxy: Corners


def explain(
    model: DeformableDETR,
    postprocess: PostProcess,
    image: ImageList,
    choice: Choice,
    *,
    device: torch.device,
    classes: Classes,
    min_scores: Mapping[str, float],
) -> Explanation:
    """Run a model on the one image of a list, and return what its attention did.

    Raises:
        ConfigError: nothing is there to choose, or the encoder has no sampling points.
        DataError: the image cannot be read.
    """
    if choice.class_name is not None and choice.class_name not in min_scores:
        raise ConfigError(
            f"class_name: the model has no class '{choice.class_name}'. "
            f"{nearest_hint(choice.class_name, min_scores)}"
        )
    decoder = model.transformer.decoder
    if not all(isinstance(layer.cross_attn, MSDeformAttn) for layer in decoder.layers):
        raise ConfigError(
            "decoder_attn: the queries of this model attend to all of the image, as in DETR, and "
            "so have no sampling points. `explain` needs a decoder with deformable attention."
        )
    if choice.token is not None and not deformable_attention(model):
        raise ConfigError(
            "token: the encoder of this model has no deformable attention, and so no sampling "
            "points. Leave it out: queries of the decoder have them."
        )
    batch = collate([image[0]])
    results: list[DetectorOutput] = []

    def token_of(shapes: Shapes) -> int:
        assert choice.token is not None
        return _cell_at(choice.token, _size(batch), shapes).position

    with recording(model, None if choice.token is None else token_of) as record:
        runs = detect(
            model,
            postprocess,
            [batch],
            device=device,
            description=None,
            skip_unreadable=False,
            on_outputs=lambda outputs, targets: results.append(outputs),
        )
        ((_, (detections,)),) = runs
    with torch.inference_mode():
        chosen = _chosen(
            _detections(detections, classes, min_scores, choice.class_name),
            results[0],
            choice,
            classes=classes,
            size=_size(batch),
        )
        return _explanation(record, chosen, choice, classes=classes, size=_size(batch))


def _size(batch: Batch) -> tuple[int, int]:
    """Return the (width, height) of the one image, in pixels of the original."""
    height, width = batch.targets[0]["orig_size"].tolist()
    return width, height


def _detections(
    detections: Mapping[str, Tensor],
    classes: Classes,
    min_scores: Mapping[str, float],
    class_name: str | None,
) -> tuple[list[_Found], _Found | None]:
    """Return those that count, best first, and the best of all."""
    columns = (detections[key].tolist() for key in ("queries", "labels", "scores", "boxes"))
    all_found = [
        _Found(query, label, score, tuple(box))
        for query, label, score, box in zip(*columns, strict=True)
        if classes.in_use(label) and class_name in (None, classes.shown(label))
    ]
    counting = [f for f in all_found if f.score >= min_scores[classes.shown(f.label)]]
    return counting, all_found[0] if all_found else None


def _chosen(
    detections: tuple[list[_Found], _Found | None],
    outputs: DetectorOutput,
    choice: Choice,
    *,
    classes: Classes,
    size: tuple[int, int],
) -> list[_Found]:
    """Return the detections that a choice means.

    Raises:
        ConfigError: there are none.
    """
    counting, best = detections
    if choice.query is not None:
        return [_of_query(choice.query, outputs, choice.class_name, classes=classes, size=size)]
    if not counting:
        if choice.token is not None:
            return []
        seen = "nothing" if best is None else f"{classes.shown(best.label)} {best.score:.3f}"
        raise ConfigError(
            f"score_threshold: no detection reaches it; the best is {seen}. Lower it, or name a "
            "`query`."
        )
    if choice.box is not None:
        if choice.box >= len(counting):
            raise ConfigError(
                f"box {choice.box}: there are {len(counting)} detections, counted from 0. Choose "
                "another, or lower `score_threshold`."
            )
        return [counting[choice.box]]
    if choice.point is not None:
        x, y = choice.point
        around = [f for f in counting if _holds(f.xyxy, x, y)]
        if not around:
            raise ConfigError(
                f"point {x:g},{y:g}: is in none of the {len(counting)} boxes. Choose a point in "
                f"one of them, in pixels of the image ({size[0]} x {size[1]}), or lower "
                "`score_threshold`."
            )
        return [min(around, key=lambda f: _area(f.xyxy))]
    return counting[: choice.count]


def _holds(box: Corners, x: float, y: float) -> bool:
    return box[0] <= x <= box[2] and box[1] <= y <= box[3]


def _area(box: Corners) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def _of_query(
    query: int,
    outputs: DetectorOutput,
    class_name: str | None,
    *,
    classes: Classes,
    size: tuple[int, int],
) -> _Found:
    """Return what a query found: its best class, or the given one.

    Raises:
        ConfigError: there is no such query.
    """
    logits = outputs["pred_logits"][0]
    if query >= len(logits):
        raise ConfigError(
            f"query {query}: the model has {len(logits)} for this image, counted from 0. Choose "
            "one of these."
        )
    scores = logits[query].double().sigmoid().tolist()
    named = [
        label
        for label in range(len(classes))
        if classes.in_use(label) and class_name in (None, classes.shown(label))
    ]
    label = max(named, key=lambda label: scores[label])
    (box,) = _corners(outputs["pred_boxes"][0, query : query + 1], size).tolist()
    return _Found(query, label, scores[label], tuple(box))


def _corners(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Shape: cxcywh fractions [...,4] -> xyxy pixels [...,4], float64."""
    corners: Tensor = box_convert(boxes.double(), "cxcywh", "xyxy")
    return corners * corners.new_tensor((*size, *size))


def _explanation(
    record: Record,
    chosen: Sequence[_Found],
    choice: Choice,
    *,
    classes: Classes,
    size: tuple[int, int],
) -> Explanation:
    """Return the numbers of a pass through the model."""
    assert record.decoded is not None
    shapes = record.looks[0].shapes
    boxes = _corners(torch.stack(record.decoded.boxes)[:, 0], size)  # [layers,Q,4]
    token = None
    if choice.token is not None:
        cell = _cell_at(choice.token, size, shapes)
        looks = [look for look in record.token_looks if look is not None]
        layers = [i for i, look in enumerate(record.token_looks) if look is not None]
        sampling = _sampling(looks, layers, torch.tensor([0]), size)[0]
        token = ExplainedToken(cell.level, cell.row, cell.column, cell.centre, sampling)
    queries: list[ExplainedQuery] = []
    if chosen:
        rows = torch.tensor([found.query for found in chosen], device=boxes.device)
        samplings = _sampling(record.looks, list(range(len(record.looks))), rows, size)
        attention = query_weights(record, rows).double().cpu().numpy()
        scores = torch.stack(record.decoded.logits)[:, 0].double().sigmoid()
        queries = [
            ExplainedQuery(
                found.query,
                classes.shown(found.label),
                classes.ids[found.label],
                found.score,
                found.xyxy,
                samplings[i],
                boxes[:, found.query].cpu().numpy(),
                scores[:, found.query, found.label].cpu().numpy(),
                attention[:, i],
            )
            for i, found in enumerate(chosen)
        ]
    return Explanation(size, tuple(shapes), tuple(queries), token, boxes.cpu().numpy())


def _sampling(
    looks: Sequence[Look], layers: Sequence[int], rows: Tensor, size: tuple[int, int]
) -> list[Sampling]:
    """Return where each of the queries `rows` reads, in pixels; the image has no padding."""
    samples = [look.samples(rows.to(look.query.device)) for look in looks]
    pixels = torch.tensor(size, dtype=torch.float64)
    points = torch.stack([locations[0].double().cpu() for locations, _ in samples]) * pixels
    weights = torch.stack([weights[0].double().cpu() for _, weights in samples])
    # without padding, a reference is the same fraction of every level
    seen = [look.reference[0, :, 0].double().cpu()[rows.cpu()] for look in looks]
    boxes = [F.pad(reference, (0, 4 - reference.shape[-1])) for reference in seen]
    references = torch.stack(boxes) * pixels.repeat(2)
    return [
        Sampling(
            np.array(layers),
            points[:, i].numpy(),
            weights[:, i].numpy(),
            references[:, i].numpy(),
        )
        for i in range(len(rows))
    ]


@dataclass(frozen=True)
class _Cell:
    """A cell of a feature map; `position` is that of its token in the sequence of all levels."""

    level: int
    row: int
    column: int
    position: int
    centre: tuple[float, float]


def _cell_at(
    token: tuple[float, float, int], size: tuple[int, int], shapes: Sequence[tuple[int, int]]
) -> _Cell:
    """Return the cell of a level that a pixel is in.

    Raises:
        ConfigError: there is no such level, or the pixel is outside the image.
    """
    x, y, level = token
    if level >= len(shapes):
        raise ConfigError(
            f"token: there is no level {level}. This model has {len(shapes)}, counted from 0, the "
            "finest first. Choose one of these."
        )
    width, height = size
    if not (0 <= x < width and 0 <= y < height):
        raise ConfigError(
            f"token: {x:g},{y:g} is outside the image of {width} x {height} pixels. Choose a pixel "
            "in it."
        )
    rows, columns = shapes[level]
    row, column = int(y / height * rows), int(x / width * columns)
    before = sum(h * w for h, w in shapes[:level])
    centre = ((column + 0.5) / columns * width, (row + 0.5) / rows * height)
    return _Cell(level, row, column, before + row * columns + column, centre)
