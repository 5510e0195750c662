"""torchvision's focal loss, which training uses, against its definition and its limits."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision.ops import sigmoid_focal_loss

from tests.unit.models.definitions import focal


@given(st.floats(-30, 30), st.booleans(), st.floats(0, 1))
def test_value_and_gradient_follow_the_definition(x: float, positive: bool, alpha: float) -> None:
    logit = torch.tensor(x, dtype=torch.float64, requires_grad=True)
    target = torch.tensor(positive, dtype=torch.float64)
    loss = sigmoid_focal_loss(logit, target, alpha=alpha)
    expected = focal(logit, positive, alpha)
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-15)
    (ours,) = torch.autograd.grad(loss, logit)
    (theirs,) = torch.autograd.grad(expected, logit)
    torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-15)


def test_without_focus_it_is_half_the_cross_entropy() -> None:
    logits, targets = torch.randn(4, 5), torch.randint(2, (4, 5)).float()
    loss = sigmoid_focal_loss(logits, targets, alpha=0.5, gamma=0.0)
    entropy = torch.nn.functional.binary_cross_entropy_with_logits(
        logits, targets, reduction="none"
    )
    torch.testing.assert_close(loss, entropy / 2)


@pytest.mark.parametrize("target", [0.0, 1.0])
def test_extreme_logits_stay_finite(target: float) -> None:
    logits = torch.tensor([-1e4, -100.0, 100.0, 1e4], requires_grad=True)
    loss = sigmoid_focal_loss(logits, torch.full_like(logits, target), alpha=0.25)
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    assert loss.isfinite().all()
    assert gradient.isfinite().all()
