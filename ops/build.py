"""Compile the kernels ahead of time: in a Docker file, on a login node.

    python -m ops.build

Builds the CPU kernel for every instruction set of this kind of processor, and the CUDA programs of
the usual models. These are for the GPUs in `TORCH_CUDA_ARCH_LIST` ("8.0;9.0+PTX") or, if it is not
set, for those of this machine. Needs no GPU. Any other program is compiled when it is first used.
"""

import argparse
import os
import re
import sys

import torch

from . import cache, compiler, nvrtc
from .call import BackendError
from .cuda import KernelKind

_CHANNELS = (16, 32)  # per head: widths of 128 and 256 with 8 heads
_LEVELS = (1, 3, 4)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def usual_kinds() -> list[KernelKind]:
    """Return the programs that training and evaluating the presets run, at 4 points per level."""
    return [
        KernelKind(dtype, 8, channels, levels, 4, form, to_locations)
        for dtype in _DTYPES
        for channels in _CHANNELS
        for levels in _LEVELS
        for form, to_locations in ((0, False), (2, False), (2, True), (4, False), (4, True))
    ]


def requested_targets() -> list[str]:
    """Return `sm_NN` and `compute_NN` of `TORCH_CUDA_ARCH_LIST`, or of the GPUs of this machine.

    Raises:
        BackendError: an entry is not a compute capability.
    """
    targets = []
    for entry in re.findall(r"[^;,\s]+", os.environ.get("TORCH_CUDA_ARCH_LIST", "")):
        match = re.fullmatch(r"(\d+)\.(\d)[af]?(\+PTX)?", entry)
        if not match:
            raise BackendError(
                f"TORCH_CUDA_ARCH_LIST: '{entry}' is not an entry like 9.0 or 9.0+PTX."
            )
        capability = int(match[1]) * 10 + int(match[2])
        targets.append(nvrtc.target(capability))
        if match[3]:
            targets.append(f"compute_{capability}")
    if not targets:
        here = map(torch.cuda.get_device_capability, range(torch.cuda.device_count()))
        targets = [nvrtc.target(10 * major + minor) for major, minor in here]
    return sorted(set(targets))


def main() -> int:
    """Build everything; return 1 if anything failed to build."""
    argparse.ArgumentParser(
        prog="python -m ops.build",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    ).parse_args()
    failures = []
    for instructions in compiler.instruction_sets():
        try:
            print(f"cpu {instructions}: {compiler.cpu_library(instructions)}")
        except BackendError as error:
            failures.append(str(error))
    try:
        targets = requested_targets() if torch.version.cuda else []
        for target in targets:
            for kind in usual_kinds():
                kind.program(target)
            print(f"cuda {target}: {len(usual_kinds())} programs in {cache.cache_dir()}")
        if not targets:
            print("cuda: no GPU here and TORCH_CUDA_ARCH_LIST is not set; nothing built")
    except BackendError as error:
        failures.append(str(error))
    for failure in failures:
        print(f"error: {failure}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
