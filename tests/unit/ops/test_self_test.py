"""The self-test of the backends finds a wrong one, whichever it is."""

import pytest
import torch

from ops import reference
from ops.self_test import MAX_ERROR, self_test


def test_the_backend_in_pytorch_is_not_its_own_judge(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, grids = torch.device("cpu"), reference._grids
    assert self_test("reference", cpu) < MAX_ERROR
    monkeypatch.setattr(reference, "_grids", lambda locations: grids(locations) + 0.01)
    assert self_test("reference", cpu) > MAX_ERROR
