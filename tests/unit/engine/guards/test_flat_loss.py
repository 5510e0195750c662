"""The warning for a flat loss: when it comes, when it does not, and what it says."""

import json
import math
import random
from collections.abc import Callable, Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.guards.flat_loss import FlatLoss


def make_guard(**options: float) -> FlatLoss:
    return FlatLoss(effective_batch=4, lr=2e-4, **options)  # type: ignore[arg-type]


def warnings(guard: FlatLoss, losses: Iterable[float], first: int = 0) -> list[int]:
    """Return the steps at which the watchdog warns."""
    return [step for step, loss in enumerate(losses, first) if guard.add(step, loss)]


def noisy(curve: Callable[[int], float], steps: int, noise: float, seed: int) -> list[float]:
    """Return a curve times noise that is never negative, as losses of small batches have."""
    source = random.Random(seed)
    spread = math.sqrt(math.log(1 + noise**2))
    return [curve(step) * source.lognormvariate(-(spread**2) / 2, spread) for step in range(steps)]


@given(st.integers(0, 10**6), st.floats(0.0, 0.4), st.floats(0.1, 50.0))
def test_a_flat_loss_is_reported_once(seed: int, noise: float, level: float) -> None:
    steps = warnings(make_guard(), noisy(lambda _: level, 2500, noise, seed))
    assert len(steps) == 1
    assert 499 <= steps[0] <= 1500


@given(st.integers(0, 10**6), st.floats(0.0, 0.25), st.floats(1.0, 50.0), st.floats(0.5, 1.0))
def test_a_loss_that_falls_and_converges_is_never_reported(
    seed: int, noise: float, level: float, fall: float
) -> None:
    def curve(step: int) -> float:
        return level * (1 - fall + fall * math.exp(-step / 300))

    assert warnings(make_guard(), noisy(curve, 3000, noise, seed)) == []


def test_a_rising_loss_is_reported() -> None:
    assert warnings(make_guard(), noisy(lambda step: 5 + step / 100, 1000, 0.2, 0)) == [499]


def test_a_tiny_but_steady_fall_is_flat() -> None:
    assert warnings(make_guard(), (10 - step * 1e-4 for step in range(700))) == [499]


@pytest.mark.parametrize("unit", [0.01, 1.0, 1000.0])
def test_only_the_first_losses_are_the_reference(unit: float) -> None:
    """A loss that has fallen to a half of its start may stay there; one near its start may not."""
    fallen = [unit * (20 if step < 60 else 10) for step in range(2000)]
    assert warnings(make_guard(), fallen) == []
    assert warnings(make_guard(), noisy(lambda _: 20 * unit, 2000, 0.3, 1)) != []


def test_an_old_state_loads() -> None:
    """As checkpoints have it that were saved while the loss's parts gave a bound."""
    guard = make_guard(window=40)
    guard.load_state_dict({"start": 30.0, "warned": False, "blocks": [], "block": [0.0] * 4})
    assert warnings(guard, [30.0] * 40) == [39]


def test_a_loss_that_returns_to_its_start_is_reported_again() -> None:
    guard = make_guard(window=50)
    assert warnings(guard, [10.0] * 200) == [49]
    assert warnings(guard, [10.0 - step / 50 for step in range(200)], 200) == []
    assert len(warnings(guard, [10.0] * 200, 400)) == 1


def test_losses_that_are_not_finite_are_passed_over() -> None:
    losses = noisy(lambda _: 3.0, 500, 0.2, 2)
    mixed = [x for loss in losses for x in (loss, math.nan, math.inf, -math.inf)]
    assert warnings(make_guard(), mixed) == [step * 4 for step in warnings(make_guard(), losses)]


@given(st.integers(0, 99))
def test_a_resumed_guard_equals_an_uninterrupted_one(cut: int) -> None:
    losses = noisy(lambda _: 3.0, 100, 0.2, 3)
    whole, part, resumed = make_guard(window=40), make_guard(window=40), make_guard(window=40)
    expected = warnings(whole, losses)
    found = warnings(part, losses[:cut])
    resumed.load_state_dict(json.loads(json.dumps(part.state_dict())))
    found += warnings(resumed, losses[cut:], cut)
    assert found == expected != []
    assert resumed.state_dict() == whole.state_dict()


def test_the_warning_states_what_was_seen_and_what_to_try() -> None:
    guard = make_guard(window=20)
    messages = [text for step in range(100, 120) if (text := guard.add(step, 31.5))]
    (text,) = messages
    for words in (
        "from step 100 to 119", "31.5", "effective batch of 4", "`lr 0.0002`", "pictures/",
        "`effective_batch_size 32`", "`warmup_steps 1000`", "main.py doctor",
    ):  # fmt: skip
        assert words in text
    assert "\n" not in text


def test_a_window_too_short_to_judge_is_refused() -> None:
    with pytest.raises(ValueError, match="9 steps are too few, use at least 10"):
        make_guard(window=9)
