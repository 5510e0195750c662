"""Dropout with cheap masks against what defines dropout."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.layers import Dropout

COUNT = 200_003  # no multiple of the four masks that one number gives


@settings(max_examples=15)
@given(st.floats(0.01, 0.99))
def test_elements_are_dropped_at_the_stated_rate_and_the_mean_is_kept(p: float) -> None:
    output = Dropout(p).train()(torch.ones(COUNT, dtype=torch.float64))
    kept = output != 0
    five_sigma = 5 * math.sqrt(p * (1 - p) / COUNT)
    assert abs(float((~kept).double().mean()) - p) < five_sigma + 2**-16
    assert torch.unique(output[kept]).numel() == 1
    assert float(output.max()) == pytest.approx(1 / (1 - p), rel=2**-16 / (1 - p))
    for lag in (1, 2, 3, 4):  # neighbours from one random number are independent too
        both = (kept[lag:] & kept[:-lag]).double().mean()
        assert abs(float(both) - (1 - p) ** 2) < 2 * five_sigma + 2**-15


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_gradient_is_that_of_the_same_mask(dtype: torch.dtype) -> None:
    x = torch.rand(7, 3, 5).to(dtype).add(1).requires_grad_()
    output = Dropout(0.5).train()(x)
    torch.autograd.backward(output, torch.ones_like(output))
    assert output.dtype == dtype
    assert x.grad is not None
    assert torch.equal(x.grad, torch.where(output == 0, 0.0, 2.0).to(dtype))
    assert 0 < (output == 0).sum() < output.numel()


def test_the_seed_decides_and_evaluation_drops_nothing() -> None:
    x, dropout = torch.randn(50, 10), Dropout(0.3).train()
    torch.manual_seed(3)
    first, second = dropout(x), dropout(x)
    torch.manual_seed(3)
    assert torch.equal(dropout(x), first)
    assert not torch.equal(second, first)
    assert torch.equal(dropout.eval()(x), x)


@pytest.mark.parametrize("p", [0.0, 1.0, 1e-7])
def test_extreme_rates(p: float) -> None:
    output = Dropout(p).train()(torch.ones(100))
    torch.testing.assert_close(output, torch.full((100,), 0.0 if p == 1 else 1.0))


def test_empty_tensors_are_accepted() -> None:
    assert Dropout(0.1).train()(torch.empty(0, 4)).shape == (0, 4)
