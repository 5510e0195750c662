"""Steps whose numbers are not finite: what is known of each, and where it began."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engine.checkpoint import rng_state, set_rng_state
from util.batch import PaddedBatch
from util.errors import UserError
from util.files import write_atomic


@dataclass
class NonfiniteRecorder:
    """Counts steps that were skipped, and writes a file on each to `output_dir/nonfinite/`.

    After `limit` of them in a row the run is given up.
    """

    output_dir: Path
    rank: int
    limit: int
    total: int = 0
    in_a_row: int = 0

    def finite(self) -> None:
        """Say that a step was finite: the row starts anew."""
        self.in_a_row = 0

    def state(self) -> dict[str, int]:
        """Return what to count on from, for a checkpoint."""
        return {"total": self.total}

    def restore(self, state: Mapping[str, int]) -> None:
        """Count on from what `state` returned; a resumed run gets a whole row again."""
        self.total = state["total"]
        self.in_a_row = 0

    def record(
        self,
        step: int,
        epoch: int,
        image_ids: Sequence[int],
        losses: Mapping[str, float],
        grad_norm: float,
        scale: float,
        rates: Mapping[str, float],
        module: str,
    ) -> Path:
        """Write what is known of a skipped step; return the file.

        `scale` is the loss scale, `rates` the learning rates by group, `module` what
        `first_nonfinite` found.

        Raises:
            UserError: it was the last of `limit` in a row, or the file cannot be written.
        """
        self.total += 1
        self.in_a_row += 1
        path = self.output_dir / "nonfinite" / f"step_{step:08d}_rank{self.rank}.json"
        content = {
            "step": step,
            "epoch": epoch,
            "rank": self.rank,
            "image_ids": list(image_ids),
            "losses": losses,
            "grad_norm": grad_norm,
            "scale": scale,
            "learning_rates": rates,
            "first_nonfinite": module,
            "in_a_row": self.in_a_row,
            "total": self.total,
        }
        try:
            write_atomic(path, json.dumps(_as_json(content), indent=2, allow_nan=False) + "\n")
        except OSError as error:
            raise UserError(
                f"{path}: cannot be written: {error.strerror or error}. "
                "Free space, then go on with --resume auto."
            ) from error
        if self.in_a_row >= self.limit:
            raise self._given_up(step, path, module, image_ids)
        return path

    def _given_up(self, step: int, path: Path, module: str, image_ids: Sequence[int]) -> UserError:
        images = ", ".join(str(i) for i in image_ids)
        return UserError(
            f"step {step}: expected a finite loss and gradient, got none in {self.in_a_row} steps "
            f"in a row ({module}; report: {path}). Look at the images ({images}), or go on "
            "from the last good state with --resume auto and a lower --lr, --precision bf16 or "
            "--precision fp32."
        )


def _as_json(value: Any) -> Any:
    """Replace numbers that JSON has no words for by "nan", "inf" and "-inf"."""
    if isinstance(value, Mapping):
        return {key: _as_json(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_as_json(item) for item in value]
    return value if not isinstance(value, float) or math.isfinite(value) else str(value)


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Restore every random generator after what is done inside."""
    state = rng_state()
    try:
        yield
    finally:
        set_rng_state(state)


def first_nonfinite(model: nn.Module, images: PaddedBatch) -> str:
    """Say in words what is not finite first: a parameter, a pixel, a buffer or a module's output.

    Runs an unwrapped model forward in its present mode, so call it under the step's autocast. The
    model and the random generators stay as they were.
    """
    found = (
        [f"parameter {n} is not finite" for n, p in model.named_parameters() if not _is_finite(p)]
        or [
            f"image {i} of {len(images.images)} has pixels that are not finite"
            for i, image in enumerate(images.images, 1)
            if not _is_finite(image)
        ]
        # after the pixels: running statistics take in what these were
        or [f"buffer {n} is not finite" for n, b in model.named_buffers() if not _is_finite(b)]
        or _nonfinite_outputs(model, images)
    )
    if found:
        return found[0]
    return "weights, pixels and the forward pass were finite: look at the targets and the gradient"


def _nonfinite_outputs(model: nn.Module, images: PaddedBatch) -> list[str]:
    """Run the model and name the first module whose output is not finite, if there is one."""
    found: list[str] = []

    def look(name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        if not found and not _is_finite(output):
            kind = type(module).__name__
            found.append(f"module {name} ({kind}) has the first output that is not finite")

    hooks = [
        module.register_forward_hook(partial(look, name or "itself"))
        for name, module in model.named_modules()
    ]
    own = {name: buffer.clone() for name, buffer in model.named_buffers()}
    # the step's graph goes on: what it keeps for its backward pass must not be written to
    try:
        with random_state_kept(), torch.no_grad(), torch.compiler.set_stance("force_eager"):
            torch.func.functional_call(model, own, (images,))
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _is_finite(value: Any) -> bool:
    """Tell whether every number in tensors, dataclasses and containers of them is finite."""
    if isinstance(value, Tensor):
        return bool(value.isfinite().all())
    if isinstance(value, Mapping):
        return all(_is_finite(item) for item in value.values())
    if isinstance(value, (list, tuple)):
        return all(_is_finite(item) for item in value)
    if hasattr(value, "__dataclass_fields__"):
        return all(_is_finite(item) for item in vars(value).values())
    return True
