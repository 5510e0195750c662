"""Averaged weights against a loop in double precision; swapping and resuming bit for bit."""

import copy
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from engine.checkpoint import save_checkpoint
from engine.ema import Ema
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


def test_what_does_not_change_stays_to_the_bit() -> None:
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


@pytest.mark.parametrize(
    ("dtype", "kept"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64,) * 2],
)
def test_averages_are_at_least_float32(dtype: torch.dtype, kept: torch.dtype) -> None:
    model = nn.Linear(2, 2).to(dtype)
    ema = Ema(model, 0.5)
    with torch.no_grad():
        model.weight += 1
    ema.update(model)
    assert ema.state_dict()["model"]["weight"].dtype == kept
    with ema.swapped(model):
        assert model.weight.dtype == dtype


def test_swapping_shows_the_averages_and_restores_every_bit() -> None:
    model = Tied()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ema = Ema(model, 0.9)
    trained(model, optimizer)
    ema.update(model)
    with torch.no_grad():
        model.frozen[0] = float("nan")
        model.frozen[1] = -0.0
    own = {k: v.clone().view(torch.uint8) for k, v in model.state_dict().items() if v.dim()}
    pointers = [p.data_ptr() for p in model.parameters()]
    with ema.swapped(model):
        assert same(bits(model), ema.state_dict()["model"])
        assert torch.is_grad_enabled()
    restored = {k: v.view(torch.uint8) for k, v in model.state_dict().items() if v.dim()}
    assert same(own, restored)
    assert pointers == [p.data_ptr() for p in model.parameters()]


def test_swapping_restores_after_an_exception() -> None:
    model = Tied()
    ema = Ema(model, 0.9)
    trained(model, torch.optim.SGD(model.parameters(), lr=0.1))
    own = bits(model)
    ema.update(model)

    def fail_inside() -> None:
        with ema.swapped(model):
            model(torch.randn(6, 4))  # moves the batch norm's statistics, too
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail_inside()
    assert same(bits(model), own)


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
    with ema.swapped(model):
        assert same(bits(model), bits(fresh))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (nn.Linear(4, 3), r"'weight': expected \[2, 4\], got \[3, 4\]"),
        (nn.Linear(4, 2, bias=False), r"'bias': expected \[2\], got nothing"),
        (nn.Bilinear(2, 2, 2), r"'weight': expected \[2, 4\], got \[2, 2, 2\]"),
    ],
)
def test_averages_of_another_model_are_refused(other: nn.Module, message: str) -> None:
    ema = Ema(nn.Linear(4, 2), 0.9)
    before = {k: v.clone() for k, v in ema.state_dict()["model"].items()}
    with pytest.raises(CheckpointError, match=message):
        ema.load_state_dict(Ema(other, 0.9).state_dict())
    assert same(ema.state_dict()["model"], before)
