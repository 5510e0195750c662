"""Read what the compilers made of the GPU kernels; estimate their time on an H100. Needs no GPU.

    python -m tests.benchmarks.kernel_resources            # tables in Markdown

Registers, memory and instructions are read from the machine code, with `cuobjdump` and `nvdisasm`
from the path or from Triton. Occupancy follows from them and from the limits that NVIDIA's
programming guide gives. Times are lower bounds from what is counted, at the rates in `H100`.
"""

import argparse
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch

from ops import nvrtc
from ops.cache import SOURCES
from ops.call import Call
from ops.cuda import KernelKind
from tests.unit.ops.triton_ahead import compile_ahead

KERNELS = ("msda_forward", "msda_backward")
_REGISTERS, _REGISTER_UNIT, _SHARED_UNIT = 65536, 256, 128  # of a multiprocessor; allocated in
_RESERVED = 1024  # bytes of shared memory that each block gives to the system, from 8.0 on


@dataclass(frozen=True)
class Limits:
    """What a multiprocessor holds at once."""

    warps: int
    blocks: int
    shared: int  # bytes


LIMITS = {
    75: Limits(32, 16, 64 << 10),
    80: Limits(64, 32, 164 << 10),
    86: Limits(48, 16, 100 << 10),
    89: Limits(48, 24, 100 << 10),
    90: Limits(64, 32, 228 << 10),
}


@dataclass(frozen=True)
class H100:
    """Rates of an H100 (SXM), per second: assumptions, of which no one was measured here."""

    clock = 1.755e9
    multiprocessors = 132
    memory = 3.0e12  # bytes: nine tenths of what it is sold with
    issue = multiprocessors * 4 * clock  # instructions of a warp
    first_level = multiprocessors * 128 * clock  # bytes, from cache and from shared memory
    second_level = 5.5e12  # bytes read; how many it adds to is published nowhere


def tool(name: str) -> str | None:
    """Return the path of a program of the CUDA toolkit, or of Triton's copy."""
    if found := shutil.which(name):
        return found
    try:
        import triton
    except ImportError:
        return None
    beside = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    return str(beside) if beside.exists() else None


def _run(name: str, *arguments: str) -> str:
    program = tool(name)
    if program is None:
        raise SystemExit(f"{name} is neither on the PATH nor in Triton: pip install triton")
    done = subprocess.run([program, *arguments], capture_output=True, text=True, check=True)
    return done.stdout


@dataclass(frozen=True)
class Code:
    """Machine code of one kernel.

    Args:
        registers: of a thread.
        local: bytes of a thread in memory: spilled registers and arrays.
        shared: bytes of a block, without what the system reserves.
        instructions: names with their operands, in order, `BRA` with the place it goes to.
    """

    registers: int
    local: int
    shared: int
    instructions: tuple[tuple[str, str, int | None], ...]

    @cached_property
    def loop(self) -> range:
        """The instructions of the loop over levels: the backward branch around most reads."""
        spans = [
            range(to, at + 1)
            for at, (name, _, to) in enumerate(self.instructions)
            if name == "BRA" and to is not None and to <= at
        ]
        return max(spans, key=lambda span: self.count("LDG", span), default=range(0))

    def count(self, prefix: str, span: range | None = None) -> int:
        """Return how many instructions have this name, in the loop or in `span`."""
        chosen = self.loop if span is None else span
        return sum(self.instructions[i][0].startswith(prefix) for i in chosen)

    @property
    def waits(self) -> float:
        """How often a warp waits for reads of corners, for each sample.

        A wait lasts until all that was read before it has come. Counted in the second of two turns
        of the loop, whose reads of 4 corners are one sample.
        """
        waits, turn_began, last, issued = 0, 0, -1, dict[int, int]()
        turns = [self.instructions[i] for i in self.loop] * 2
        for at, (name, operands, _) in enumerate(turns):
            if at == len(self.loop):
                turn_began = waits
            words = operands.split(",")
            reads = words if name.startswith(("ST", "RED")) else words[1:]
            used = {int(r) for word in reads for r in re.findall(r"\bR(\d+)", word)}
            due = [issued.pop(r) for r in used if r in issued]
            if due and max(due) > last:
                waits, last = waits + 1, at
            if name.startswith("LDG"):
                first = int(words[0].strip().removeprefix("R"))
                wide = 4 if ".128" in name else 2 if ".64" in name else 1
                issued.update(dict.fromkeys(range(first, first + wide), at))
        return (waits - turn_began) / max(self.count("LDG") / 4, 1)

    @property
    def outside(self) -> int:
        """Instructions before and after the loop; what follows the end is for rare operands."""
        names = [name for name, _, _ in self.instructions]
        end = len(names) - names[::-1].index("EXIT")
        return end - len(self.loop)

    def occupancy(self, threads: int, capability: int) -> float:
        """Return the share of a multiprocessor's warps that its blocks of `threads` fill."""
        limits, warps = LIMITS[capability], threads // 32
        registers = _ceil(self.registers * 32, _REGISTER_UNIT)
        shared = _ceil(self.shared + (_RESERVED if capability >= 80 else 0), _SHARED_UNIT)
        blocks = min(
            limits.blocks,
            limits.warps // warps,
            # a quarter of the registers belongs to each of four schedulers
            4 * (_REGISTERS // 4 // registers) // warps,
            limits.shared // shared if shared else limits.blocks,
        )
        return blocks * warps / limits.warps


def _ceil(number: int, unit: int) -> int:
    return -(-number // unit) * unit


def read_code(cubin: Path, capability: int) -> dict[str, Code]:
    """Return the kernels of a file of machine code by name."""
    usage = _run("cuobjdump", "-res-usage", str(cubin))
    listing = _run("nvdisasm", "-c", str(cubin))
    found = {}
    pattern = r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)"
    for name, registers, stack, shared, local in re.findall(pattern, usage):
        reserved = _RESERVED if capability >= 90 else 0  # counted in from there on
        found[name] = Code(
            int(registers), int(stack) + int(local), max(int(shared) - reserved, 0),
            tuple(_instructions(listing, name)),
        )  # fmt: skip
    return found


def _instructions(listing: str, kernel: str) -> Iterator[tuple[str, str, int | None]]:
    start = listing.index(f".text.{kernel}:")
    end = listing.find(".section\t.text", start)
    lines = listing[start : end if end > 0 else None].splitlines()
    labels: dict[str, int] = {}
    found: list[tuple[str, str]] = []
    for line in lines:
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(found)
        elif match := re.match(r"\s*/\*\w+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?);", line):
            found.append((match[1], match[2]))
    for name, operands in found:
        target = re.search(r"\.L_x_\d+", operands) if name == "BRA" else None
        yield name, operands, labels.get(target[0]) if target else None


def compile_kind(kind: KernelKind, capability: int, folder: Path) -> dict[str, Code]:
    """Return the kernels of `kind`, compiled now."""
    source = nvrtc.inlined_source(SOURCES / "cuda.cu")
    path = folder / "kernel.cubin"
    path.write_bytes(nvrtc.compile_program(source, kind.options, f"sm_{capability}"))
    return read_code(path, capability)


# What is looked at: the usual layer, the narrow one of `finetune_small`, that of `shapes_tiny`.
SIZES = ((8, 32, 4, 4, 2), (8, 32, 4, 4, 4), (8, 16, 3, 4, 4), (4, 24, 3, 4, 4))
KINDS = [
    KernelKind(dtype, *size, deterministic=deterministic)
    for size in SIZES
    for dtype in (torch.float32, torch.bfloat16)
    for deterministic in ((False, True) if size == SIZES[0] else (False,))
]


def name_of(kind: KernelKind) -> str:
    """Return heads, channels, levels, points, dtype."""
    dtype = str(kind.dtype).removeprefix("torch.")
    form = {0: "plain", 2: "points", 4: "boxes"}[kind.form]
    rest = ", deterministic" if kind.deterministic else ""
    return f"{kind.channels} channels, {kind.levels}x{kind.per_level}, {form}, {dtype}{rest}"


def resources_table(
    folder: Path, kinds: list[KernelKind], capabilities: list[int]
) -> Iterator[str]:
    """Yield rows: forward / backward of each kind."""
    yield (
        "| kernel | GPU | registers | in local memory | shared memory of a block | occupancy | "
        "instructions of a warp and sample | waits for memory of a sample |"
    )
    yield "|---|--:|--:|--:|--:|--:|--:|--:|"
    for kind in kinds:
        for capability in capabilities:
            both = compile_kind(kind, capability, folder)
            codes = [both[name] for name in KERNELS]
            each = [
                " / ".join(str(code.registers) for code in codes),
                " / ".join(str(code.local) for code in codes),
                f"{codes[0].shared:,}",
                " / ".join(f"{code.occupancy(kind.threads, capability):.0%}" for code in codes),
                " / ".join(f"{per_sample(kind, code):.0f}" for code in codes),
                " / ".join(f"{code.waits:.1f}" for code in codes),
            ]
            yield f"| {name_of(kind)} | sm_{capability} | " + " | ".join(each) + " |"


def triton_table(folder: Path, capabilities: list[int]) -> Iterator[str]:
    """Yield rows of Triton's kernels for the usual layer: forward / backward."""
    yield "| Triton's kernel | GPU | registers | in local memory | shared memory | occupancy |"
    yield "|---|--:|--:|--:|--:|--:|"
    for dtype in (torch.float32, torch.bfloat16):
        value = torch.zeros(1, 16, 8, 32, dtype=dtype)
        points, weights = torch.zeros(1, 1, 8, 4, 4, 2), torch.zeros(1, 1, 8, 4, 4)
        call = Call.of(value, [2, 2] * 4, points, weights, torch.zeros(1, 1, 4, 2))
        for capability in capabilities:
            codes, occupancies = [], []
            for name in KERNELS:
                program, launch = compile_ahead(
                    call, f"sm_{capability}", backward=name == KERNELS[1]
                )
                path = folder / "triton.cubin"
                path.write_bytes(program.asm["cubin"])
                code = read_code(path, capability)[name]
                code = replace(code, shared=program.metadata.shared)
                codes.append(code)
                occupancies.append(code.occupancy(32 * launch.warps, capability))
            each = [
                " / ".join(str(code.registers) for code in codes),
                " / ".join(str(code.local) for code in codes),
                " / ".join(f"{code.shared:,}" for code in codes),
                " / ".join(f"{share:.0%}" for share in occupancies),
            ]
            name = f"32 channels, 4x4, points, {str(dtype).removeprefix('torch.')}"
            yield f"| {name} | sm_{capability} | " + " | ".join(each) + " |"


def per_sample(kind: KernelKind, code: Code) -> float:
    """Return instructions of a warp, over its samples; a warp has 32 / lanes queries at once."""
    samples = kind.levels * kind.per_level
    return (code.outside + kind.levels * len(code.loop)) / samples


@dataclass(frozen=True)
class Bound:
    """Microseconds that one resource needs at least."""

    what: str
    forward: float
    backward: float


def bounds(kind: KernelKind, codes: dict[str, Code], *, tokens: int, queries: int) -> list[Bound]:
    """Return the bounds of one layer, one image."""
    samples, item = kind.levels * kind.per_level, kind.dtype.itemsize
    slots = queries * kind.heads
    rows = 4 * slots * samples  # read, if all corners exist
    points = slots * samples * (2 + 1) * 4  # offsets and logits, float32
    values, outputs = (n * kind.heads * kind.channels for n in (tokens, queries))
    forward = values * item + outputs * item + points
    # gradients of values are zeroed, added to in float32, and rounded
    sums = values * 4 * 2 + (values * (4 + item) if item < 4 else 0)
    backward = forward + points + sums
    warps = slots * kind.lanes / 32
    issued = [warps * samples * per_sample(kind, codes[name]) for name in KERNELS]
    read = rows * kind.channels * item
    added = rows * kind.channels * 4
    turns = codes["msda_backward"].count("SHFL") * kind.levels * warps * 128  # bytes of the path
    us = 1e6
    return [
        Bound("device memory", forward / H100.memory * us, backward / H100.memory * us),
        Bound("instructions", *(n / H100.issue * us for n in issued)),
        Bound(
            "first-level cache", read / H100.first_level * us,
            (read + added + turns) / H100.first_level * us,
        ),
        Bound(
            "reads, if the first-level cache holds nothing", read / H100.second_level * us,
            read / H100.second_level * us,
        ),
        Bound("additions, of 32 bytes in one turn each", 0.0, added / H100.second_level * us),
        Bound("additions, in two turns each", 0.0, 2 * added / H100.second_level * us),
    ]  # fmt: skip


def time_table(folder: Path) -> Iterator[str]:
    """Yield rows: bounds of the encoder layer of an 800x1066 image, float32 and bfloat16."""
    tokens = 100 * 134 + 50 * 67 + 25 * 34 + 13 * 17
    kinds = [KernelKind(dtype, *SIZES[0]) for dtype in (torch.float32, torch.bfloat16)]
    found = [
        bounds(kind, compile_kind(kind, 90, folder), tokens=tokens, queries=tokens)
        for kind in kinds
    ]
    yield "| microseconds, at least | float32 | with backward | bfloat16 | with backward |"
    yield "|---|--:|--:|--:|--:|"
    for one, other in zip(*found, strict=True):
        numbers = (
            f"{n:.0f}"
            for b in (one, other)
            for n in (b.forward, b.forward + b.backward)
        )  # fmt: skip
        yield f"| {one.what} | " + " | ".join(numbers) + " |"


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--capabilities", nargs="+", type=int, choices=LIMITS, default=[80, 90])
    options = parser.parse_args()
    print(f"NVRTC {nvrtc.version()}\n")
    with tempfile.TemporaryDirectory() as folder:
        for line in resources_table(Path(folder), KINDS, options.capabilities):
            print(line, flush=True)
        print()
        for line in triton_table(Path(folder), [c for c in options.capabilities if c in (80, 90)]):
            print(line, flush=True)
        print()
        for line in time_table(Path(folder)):
            print(line, flush=True)


if __name__ == "__main__":
    main()
