"""The same model as transformers builds it, with the same weights."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from engine.detector import Detector
from models.weights.hugging_face import save_hugging_face
from util.batch import PaddedBatch
from util.errors import ConfigError


def hugging_face_twin(detector: Detector, options: Mapping[str, Any]) -> nn.Module:
    """Return `DeformableDetrForObjectDetection` with the weights of a detector.

    `options` are the detector's `ModelConfig` values.

    Raises:
        CheckpointError: transformers has no such model.
        ConfigError: transformers is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise ConfigError(
            "against hugging_face: needs the package transformers. Run: pip install transformers"
        ) from error
    library: Any = transformers  # its annotations lack much
    library.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        save_hugging_face(
            Path(folder),
            detector.model.state_dict(),
            options=options,
            classes=detector.classes,
            image_mean=detector.mean,
            image_std=detector.std,
            image_size=(detector.data.eval_scale, detector.data.max_size),
        )
        twin: nn.Module = library.DeformableDetrForObjectDetection.from_pretrained(folder)
    return twin.to(detector.device).eval()


def logits_of(twin: nn.Module, batch: PaddedBatch) -> Tensor:
    """Run the twin. Shape: returns [N,Q,classes]."""
    logits: Tensor = twin(batch.images, pixel_mask=(~batch.mask).long()).logits
    return logits
