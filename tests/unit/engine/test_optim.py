"""Precision and schedule: what is refused, updates dropped without a trace, scale and rate."""

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from engine.optim import Precision, Schedule
from util.errors import ConfigError

CPU = torch.device("cpu")
NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
ON_GPU = pytest.param("cuda", marks=[pytest.mark.gpu, NEEDS_CUDA])


@pytest.fixture(autouse=True)
def _same_products() -> Iterator[None]:
    """Undo what a test says about float32 products."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def network(device: str, *, fused: bool) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3)).to(device)
    return model, torch.optim.AdamW(model.parameters(), lr=0.1, fused=fused)


def train_step(
    precision: Precision, model: nn.Module, optimizer: torch.optim.Optimizer, factor: float = 1.0
) -> Tensor:
    """Make one step on fixed numbers; `factor` multiplies the loss."""
    numbers = torch.linspace(-1, 1, 20, device=precision.device).view(4, 5)
    with precision.autocast():
        output = model(numbers)
    loss = output.float().square().mean() * factor
    optimizer.zero_grad(set_to_none=True)
    precision.scaler.scale(loss).backward()
    precision.scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    precision.step(optimizer, norm)
    return norm


def everything(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Return copies of the weights and of all that the optimiser keeps."""
    state = [v for s in optimizer.state_dict()["state"].values() for v in s.values()]
    return [t.detach().clone() for t in (*model.parameters(), *state)]


@pytest.mark.parametrize("device", ["cpu", ON_GPU])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_dropped_update_leaves_no_trace(device: str, fused: bool, bad: float) -> None:
    precision = Precision("fp32", torch.device(device))
    model, optimizer = network(device, fused=fused)
    train_step(precision, model, optimizer)
    assert precision.found_inf.item() == 0
    before = everything(model, optimizer)
    assert not train_step(precision, model, optimizer, bad).isfinite()
    assert precision.found_inf.item() == 1
    after = everything(model, optimizer)
    assert len(before) == 4 + 4 * 3
    assert all(a.equal(b) for a, b in zip(after, before, strict=True))
    assert not hasattr(optimizer, "found_inf")


@pytest.mark.parametrize("fused", [True, False])
def test_a_run_with_dropped_updates_equals_one_without_them(fused: bool) -> None:
    precision = Precision("fp32", CPU)
    torch.manual_seed(1)
    model, optimizer = network("cpu", fused=fused)
    torch.manual_seed(1)
    plain, plain_optimizer = network("cpu", fused=fused)
    for factor in (math.nan, 1.0, math.inf, 2.0, math.nan, 0.5):  # the first is before any state
        train_step(precision, model, optimizer, factor)
        if math.isfinite(factor):
            train_step(Precision("fp32", CPU), plain, plain_optimizer, factor)
    pairs = zip(everything(model, optimizer), everything(plain, plain_optimizer), strict=True)
    assert all(a.equal(b) for a, b in pairs)


def test_the_fused_flag_of_a_loaded_state_is_heeded() -> None:
    model, optimizer = network("cpu", fused=True)
    optimizer.load_state_dict(network("cpu", fused=False)[1].state_dict())
    before = everything(model, optimizer)
    train_step(Precision("fp32", CPU), model, optimizer, math.nan)
    assert all(a.equal(b) for a, b in zip(everything(model, optimizer), before, strict=True))
    train_step(Precision("fp32", CPU), model, optimizer)
    assert not everything(model, optimizer)[0].equal(before[0])


def test_bf16_multiplies_in_bfloat16_and_keeps_float32_weights() -> None:
    precision = Precision("bf16", CPU)
    model, optimizer = network("cpu", fused=True)
    for _ in range(2):  # a context is new each time
        with precision.autocast():
            assert model(torch.ones(1, 5)).dtype == torch.bfloat16
    assert model(torch.ones(1, 5)).dtype == torch.float32
    train_step(precision, model, optimizer)
    assert all(t.dtype == torch.float32 for t in everything(model, optimizer))
    with Precision("fp32", CPU).autocast():
        assert model(torch.ones(1, 5)).dtype == torch.float32


def test_the_scale_shrinks_with_each_dropped_update_and_is_resumed() -> None:
    precision = Precision("fp32", CPU)
    precision.scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=2)
    model, optimizer = network("cpu", fused=True)
    scales, states = [], []
    for factor in (1.0, math.nan, 1.0, 1.0, 1.0):
        norm = train_step(precision, model, optimizer, factor)
        scales.append(precision.scaler.get_scale())
        states.append(precision.scaler.state_dict())
    assert scales == [64.0, 32.0, 32.0, 64.0, 64.0]
    assert 1e-3 < norm < 1e2  # of unscaled gradients
    resumed = Precision("fp32", CPU)
    resumed.scaler = torch.amp.GradScaler("cpu")
    resumed.scaler.load_state_dict(states[2])
    train_step(resumed, model, optimizer)
    assert resumed.scaler.get_scale() == 64.0  # the second good step in a row, counted on


def test_scaled_gradients_are_those_of_the_loss() -> None:
    scaled, plain = Precision("fp32", CPU), Precision("fp32", CPU)
    scaled.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    results = []
    for precision in (scaled, plain):
        torch.manual_seed(2)
        model, optimizer = network("cpu", fused=True)
        train_step(precision, model, optimizer)
        results.append(everything(model, optimizer))
    assert all(a.equal(b) for a, b in zip(*results, strict=True))  # powers of two are exact


def test_no_scale_without_fp16() -> None:
    precision = Precision("bf16", CPU)
    loss = torch.ones((), requires_grad=True)
    assert precision.scaler.scale(loss) is loss
    assert precision.scaler.get_scale() == 1.0
    assert precision.scaler.state_dict() == {}
    precision.scaler.load_state_dict({"scale": 4.0})
    assert precision.scaler.get_scale() == 1.0


@pytest.mark.parametrize(("name", "instead"), [("fp16", "bf16"), ("tf32", "fp32")])
def test_precisions_that_the_cpu_lacks_are_refused(name: str, instead: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"^precision {name}: needs a CUDA device.*`precision {instead}`"
    ):
        Precision(name, CPU)


@pytest.mark.parametrize("name", ["bf16", "fp16"])
def test_a_device_without_bfloat16_is_refused_without_advice_to_use_it(name: str) -> None:
    with pytest.raises(ConfigError, match=f"^precision {name}: needs .*meta.*`precision fp32`"):
        Precision(name, torch.device("meta"))


def test_only_the_requested_precision_is_tested(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("util.device.has_bfloat16")
    Precision("fp32", CPU)


@pytest.mark.gpu
@NEEDS_CUDA
@pytest.mark.parametrize("name", ["fp32", "tf32", "fp16"])
def test_cuda_says_how_float32_products_are_made(name: str) -> None:
    Precision(name, torch.device("cuda"))
    assert torch.backends.cuda.matmul.allow_tf32 is (name == "tf32")
    assert torch.backends.cudnn.allow_tf32 is (name == "tf32")


@pytest.mark.gpu
@NEEDS_CUDA
def test_fp16_drops_an_overflow_without_waiting_for_the_device() -> None:
    precision = Precision("fp16", torch.device("cuda"))
    model, optimizer = network("cuda", fused=True)
    train_step(precision, model, optimizer)
    before = everything(model, optimizer)
    torch.cuda.set_sync_debug_mode("error")
    try:
        train_step(precision, model, optimizer, 1e38)  # times 65536 is beyond float32
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert precision.scaler.get_scale() == 2.0**15
    assert all(a.equal(b) for a, b in zip(everything(model, optimizer), before, strict=True))


@pytest.mark.parametrize(
    ("kind", "drop_epochs", "expected"),
    [
        ("step", (), [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 0.1, 0.1, 0.1]),
        ("step", (1, 2), [0.25, 0.5, 0.75, 0.1, 0.1, 0.1, 0.01, 0.01, 0.01]),
        ("cosine", (), [0.25, 0.4665063509461097, 0.5625, 0.5, 0.25, 0.0669872981077807, 0.0, 0.0]),
    ],
)
def test_the_rate_warms_up_and_falls(
    kind: str, drop_epochs: tuple[int, ...], expected: list[float]
) -> None:
    schedule = Schedule(kind=kind, epochs=2, warmup_steps=4, drop_every=2, drop_epochs=drop_epochs)
    factor = schedule.over(6)
    assert [factor(step) for step in range(len(expected))] == pytest.approx(expected)
    unknown = schedule.over(None)
    assert [unknown(step) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_flat_cosine_has_the_published_values() -> None:
    """DEIM's rule with T 1000, w 100, f 540, n 60 and gamma 0.5, computed by hand."""
    factor = Schedule(
        kind="flat_cosine", epochs=7, flat=0.54, tail=0.06, final=0.5, warmup_steps=100,
        warmup_shape="quadratic",
    ).over(1000)  # fmt: skip
    expected = {0: 0.0, 50: 0.25, 100: 1.0, 540: 1.0, 640: 0.926777, 740: 0.75, 840: 0.573223,
                940: 0.5, 1000: 0.5, 2000: 0.5}  # fmt: skip
    assert {t: factor(t) for t in expected} == pytest.approx(expected, abs=1e-6)
    falling = [factor(t) for t in range(540, 941)]
    assert falling == sorted(falling, reverse=True)


@pytest.mark.parametrize(
    ("flat", "tail", "expected"),
    [
        (1.0, 0.0, [1.0] * 5),
        (0.0, 1.0, [1.0, 0.1, 0.1, 0.1, 0.1]),
        (0.5, 0.5, [1.0, 1.0, 1.0, 0.1, 0.1]),
        (0.0, 0.0, [1.0, 0.868198, 0.55, 0.231802, 0.1]),
    ],
)
def test_flat_cosine_may_lack_a_part(flat: float, tail: float, expected: list[float]) -> None:
    schedule = Schedule(kind="flat_cosine", epochs=1, flat=flat, tail=tail, final=0.1)
    factor = schedule.over(4)
    assert [factor(step) for step in range(5)] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("drop_epochs", [(), (2, 4)])
def test_drops_are_stretched_over_a_run_of_any_length(drop_epochs: tuple[int, ...]) -> None:
    """After two and four of five epochs, whose length in steps need not be whole."""
    factor = Schedule(kind="step", epochs=5, drop_every=2, drop_epochs=drop_epochs).over(13)
    drops = [round(-math.log10(factor(step))) for step in range(13)]
    assert drops == [sum(step / 13 >= share - 1e-9 for share in (0.4, 0.8)) for step in range(13)]
