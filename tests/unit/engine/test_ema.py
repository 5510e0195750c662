"""Averaged weights against a loop in double precision; evaluating and resuming bit for bit."""

import copy
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from engine.checkpoint import save_checkpoint
from engine.ema import Ema
from tests.unit.models.small import random_images, small_model
from util.batch import pad_images
from util.errors import CheckpointError


class Tied(nn.Module):
    """Two names for one layer, a batch norm with a counter, and a frozen parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = self.first
        self.norm = nn.BatchNorm1d(4)
        self.frozen = nn.Parameter(torch.randn(3), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the one layer twice. Shape: [N,4] -> [N,4]."""
        out: Tensor = self.norm(self.second(self.first(x)))
        return out


def trained(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Make one step on new random numbers."""
    optimizer.zero_grad()
    model(torch.randn(6, 4)).square().sum().backward()
    optimizer.step()


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return list(a) == list(b) and all(a[key].equal(b[key]) for key in a)


@pytest.mark.long
@given(st.sampled_from([0.0, 0.15, 0.5, 0.9, 0.9999]), st.integers(0, 8))
def test_averages_are_those_of_a_loop_in_double_precision(decay: float, steps: int) -> None:
    model = Tied()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ema = Ema(model, decay)
    expected = {k: v.double() for k, v in bits(model).items()}
    for n in range(steps):
        trained(model, optimizer)
        ema.update(model)
        kept = min(decay, (n + 1) / (n + 10))
        for key, value in bits(model).items():
            expected[key] = expected[key] * kept + value.double() * (1 - kept)
    state = ema.state_dict()
    assert state["count"] == steps
    assert list(state["model"]) == list(expected)
    for key, value in state["model"].items():
        if key == "norm.num_batches_tracked":
            assert int(value) == steps
            assert value.dtype == torch.int64
        else:
            torch.testing.assert_close(value.double(), expected[key], rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("decay", "tau", "expected"),
    [
        (0.993, 100.0, {1: 0.009881, 100: 0.627696, 500: 0.986309}),
        (0.9999, 2000.0, {1: 0.9999 * 0.000499875, 2000: 0.9999 * 0.632121}),
    ],
)
def test_the_decay_rises_as_published(decay: float, tau: float, expected: dict[int, float]) -> None:
    ema = Ema(nn.Linear(1, 1), decay, tau)
    found = {}
    for number in expected:
        ema.count = number - 1
        found[number] = ema.present_decay
    assert found == pytest.approx(expected, abs=1e-6)


def test_averages_with_a_rising_decay_are_those_of_a_loop_in_double_precision() -> None:
    torch.manual_seed(5)
    model = Tied()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ema = Ema(model, 0.9, 3.0)
    expected = {k: v.double() for k, v in bits(model).items() if v.is_floating_point()}
    for number in range(1, 8):
        trained(model, optimizer)
        ema.update(model)
        kept = 0.9 * (1 - math.exp(-number / 3))
        for key, value in expected.items():
            expected[key] = value * kept + bits(model)[key].double() * (1 - kept)
    for key, value in expected.items():
        torch.testing.assert_close(
            ema.state_dict()["model"][key].double(), value, rtol=2e-6, atol=1e-7
        )


def test_unchanging_weights_stay_bit_equal() -> None:
    model = Tied()
    before = bits(model)
    ema = Ema(model, 0.999)
    for _ in range(20):
        ema.update(model)
    assert same(ema.state_dict()["model"], before)


def test_shared_weights_are_one_average() -> None:
    ema = Ema(Tied(), 0.9)
    averages = ema.state_dict()["model"]
    assert averages["first.weight"].data_ptr() == averages["second.weight"].data_ptr()


def test_the_averaged_model_computes_with_the_averages_alone() -> None:
    model = Tied().eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ema = Ema(model, 0.9)
    trained(model, optimizer)
    ema.update(model)
    own = bits(model)
    inputs = torch.randn(6, 4)
    expected = Tied().eval()
    expected.load_state_dict(ema.state_dict()["model"])
    assert ema.model(inputs).equal(expected(inputs))
    assert not ema.model(inputs).equal(model(inputs))
    ema.model.train()
    ema.model(inputs)  # moves the statistics of its own batch norm
    assert same(bits(model), own)


@pytest.mark.long
@pytest.mark.parametrize("backbone", ["resnet18", "timm/test_resnet", "timm/test_vit"])
def test_a_copied_detector_is_one_of_its_own(backbone: str) -> None:
    model = small_model(backbone=backbone).eval()
    ema = Ema(model, 0.5)
    batch = pad_images(random_images((64, 96), (64, 96)))
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.01)
        changed, kept = model(batch)["pred_logits"], ema.model(batch)["pred_logits"]
        assert not changed.equal(kept)
        model.load_state_dict(ema.state_dict()["model"])
        assert model(batch)["pred_logits"].equal(kept)


def test_a_resumed_average_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    torch.manual_seed(3)
    model = Tied().to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ema = Ema(model, 0.8)
    for step in range(6):
        trained(model, optimizer)
        ema.update(model)
        if step == 2:
            save_checkpoint(tmp_path / "last.pth", {"ema": ema.state_dict()})
            content = torch.load(tmp_path / "last.pth", weights_only=True)
            other = Ema(copy.deepcopy(model), 0.8)
            other.load_state_dict(content["ema"])
        if step > 2:
            other.update(model)
    assert other.count == ema.count == 6
    assert same(other.state_dict()["model"], ema.state_dict()["model"])
    fresh = Tied()
    fresh.load_state_dict(ema.state_dict()["model"])
    assert same(bits(ema.model), bits(fresh))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (nn.Linear(4, 3), r"'weight' is \(3, 4\), the model's \(2, 4\)"),
        (nn.Linear(4, 2, bias=False), "'bias' is missing"),
        (nn.Bilinear(2, 2, 2), r"'weight' is \(2, 2, 2\), the model's \(2, 4\)"),
    ],
)
def test_averages_of_a_different_model_are_refused(other: nn.Module, message: str) -> None:
    ema = Ema(nn.Linear(4, 2), 0.9)
    before = {k: v.clone() for k, v in ema.state_dict()["model"].items()}
    with pytest.raises(CheckpointError, match=f"^averaged weights: .*{message}"):
        ema.load_state_dict(Ema(other, 0.9).state_dict())
    assert same(ema.state_dict()["model"], before)
