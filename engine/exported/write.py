"""Write a detector as a file for other runtimes."""

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
from torch import Tensor, nn

from engine.exported.about import KEY, About
from engine.exported.model import OUTPUTS
from engine.exported.packages import needed
from engine.exported.same_conv import as_operators, in_onnx
from models.backbones import Backbone
from models.deformable_detr import DeformableDETR
from models.postprocess import PostProcess
from util.batch import PaddedBatch
from util.errors import CheckpointError

OPSET = 18  # of ONNX: the version in which standard operators suffice for every model
_INPUTS = ("images", "mask", "sizes")
_SIDES = (224, 288)  # (height, width) of the images that the graph is recorded with


class Graph(nn.Module):
    """A detector whose inputs and outputs are tensors.

    With `max_detections`, post-processing is inside, and `sizes` are the original images'.
    """

    def __init__(self, model: DeformableDETR, max_detections: int | None = None) -> None:
        super().__init__()
        self.model = model
        self.postprocess: PostProcess | None = None
        if max_detections is not None:
            self.postprocess = PostProcess(max_detections=max_detections)

    def forward(
        self, images: Tensor, mask: Tensor, sizes: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """Detect objects.

        Shape: images [N,3,H,W], normalised; mask [N,H,W] bool, True = padding; sizes [N,2] int64,
            (height, width) in pixels; returns logits [N,Q,classes] and boxes [N,Q,4], cxcywh
            fractions, or scores and labels [N,K] and boxes [N,K,4], xyxy in pixels.
        """
        outputs = self.model(PaddedBatch(images, mask, ()))
        if self.postprocess is None:
            return outputs["pred_logits"], outputs["pred_boxes"]
        assert sizes is not None
        best = self.postprocess.best(outputs, sizes)
        return tuple(best[name] for name in OUTPUTS[True])


def write(model: DeformableDETR, about: About, path: Path, to: str) -> None:
    """Write a model in evaluation mode, on the CPU, as one of `WRITERS`.

    Inputs and outputs are float32, and so is all between but what `halved` has changed.

    Batch size, height and width stay open. A two-stage model needs images with as many tokens as
    it has queries.

    Raises:
        CheckpointError: PyTorch cannot export the model; the line says what of it is unusual.
        ConfigError: a package is not installed.
    """
    graph = Graph(model, about.num_select if about.finished else None).eval()
    try:
        with torch.no_grad(), _quiet(), as_operators(model):
            WRITERS[to](graph, _example(graph, about), path, about)
    except (torch.onnx.errors.OnnxExporterError, RuntimeError, ValueError, TypeError) as error:
        reason = " ".join(str(error.__cause__ or error).split())[:200]
        raise CheckpointError(f"{to}: PyTorch cannot export this model ({reason}).") from error


def _example(graph: Graph, about: About) -> tuple[Tensor, ...]:
    """Return two images, one of them padded, that have at least as many tokens as queries."""
    height, width = _SIDES
    strides = cast(Backbone, graph.model.backbone[0]).strides
    while sum((height // s) * (width // s) for s in strides) < about.num_queries:
        height, width = height * 2, width * 2
    images = torch.zeros(2, 3, height, width)
    mask = torch.zeros(2, height, width, dtype=torch.bool)
    mask[1, :, width - 40 :] = True
    sizes = torch.tensor([[height, width], [height, width - 40]])
    return (images, mask, sizes) if about.finished else (images, mask)


def _open_shapes(about: About) -> dict[str, dict[int, Any]]:
    dynamic = torch.export.Dim.DYNAMIC
    shapes = {
        "images": {0: dynamic, 2: dynamic, 3: dynamic},
        "mask": dict.fromkeys(range(3), dynamic),
    }
    return {**shapes, "sizes": {0: dynamic}} if about.finished else shapes


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide what exporters say about their own insides."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


def _write_onnx(graph: Graph, example: tuple[Tensor, ...], path: Path, about: About) -> None:
    onnx = needed("onnx")
    program = torch.onnx.export(
        graph,
        example,
        dynamo=True,
        dynamic_shapes=_open_shapes(about),
        input_names=_INPUTS[: len(example)],
        output_names=OUTPUTS[about.finished],
        opset_version=OPSET,
        custom_translation_table=in_onnx(),
        verbose=False,
    )
    assert program is not None
    # the optimiser that makes one Clip of two leaves the new limits out of the graph's constants
    constants = program.model.graph.initializers
    for value in [value for node in program.model.graph for value in node.inputs]:
        if value is not None and value.const_value is not None and value.producer() is None:
            constants.setdefault(str(value.name), value)
    proto = program.model_proto
    foreign = {node.domain for node in proto.graph.node} - {""}
    if foreign or proto.functions:
        raise CheckpointError(
            f"onnx: the graph has operators of {sorted(foreign)}, not ONNX's own."
        )
    onnx.helper.set_model_props(proto, {KEY: about.to_text()})
    onnx.save_model(proto, str(path))


def _write_openvino(graph: Graph, example: tuple[Tensor, ...], path: Path, about: About) -> None:
    runtime = needed("openvino")
    with TemporaryDirectory(dir=path.parent) as folder:
        between = Path(folder) / "graph.onnx"
        _write_onnx(graph, example, between, about)
        model = runtime.Core().read_model(str(between))
        model.set_rt_info(about.to_text(), KEY)
        runtime.save_model(model, str(path), compress_to_fp16=False)


def _write_torch_export(
    graph: Graph, example: tuple[Tensor, ...], path: Path, about: About
) -> None:
    program = torch.export.export(graph, example, dynamic_shapes=_open_shapes(about))
    torch.export.save(program, str(path), extra_files={KEY: about.to_text()})


WRITERS: dict[str, Callable[[Graph, tuple[Tensor, ...], Path, About], None]] = {
    "onnx": _write_onnx,
    "openvino": _write_openvino,
    "torch_export": _write_torch_export,
}
