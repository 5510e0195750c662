"""Compile a Triton kernel for a GPU that is not there."""

from typing import Any

import pytest
import torch

from ops.call import Call
from ops.triton_backend import TritonLaunch, backward_launch, forward_launch

TARGETS = {
    "sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "gfx942": ("hip", "gfx942", 64),
}  # fmt: skip
TYPES = {torch.float32: "*fp32", torch.float64: "*fp64", torch.bfloat16: "*bf16"}


def compile_ahead(
    call: Call, target: str, *, backward: bool, sums: str = ""
) -> tuple[Any, TritonLaunch]:
    """Return the program that computes `call`, and its launch; `sums`: other than the points' type.

    Skips a test where Triton is absent or only interprets.
    """
    pytest.importorskip("triton", minversion="3.3", reason="compiles another kind of source")
    import triton
    from triton.backends.compiler import GPUTarget

    from ops import triton_kernels

    if triton_kernels.INTERPRETED:
        pytest.skip("Triton only interprets, as TRITON_INTERPRET asks")
    storage, exact = TYPES[call.value.dtype], TYPES[call.points.dtype]
    types, kernel = [storage, "*i32", exact, exact, exact, storage], triton_kernels.msda_forward
    launch = forward_launch(call)
    if backward:
        kernel = triton_kernels.msda_backward
        types += ["*fp64" if sums else exact, sums or exact, exact, exact]
        launch = backward_launch(call, to_locations=False, deterministic=bool(sums))
    signature = [*types, "i32", "i32", *["constexpr"] * len(launch.constants)]
    source = triton.compiler.ASTSource(
        kernel, dict(zip(kernel.arg_names, signature, strict=True)), launch.constants,
        {(i,): [["tt.divisibility", 16]] for i in range(len(types))},
    )  # fmt: skip
    options = {"num_warps": launch.warps, "num_stages": 1, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget(*TARGETS[target]), options=options), launch
