"""An exported file in the place of a model."""

from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from engine.exported.about import SUFFIXES, About
from engine.exported.sessions import Session, open_session
from models.postprocess import PostProcess
from models.queries import DetectorOutput
from util.batch import PaddedBatch
from util.errors import ConfigError, UserError


class ExportedModel(nn.Module):
    """A graph that its own runtime computes, called like the detector it was made of."""

    def __init__(self, session: Session, about: About) -> None:
        super().__init__()
        self.session, self.about = session, about
        self.num_queries = about.num_queries

    def forward(self, batch: PaddedBatch) -> DetectorOutput:
        """Return the detections: logits and boxes or, of a finished graph, what it selected.

        A finished graph has `scores` and `labels` [N,K] and `boxes` [N,K,4], xyxy fractions.

        Raises:
            UserError: the runtime cannot compute images of this size.
        """
        arrays = [batch.images.contiguous(), batch.mask.contiguous()]
        if self.about.finished:  # in an image of one pixel, fractions are pixels
            arrays.append(torch.ones(batch.images.shape[0], 2, dtype=torch.int64))
        names = OUTPUTS[self.about.finished]
        try:
            found = self.session.run(arrays)
        except Exception as error:  # each runtime has errors of its own
            n, _, height, width = batch.images.shape
            reason = " ".join(str(error).split())[:150]
            raise UserError(
                f"{self.session.runtime}: cannot compute {n} images of {width} x {height} pixels "
                f"({type(error).__name__}: {reason}). Use larger images, or the checkpoint."
            ) from error
        return cast(DetectorOutput, dict(zip(names, found, strict=True)))

    def postprocess(self, max_detections: int, nms_iou: float | None) -> PostProcess:
        """Return what turns outputs into boxes in pixels.

        Raises:
            ConfigError: the graph is finished, and selects otherwise.
        """
        if not self.about.finished:
            return PostProcess(max_detections=max_detections, nms_iou=nms_iou)
        if max_detections > self.about.num_select:
            raise ConfigError(
                f"num_select: this exported file selects {self.about.num_select} detections of "
                f"an image, not {max_detections}. Lower it, or export without `postprocess`."
            )
        if nms_iou is not None and nms_iou < 1:
            raise ConfigError(
                "nms_iou: post-processing is in this exported file, without NMS. Leave it out, or "
                "export without `postprocess`."
            )
        return _Finished(max_detections=max_detections)


class _Finished(PostProcess):
    """The rest of post-processing where the graph has done it: fractions to pixels."""

    def __call__(self, outputs: DetectorOutput, orig_sizes: Tensor) -> list[dict[str, Tensor]]:
        """See `PostProcess`."""
        found = cast(dict[str, Tensor], outputs)
        height, width = orig_sizes.to(found["boxes"]).unbind(1)
        boxes = found["boxes"] * torch.stack([width, height, width, height], dim=1)[:, None]
        kept = slice(self.max_detections)
        return [
            {"scores": s[kept], "labels": c[kept], "boxes": b[kept]}
            for s, c, b in zip(found["scores"], found["labels"], boxes, strict=True)
        ]


# names of what a graph returns, raw or finished
OUTPUTS = {False: ("pred_logits", "pred_boxes"), True: ("scores", "labels", "boxes")}


def is_exported(source: str) -> bool:
    """Return whether a source of weights is an exported file, by its suffix."""
    return Path(source).suffix in SUFFIXES.values()


def open_exported(source: str) -> ExportedModel:
    """Open an exported file in its runtime.

    Raises:
        CheckpointError: it is missing, damaged, or was not exported by this program.
        ConfigError: the runtime is not installed.
    """
    session = open_session(Path(source))
    return ExportedModel(session, About.from_text(session.text, source))
