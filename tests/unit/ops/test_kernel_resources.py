"""What the CUDA kernel becomes as machine code: no spilled registers, wide reads, few waits."""

from pathlib import Path

import pytest
import torch

from ops import nvrtc
from ops.call import BackendError
from ops.cuda import KernelKind
from tests.benchmarks.kernel_resources import KERNELS, LIMITS, Code, compile_kind, per_sample, tool
from tests.lanes import some
from tests.unit.ops.presets import Layer, layers

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
SMALL = Layer(8, 16, 3, 4, 4)


@pytest.fixture(scope="session")
def _tools() -> None:
    try:
        nvrtc.version()
    except BackendError as error:
        pytest.skip(str(error))
    if not (tool("cuobjdump") and tool("nvdisasm")):
        pytest.skip("needs cuobjdump and nvdisasm, of the CUDA toolkit or of Triton")


@pytest.mark.long
@pytest.mark.usefixtures("_tools")
@pytest.mark.parametrize(
    ("layer", "capability"),
    [
        pytest.param(layer, c, marks=() if (layer, c) == (SMALL, 90) else pytest.mark.slow)
        for layer in layers()
        for c in LIMITS
        if c in (80, 90) or layer == SMALL
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", some((F32, BF16, F16), BF16))
def test_machine_code_of_the_presets(
    dtype: torch.dtype, capability: int, layer: Layer, tmp_path: Path
) -> None:
    sizes = layer.heads, layer.channels, layer.levels, layer.points, layer.form
    for deterministic in (False, True):
        kind = KernelKind(dtype, *sizes, deterministic=deterministic)
        codes = compile_kind(kind, capability, tmp_path)
        forward, backward = (codes[name] for name in KERNELS)
        for code in (forward, backward):
            assert code.local == 0, "spilled registers, or arrays in memory"
            assert code.occupancy(kind.threads, capability) >= 0.4
            assert code.count("LDG.E.128") == code.count("LDG"), "rows are read in pieces"
            assert code.count("LDG") % 4 == 0
            assert code.waits < 2, "corners are read only after others have come"
        added = 4 * 16 // dtype.itemsize // (1 if deterministic or capability < 90 else 4)
        assert backward.count("RED") == added * backward.count("LDG") // 4


@pytest.mark.long
@pytest.mark.usefixtures("_tools")
def test_half_precision_takes_fewer_instructions(tmp_path: Path) -> None:
    counts = {}
    for dtype in (F32, BF16, F16):
        kind = KernelKind(dtype, 8, 32, 4, 4, 2)
        code = compile_kind(kind, 90, tmp_path)[KERNELS[0]]
        counts[dtype] = per_sample(kind, code) * kind.lanes  # a warp has 32 / lanes queries
    assert counts[BF16] < counts[F32]
    assert counts[F16] < counts[F32]


def code_with(registers: int, shared: int = 0) -> Code:
    return Code(registers, 0, shared, ())


@pytest.mark.parametrize(
    ("threads", "registers", "share"),
    # the two examples of NVIDIA's best practices guide, and full and half files of registers
    [(128, 37, 48 / 64), (320, 37, 40 / 64), (128, 32, 1.0), (128, 64, 0.5), (128, 255, 8 / 64)],
)
def test_occupancy_by_registers(threads: int, registers: int, share: float) -> None:
    assert code_with(registers).occupancy(threads, 80) == share


def test_occupancy_by_shared_memory_and_blocks() -> None:
    assert code_with(16, 39 << 10).occupancy(128, 80) == 4 * 4 / 64  # 160 of 164 KiB
    assert code_with(16, 40 << 10).occupancy(128, 80) == 4 * 4 / 64  # 164, the system's included
    assert code_with(16, 41 << 10).occupancy(128, 80) == 3 * 4 / 64
    assert code_with(16, 16 << 10).occupancy(128, 75) == 4 * 4 / 32
    assert code_with(16).occupancy(32, 90) == 32 / 64  # at most 32 blocks


def test_waits_are_counted_where_reads_come_one_by_one() -> None:
    def turn(*names: str) -> Code:
        listing = [tuple(name.split(" ", 1)) for name in names]
        return Code(32, 0, 0, (*((n, o, None) for n, o in listing), ("BRA", "", 0)))

    one_by_one = [
        line for r in (4, 8, 12, 16) for line in (f"LDG.E.128 R{r}, [R2]", f"FFMA R0, R{r + 3}, R1")
    ]
    at_once = one_by_one[::2] + one_by_one[1::2]
    assert turn(*one_by_one).waits == 4
    assert turn(*at_once).waits == 1
