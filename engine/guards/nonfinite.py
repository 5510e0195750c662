"""Steps whose numbers are not finite: what is known of each, and where it began."""

import json
import math
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from engine.guards.guard import Guard, LoggedStep
from engine.optim import Precision
from util.batch import Batch, PaddedBatch, Target
from util.errors import UserError
from util.files import write_atomic
from util.random_state import random_state_kept

_FINITE_FORWARD = "the forward pass was finite here, the gradient was not"
_ALL_FINITE = (
    "weights, pixels and the forward pass were finite: look at the targets and the gradient"
)


class NonFiniteSteps(Guard):
    """Finds where a step stopped being finite, and reports it in a file of `output_dir/nonfinite/`.

    Such a step has changed no weights, and this guard restores the statistics of batch norms, those
    of frozen stages too where they take part. The search runs the step's images again, right after
    the step; on a GPU, one step later, so that nothing waits for the device. After `limit` such
    steps in a row the run ends.
    """

    def __init__(
        self, model: nn.Module, precision: Precision, output_dir: Path, *, rank: int, limit: int
    ) -> None:
        """`model` is the detector itself, without its distributed wrapper."""
        self.total = 0
        self.in_a_row = 0
        self._model, self._precision = model, precision
        self._output_dir, self._rank, self._limit = output_dir, rank, limit
        self._norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
        self._delay = int(precision.device.type == "cuda")  # steps until values have arrived
        self._before: list[tuple[Tensor, Tensor]] = []  # statistics, and what they were
        self._unchecked: deque[tuple[int, Sequence[Batch], Tensor]] = deque()
        self._causes: dict[int, str] = {}  # of steps that are not logged yet

    def before_step(self, step: int, micro_batches: Sequence[Batch]) -> None:
        changing = [buffer for m in self._norms if m.training for buffer in m.buffers()]
        self._before = [(buffer, buffer.clone()) for buffer in changing]

    def after_step(
        self, step: int, micro_batches: Sequence[Batch], metrics: Mapping[str, Tensor]
    ) -> None:
        finite = metrics["loss"].isfinite()
        for buffer, before in self._before:
            buffer.copy_(torch.where(finite, buffer, before))
        self._unchecked.append((step, micro_batches, finite.to("cpu", non_blocking=True)))
        self._check(keep=self._delay)  # this step's matcher waited for all that came before it

    def _check(self, *, keep: int) -> None:
        """Look for the causes of all steps but the last `keep`, whose values are still to come."""
        while len(self._unchecked) > keep:
            step, micro_batches, finite = self._unchecked.popleft()
            if finite:
                continue
            for batch in micro_batches:
                assert batch.images is not None
                images = batch.images.to(self._precision.device)
                with self._precision.autocast():
                    self._causes[step] = first_nonfinite(self._model, images, batch.targets)
                if self._causes[step] != _ALL_FINITE:
                    break

    def on_log(self, step: LoggedStep) -> None:
        """Write what is known of a step that was not finite.

        Raises:
            UserError: it was the last of `limit` in a row, or the file cannot be written.
        """
        if any(number == step.step for number, *_ in self._unchecked):
            self._check(keep=0)  # the last step, which is done
        cause = self._causes.pop(step.step, _FINITE_FORWARD)
        if step.finite:
            self.in_a_row = 0
            return
        scale = self._precision.scaler.get_scale()  # 1 where there is none
        if scale > 1 and math.isfinite(step.values["loss"]):
            return  # float16 looks for the largest scale that fits
        self.total += 1
        self.in_a_row += 1
        path = self._output_dir / "nonfinite" / f"step_{step.step:08d}_rank{self._rank}.json"
        content = {
            "step": step.step,
            "epoch": step.epoch,
            "rank": self._rank,
            "image_ids": list(step.image_ids),
            "losses": {name: _as_json(value) for name, value in step.values.items()},
            "grad_norm": _as_json(step.values["grad_norm"]),
            "scale": scale,
            "learning_rates": step.rates,
            "first_nonfinite": cause,
            "in_a_row": self.in_a_row,
            "total": self.total,
        }
        try:
            write_atomic(path, json.dumps(content, indent=2, allow_nan=False) + "\n")
        except OSError as error:
            raise UserError(
                f"{path}: cannot be written: {error.strerror or error}. "
                "Free space, then continue with `resume auto`."
            ) from error
        if self.in_a_row >= self._limit:
            raise UserError(
                f"step {step.step}: the loss or gradient was not finite in {self.in_a_row} steps "
                f"in a row ({cause}; report: {path}). Look at the images "
                f"({', '.join(map(str, step.image_ids))}), or continue "
                "from the last good state with `resume auto` and a lower `lr`, `precision bf16` "
                "or `precision fp32`."
            )

    def state_dict(self) -> dict[str, Any]:
        """Return plain values for a checkpoint."""
        return {"total": self.total}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue the total of a checkpoint; the row of a resumed run starts anew."""
        self.total, self.in_a_row = state["total"], 0


def _as_json(value: float) -> float | str:
    """Replace numbers that JSON cannot express by "nan", "inf" and "-inf"."""
    return value if math.isfinite(value) else str(value)


def first_nonfinite(
    model: nn.Module, images: PaddedBatch, targets: Sequence[Target] | None = None
) -> str:
    """Return in words what is not finite first: a parameter, a pixel, a buffer, a module's output.

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
    )
    if found:
        return found[0]
    names = {module: name or "itself" for name, module in model.named_modules()}

    def look(module: nn.Module, _: Any, output: Any) -> None:
        if module in names and not found and not _is_finite(output):
            kind = type(module).__name__
            found.append(f"module {names[module]} ({kind}) has the first output that is not finite")

    own = {name: buffer.clone() for name, buffer in model.named_buffers()}
    eagerly = torch.compiler.set_stance("force_eager")
    with register_module_forward_hook(look), random_state_kept(), torch.no_grad(), eagerly:
        inputs = (images,) if targets is None else (images, targets)
        torch.func.functional_call(model, own, inputs)
    return found[0] if found else _ALL_FINITE


def _is_finite(value: Any) -> bool:
    """Return whether every number in tensors, dataclasses and containers of them is finite."""
    if isinstance(value, Tensor):
        return bool(value.isfinite().all())
    if hasattr(value, "__dataclass_fields__"):
        value = vars(value)
    if isinstance(value, Mapping):
        value = list(value.values())
    return not isinstance(value, (list, tuple)) or all(_is_finite(item) for item in value)
