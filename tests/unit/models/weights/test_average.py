"""The mean of weights against NumPy in float64, and what cannot be averaged."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from models.weights.average import Mean


def weights(seed: int) -> dict[str, Tensor]:
    """Weights of a small net with a batch norm that has seen `seed` batches."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    for _ in range(seed):
        net(torch.randn(8, 4) * seed)
    return net.state_dict()


def mean_of(*found: dict[str, Tensor]) -> dict[str, Tensor]:
    mean = Mean()
    for state in found:
        mean.add(state)
    return mean.state_dict()


def test_weights_and_statistics_are_averaged_and_counters_are_the_last_ones() -> None:
    states = [weights(seed) for seed in (1, 2, 4)]
    found = mean_of(*states)
    assert list(found) == list(states[0])
    for name, tensor in found.items():
        if name == "1.num_batches_tracked":
            assert int(tensor) == 4
            assert tensor.dtype == torch.int64
        else:
            expected = np.mean([s[name].numpy().astype(np.float64) for s in states], axis=0)
            assert tensor.numpy().tobytes() == expected.astype(np.float32).tobytes(), name


def test_rounding_does_not_add_up() -> None:
    states = [{"w": torch.tensor([value])} for value in (2.0**24, *[1.0] * 7)]
    assert mean_of(*states)["w"].item() == np.float32((2**24 + 7) / 8)
    tenths = [{"w": torch.full((9,), 0.1)}] * 7
    assert mean_of(*tenths)["w"].equal(tenths[0]["w"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"0.bias": torch.zeros(4)}, r"'0.bias' is \(4,\) torch.float32, in others \(3,\)"),
        ({"0.bias": torch.zeros(3, dtype=torch.int64)}, "torch.int64, in others"),
        ({"0.bias": torch.tensor([0, math.nan, 0])}, "'0.bias' is not finite in places"),
        ({"more": torch.zeros(1)}, "'more' is in some of the checkpoints alone"),
    ],
)
def test_other_weights_are_refused_and_not_taken_in(change: dict[str, Tensor], words: str) -> None:
    mean = Mean()
    mean.add(weights(1))
    with pytest.raises(ValueError, match=words):
        mean.add({**weights(1), **change})
    assert mean.count == 1
    assert all(mean.state_dict()[name].equal(value) for name, value in weights(1).items())
