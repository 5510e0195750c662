"""The CUDA kernel through its compilers, NVRTC and nvcc: no GPU is needed to compile for one."""

import re
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
import torch

from ops import nvrtc
from ops.cache import SOURCES
from ops.call import BackendError
from ops.cuda import KernelKind

KERNELS = ("msda_forward", "msda_backward")
F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
KINDS = [
    KernelKind(F32, 8, 32, 4, 4),
    KernelKind(F32, 8, 32, 4, 4, 2, to_locations=True),
    KernelKind(F32, 8, 32, 4, 4, 4, deterministic=True),
    KernelKind(BF16, 8, 32, 4, 4, 4),
    KernelKind(F16, 8, 32, 1, 4, 2),
    KernelKind(F64, 3, 17, 3, 2),
]
_SYMBOL_TABLE = 2  # type of an ELF section


needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc on the PATH")


@pytest.fixture(scope="session")
def _nvrtc() -> None:
    try:
        nvrtc.version()
    except BackendError as error:
        pytest.skip(str(error))


@pytest.fixture
def cache(_nvrtc: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a cache of built kernels with nothing in it."""
    monkeypatch.setenv("MSDEFORM_CACHE", str(tmp_path))
    return tmp_path


def symbols(elf: bytes) -> set[str]:
    """Return the names in the symbol table of a 64-bit little-endian ELF file."""
    assert elf[:6] == b"\x7fELF\x02\x01"
    (at,) = struct.unpack_from("<Q", elf, 0x28)
    size, count = struct.unpack_from("<HH", elf, 0x3A)
    sections = [struct.unpack_from("<IIQQQQIIQQ", elf, at + i * size) for i in range(count)]
    names = set()
    for section in sections:
        if section[1] != _SYMBOL_TABLE:
            continue
        start, length, entry = section[4], section[5], section[9]
        strings = sections[section[6]][4]
        for symbol in range(start, start + length, entry):
            first = strings + struct.unpack_from("<I", elf, symbol)[0]
            names.add(elf[first : elf.index(b"\0", first)].decode())
    return names


@pytest.mark.long
@pytest.mark.parametrize(
    ("kind", "capability"),
    [(kind, capability) for kind in KINDS for capability in (80, 90)]
    + [(kind, capability) for kind in KINDS[2:4] for capability in (75, 86, 89, 100, 120)],
    ids=str,
)
def test_machine_code_holds_both_kernels(kind: KernelKind, capability: int, cache: Path) -> None:
    if capability not in nvrtc.architectures():
        pytest.skip(f"NVRTC {nvrtc.version()} makes none for {capability}")
    assert symbols(kind.program(f"sm_{capability}")) >= set(KERNELS)


@pytest.mark.usefixtures("_nvrtc")
def test_intermediate_code_for_a_gpu_newer_than_the_compiler() -> None:
    arch = nvrtc.target(max(nvrtc.architectures()) + 1)
    assert arch == f"compute_{max(nvrtc.architectures())}"
    source = nvrtc.inlined_source(SOURCES / "cuda.cu")
    ptx = nvrtc.compile_program(source, KINDS[0].options, "compute_90").decode()
    assert re.search(r"^\.target sm_90$", ptx, re.M)
    for name in KERNELS:
        assert f".visible .entry {name}(" in ptx
    assert ptx.count("red.global.add.v4.f32") > 0
    assert ptx.endswith("\0")  # as the driver wants it


@pytest.mark.usefixtures("_nvrtc")
def test_gpu_too_old_for_the_compiler() -> None:
    with pytest.raises(BackendError, match=r"does not support compute capability 1\.3"):
        nvrtc.target(13)


@pytest.mark.long
def test_second_call_takes_it_from_the_cache(
    cache: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    code = KINDS[0].program("sm_80")
    assert capfd.readouterr().err.count("building the CUDA kernel (float32, 8 heads of 32") == 1
    (file,) = cache.glob("cuda-sm_80-*.cubin")
    assert file.read_bytes() == code
    assert KINDS[0].program("sm_80") == code
    assert capfd.readouterr().err == ""
    file.write_bytes(code[: len(code) // 2])
    assert KINDS[0].program("sm_80") == code
    assert capfd.readouterr().err.count("building the CUDA kernel") == 1
    KINDS[-1].program("sm_80")
    assert len(list(cache.glob("cuda-sm_80-*.cubin"))) == 2


@pytest.mark.parametrize(
    ("options", "said"),
    [(["--no-such-option"], "no-such-option"), (["-DMSDA_STORAGE=0"], "MSDA_CHANNELS")],
)
def test_failure_names_the_log(options: list[str], said: str, cache: Path) -> None:
    with pytest.raises(BackendError, match="building the kernel for sm_80 failed: ") as caught:
        nvrtc.cached_program(SOURCES / "cuda.cu", options, "sm_80", "the kernel")
    (log,) = cache.glob("failed-*.log")
    assert str(log) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert said in log.read_text()
    assert options[0] in log.read_text().splitlines()[0]
    assert not list(cache.glob("*.cubin")) + list(cache.glob("*.part"))


@pytest.mark.long
@needs_nvcc
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("kind", [KINDS[0], KINDS[3], KINDS[5]], ids=str)
def test_nvcc_takes_it_without_a_warning(kind: KernelKind, capability: int, tmp_path: Path) -> None:
    output = tmp_path / "kernel.cubin"
    command = [
        "nvcc", "-cubin", f"-arch=sm_{capability}", "-std=c++17", "-Werror", "all-warnings",
        "-Xptxas", "-v", *kind.options, str(SOURCES / "cuda.cu"), "-o", str(output),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert symbols(output.read_bytes()) >= set(KERNELS)
    spills = re.findall(r"(\d+) bytes (?:stack frame|spill stores|spill loads)", done.stderr)
    assert spills
    assert set(spills) == {"0"}, "the kernel keeps arrays in local memory"
