"""Records of skipped steps, and the search for where numbers stopped being finite."""

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from engine.guards.guard import LoggedStep
from engine.guards.nonfinite import NonFiniteSteps, first_nonfinite
from engine.optim import Precision
from tests.unit.models.small import random_images, small_model
from util.batch import Batch, PaddedBatch, pad_images
from util.errors import UserError
from util.random_state import random_state_kept

CPU = torch.device("cpu")


def make_guard(folder: Path, model: nn.Module | None = None, **options: int) -> NonFiniteSteps:
    known = {"rank": 0, "limit": 3} | options
    return NonFiniteSteps(model or nn.Linear(2, 2), Precision("fp32", CPU), folder, **known)


def log_step(guard: NonFiniteSteps, step: int, **values: float) -> Path:
    """Log a step, which was not finite unless `values` say else; return its report's path."""
    known = {"loss": math.nan, "loss_ce": 0.5, "grad_norm": math.inf} | values
    guard.on_log(LoggedStep(step, 1, [7, 9], known, {"transformer": 2e-4}))
    return guard._output_dir / "nonfinite" / f"step_{step:08d}_rank{guard._rank}.json"


def test_a_report_is_json_that_any_reader_takes(tmp_path: Path) -> None:
    path = log_step(make_guard(tmp_path, rank=1, limit=5), 12)
    assert path == tmp_path / "nonfinite" / "step_00000012_rank1.json"

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    assert json.loads(path.read_text(), parse_constant=refuse) == {
        "step": 12, "epoch": 1, "rank": 1, "image_ids": [7, 9],
        "losses": {"loss": "nan", "loss_ce": 0.5, "grad_norm": "inf"}, "grad_norm": "inf",
        "scale": 1.0, "learning_rates": {"transformer": 2e-4},
        "first_nonfinite": "the forward pass was finite here, the gradient was not",
        "in_a_row": 1, "total": 1,
    }  # fmt: skip


def test_only_consecutive_failures_end_the_run(tmp_path: Path) -> None:
    guard = make_guard(tmp_path)
    for step in (0, 1):
        log_step(guard, step)
    log_step(guard, 2, loss=1.0, grad_norm=1.0)
    for step in (3, 4):
        log_step(guard, step)
    assert (guard.total, guard.in_a_row) == (4, 2)
    with pytest.raises(UserError) as caught:
        log_step(guard, 5)
    message = str(caught.value)
    path = tmp_path / "nonfinite" / "step_00000005_rank0.json"
    assert path.exists()
    for words in ("step 5", "3 steps in a row", "the gradient was not", str(path), "7, 9",
                  "`resume auto`", "`lr`", "`precision bf16`"):  # fmt: skip
        assert words in message
    assert "\n" not in message
    resumed = make_guard(tmp_path)
    resumed.load_state_dict(guard.state_dict())
    log_step(resumed, 3)  # a new row, else it could never continue
    assert (resumed.total, resumed.in_a_row) == (6, 1)


def test_a_folder_that_cannot_be_written_is_reported(tmp_path: Path) -> None:
    (tmp_path / "nonfinite").write_text("in the way")
    with pytest.raises(UserError, match=r"step_00000000_rank0.json: cannot be written: .*Free"):
        log_step(make_guard(tmp_path), 0)


def test_float16_looking_for_its_scale_is_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    guard = make_guard(tmp_path)
    monkeypatch.setattr(torch.amp.GradScaler, "get_scale", lambda self: 1024.0)
    assert not log_step(guard, 0, loss=1.0).exists()
    assert guard.total == 0
    assert log_step(guard, 1, loss=math.nan).exists()
    monkeypatch.setattr(torch.amp.GradScaler, "get_scale", lambda self: 1.0)
    assert log_step(guard, 2, loss=1.0).exists()


def step_with(guard: NonFiniteSteps, step: int, images: Tensor, loss: float) -> None:
    """Show the guard a step of one micro-batch whose forward pass has changed the model."""
    batch = Batch(pad_images(list(images)), [{"image_id": torch.tensor(7)}] * len(images), [])
    guard.before_step(step, [batch])
    guard._model(batch.images)
    guard.after_step(step, [batch], {"loss": torch.tensor(loss)})


class Normed(nn.Module):
    """A batch norm that may be trained."""

    def __init__(self, *, trained: bool) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3).requires_grad_(trained)

    def forward(self, batch: PaddedBatch, targets: object = None) -> Tensor:
        """Shape: images [N,3,H,W] -> [N,3,H,W]."""
        out: Tensor = self.norm(batch.images)
        return out


def test_the_cause_is_found_after_the_step_and_stands_in_the_report(tmp_path: Path) -> None:
    guard = make_guard(tmp_path, Normed(trained=True))
    images = torch.rand(2, 3, 4, 4)
    images[1, 0, 0, 0] = math.nan
    step_with(guard, 4, images, math.nan)
    step_with(guard, 5, torch.rand(2, 3, 4, 4), 1.0)
    content = json.loads(log_step(guard, 4).read_text())
    assert content["first_nonfinite"] == "image 2 of 2 has pixels that are not finite"
    content = json.loads(log_step(guard, 5).read_text())
    assert content["first_nonfinite"] == "the forward pass was finite here, the gradient was not"


def test_where_values_come_late_the_search_waits_for_them(tmp_path: Path) -> None:
    guard = make_guard(tmp_path, Normed(trained=True), limit=9)
    guard._delay = 1  # as on a GPU
    broken = torch.full((1, 3, 4, 4), math.nan)
    for step, images in enumerate((broken, torch.rand(1, 3, 4, 4), broken)):
        step_with(guard, step, images, math.nan if images is broken else 1.0)
        assert list(guard._causes) == ([0] if step else [])
        assert [number for number, *_ in guard._unchecked] == [step]
    causes = [json.loads(log_step(guard, step).read_text())["first_nonfinite"] for step in range(3)]
    assert ["pixels" in cause for cause in causes] == [True, False, True]
    assert not guard._unchecked
    assert not guard._causes


@pytest.mark.parametrize("trained", [False, True])
def test_norms_forget_a_step_that_was_not_finite(tmp_path: Path, trained: bool) -> None:
    model = Normed(trained=trained).train()  # statistics change in a frozen stage, too
    guard = make_guard(tmp_path, model)
    step_with(guard, 0, torch.rand(2, 3, 4, 4), 1.0)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    assert int(before["norm.num_batches_tracked"]) == 1
    images = torch.rand(2, 3, 4, 4)
    images[0, 0, 0, 0] = math.inf
    step_with(guard, 1, images, math.nan)
    assert all(v.equal(before[k]) for k, v in model.state_dict().items())
    step_with(guard, 2, torch.rand(2, 3, 4, 4), 1.0)
    assert not model.norm.running_mean.equal(before["norm.running_mean"])  # type: ignore[union-attr]


def test_norms_in_evaluation_mode_are_not_copied(tmp_path: Path) -> None:
    guard = make_guard(tmp_path, Normed(trained=False).eval())
    step_with(guard, 0, torch.rand(2, 3, 4, 4), 1.0)
    assert not guard._before


def detector_and_batch(**options: Any) -> tuple[nn.Module, PaddedBatch]:
    return small_model(**options), pad_images(random_images((64, 96), (80, 64)))


@pytest.mark.parametrize(
    "options",
    [{}, {"with_box_refine": True, "two_stage": True}, {"encoder_updates": "sparse"}],
    ids=str,
)
def test_a_healthy_model_is_called_finite(options: dict[str, Any]) -> None:
    model, batch = detector_and_batch(**options)
    assert first_nonfinite(model, batch).startswith("weights, pixels and the forward pass were")


def test_weights_come_first_then_pixels_then_buffers() -> None:
    model, batch = detector_and_batch()
    buffer = next(name for name, _ in model.named_buffers() if name.endswith("running_var"))
    model.get_buffer(buffer)[0] = math.nan
    assert first_nonfinite(model, batch) == f"buffer {buffer} is not finite"
    batch.images[1, 0, 3, 4] = math.inf
    assert first_nonfinite(model, batch) == "image 2 of 2 has pixels that are not finite"
    name = "transformer.encoder.layers.1.linear1.weight"
    with torch.no_grad():
        model.get_parameter(name)[2, 3] = -math.inf
    assert first_nonfinite(model, batch) == f"parameter {name} is not finite"


class Overflow(nn.Module):
    """Finite weights and input, infinite output, wrapped as models wrap what they return."""

    def forward(self, x: Tensor) -> Any:
        """Return nested containers, as models do."""
        return {"layers": [x, (x.exp() * 1e300 * 1e300,)]}


def test_the_first_module_is_named() -> None:
    model, batch = detector_and_batch()
    norm = "transformer.encoder.layers.1.norm1"
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith(norm):
                parameter.fill_(1e308)
    found = first_nonfinite(model, batch)
    assert found == f"module {norm} (ExactLayerNorm) has the first output that is not finite"


def test_outputs_in_containers_are_looked_into() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = Overflow()

        def forward(self, batch: PaddedBatch) -> Any:
            """Return nested containers, as models do."""
            return self.part(batch.images)

    batch = pad_images([torch.ones(3, 4, 4, dtype=torch.float64)])
    assert first_nonfinite(Model(), batch).startswith("module part (Overflow)")


class Noisy(nn.Module):
    """Draws from every generator, keeps statistics, and can fail."""

    def __init__(self, *, fails: bool = False) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.fails = fails

    def forward(self, batch: PaddedBatch) -> Tensor:
        """Change everything that a forward pass can change."""
        random.random()
        np.random.rand()
        out: Tensor = self.norm(batch.images + torch.rand(1))
        if self.fails:
            raise RuntimeError("inside")
        return out


def draws() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(1))


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_and_the_generators_are_left_alone(fails: bool) -> None:
    model, batch = Noisy(fails=fails).train(), pad_images([torch.rand(3, 8, 8)])
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with random_state_kept():
        expected = [draws(), draws()]
    if fails:
        with pytest.raises(RuntimeError, match="inside"):
            first_nonfinite(model, batch)
    else:
        assert "were finite" in first_nonfinite(model, batch)
    assert [draws(), draws()] == expected
    assert all(v.equal(before[k]) for k, v in model.state_dict().items())
    assert model.training
    assert not [m for m in model.modules() if m._forward_hooks]
