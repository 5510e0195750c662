"""`ops/` as a package of its own, and what `python -m ops.build` builds."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ops import BackendError, nvrtc
from ops.build import requested_targets, usual_kinds
from ops.cache import cache_dir

ROOT = Path(__file__).parents[3]


@pytest.mark.long
def test_the_op_runs_under_another_name_without_the_repository(tmp_path: Path) -> None:
    shutil.copytree(
        ROOT / "ops", tmp_path / "msdeform", ignore=shutil.ignore_patterns("__pycache__")
    )
    code = """
import torch
from msdeform import MSDeformAttn
attention = MSDeformAttn(32, n_levels=2, n_heads=4, n_points=2)
query, reference = torch.randn(2, 5, 32), torch.rand(2, 5, 2, 4)
shapes, starts = torch.tensor([(4, 6), (2, 3)]), torch.tensor([0, 24])
mask = torch.zeros(2, 30, dtype=torch.bool)
output = attention(query, reference, torch.randn(2, 30, 32), shapes, starts, mask)
output.sum().backward()
print(tuple(output.shape), bool(attention.sampling_offsets.weight.grad.any()))
"""
    environment = {**os.environ, "MSDEFORM_CACHE": str(cache_dir()), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "(2, 5, 32) True\n"), done.stderr


@pytest.mark.skipif(torch.version.cuda is None, reason="this PyTorch is built without CUDA")
def test_targets_follow_the_list_of_architectures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX 8.0")
    assert requested_targets() == ["compute_90", "sm_80", "sm_90"]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "Hopper")
    with pytest.raises(BackendError, match="'Hopper' is not an entry like 9.0 or 9.0\\+PTX"):
        requested_targets()
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "3.5")
    with pytest.raises(BackendError, match="does not support compute capability 3.5"):
        requested_targets()
    newest = max(nvrtc.architectures())
    assert nvrtc.target(newest + 50) == f"compute_{newest}"


def test_usual_programs_fit_a_block() -> None:
    for kind in usual_kinds():
        assert kind.threads in (64, 128)
        assert kind.lanes * 16 // kind.dtype.itemsize >= kind.channels
