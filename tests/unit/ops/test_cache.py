"""Building and keeping kernels: once, in one process, and an error that explains a failure."""

import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from ops import BackendError
from ops.cache import built, cache_dir
from ops.compiler import cpu_library, instruction_sets
from tests.lanes import some

ROOT = Path(__file__).parents[3]
ATTEND = """
import torch, warnings
from ops import ms_deform_attn
value, at = torch.ones(1, 6, 1, 4), torch.full((1, 2, 1, 1, 1, 2), 0.5)
output = ms_deform_attn(value, [(2, 3)], at, torch.ones(1, 2, 1, 1, 1))
assert torch.equal(output, torch.ones(1, 2, 4)), output
"""


def run(code: str, cache: Path, **variables: str) -> "subprocess.CompletedProcess[str]":
    """Run Python code with a cache of its own."""
    environment = {**os.environ, "MSDEFORM_CACHE": str(cache), "OMP_NUM_THREADS": "1", **variables}
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.long
def test_processes_that_start_together_build_once(tmp_path: Path) -> None:
    environment = {**os.environ, "MSDEFORM_CACHE": str(tmp_path), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", ATTEND], cwd=ROOT, env=environment,
            stderr=subprocess.PIPE, text=True,
        )
        for _ in range(3)
    ]  # fmt: skip
    said = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], said
    assert sum("building the CPU kernel" in text for text in said) == 1
    assert len(list(tmp_path.glob("cpu-*.so"))) == 1
    assert not list(tmp_path.glob("*.part"))
    again = run(ATTEND, tmp_path)
    assert (again.returncode, again.stderr) == (0, "")


@pytest.mark.slow
def test_the_compiler_may_come_with_arguments(tmp_path: Path) -> None:
    done = run(ATTEND, tmp_path, CXX="env LC_ALL=C c++", MSDEFORM_BACKEND="cpu")
    assert done.returncode == 0, done.stderr


@pytest.mark.long
def test_no_compiler_is_one_warning_and_the_next_backend(tmp_path: Path) -> None:
    done = run(ATTEND, tmp_path, CXX="no-such-compiler")
    assert done.returncode == 0
    assert done.stderr.count("UserWarning") == 1
    assert "slower backend 'reference' on cpu" in done.stderr
    assert "no C++ compiler here (no-such-compiler)" in done.stderr


@pytest.mark.long
def test_a_failed_build_names_its_log_and_is_not_kept(tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.write_text(
        "#!/bin/sh\necho 'broken 1.0'\necho 'fatal error: out of ideas' >&2\nexit 1\n"
    )
    broken.chmod(0o755)
    done = run(ATTEND, tmp_path / "cache", CXX=str(broken))
    assert done.returncode == 0
    assert "fatal error: out of ideas" in done.stderr
    (log,) = (tmp_path / "cache").glob("failed-*.log")
    assert str(log) in done.stderr
    assert "out of ideas" in log.read_text()
    assert not list((tmp_path / "cache").glob("cpu-*.so"))


@pytest.mark.slow
def test_a_forced_backend_fails_loudly(tmp_path: Path) -> None:
    for name, words in [
        ("cpu", "MSDEFORM_BACKEND=cpu on cpu: no C++ compiler"),
        ("cuda", "MSDEFORM_BACKEND=cuda on cpu: computes on NVIDIA GPUs, not on cpu"),
        ("fast", "MSDEFORM_BACKEND: no backend 'fast'. Choose from cuda, cpu, triton, reference."),
    ]:
        done = run(ATTEND, tmp_path, MSDEFORM_BACKEND=name, CXX="no-such-compiler")
        assert done.returncode == 1
        assert words in done.stderr
    done = run(ATTEND, tmp_path, MSDEFORM_BACKEND="reference", CXX="no-such-compiler")
    assert (done.returncode, done.stderr) == (0, "")


def test_nothing_is_built_by_an_import(tmp_path: Path) -> None:
    done = run("import ops", tmp_path / "cache")
    assert done.returncode == 0
    assert not (tmp_path / "cache").exists()


def test_a_folder_that_cannot_be_written_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MSDEFORM_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(BackendError, match="is not writable.*MSDEFORM_CACHE"):
        cache_dir()


def test_a_build_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MSDEFORM_CACHE", str(tmp_path))

    def fail(path: Path) -> None:
        path.write_text("half")
        raise BackendError("it failed")

    with pytest.raises(BackendError, match="it failed"):
        built("thing.so", "a thing", fail)
    (log,) = tmp_path.glob("failed-*.log")
    assert log.read_text() == "it failed"
    assert {path.suffix for path in tmp_path.iterdir()} <= {".lock", ".log"}
    assert built("thing.so", "a thing", Path.touch).exists()


@pytest.mark.long
@pytest.mark.parametrize("instructions", some(instruction_sets(), instruction_sets()[-1]))
def test_every_set_of_instructions_gives_the_same(instructions: str, tmp_path: Path) -> None:
    code = f"""
import torch
torch.backends.cpu.get_cpu_capability = lambda: "{instructions}"
from ops import use_backend, fused_ms_deform_attn
torch.manual_seed(0)
shapes = [(5, 7), (3, 4)]
kinds = [(4, "float32"), (32, "float32"), (40, "float64"), (32, "bfloat16")]
for d, dtype in [(d, getattr(torch, name)) for d, name in kinds]:
    for q in (3, 60):
        inputs = [torch.randn(2, 47, 2, d), torch.rand(2, q, 2, 2), torch.randn(2, q, 2, 2, 3, 2),
                  torch.randn(2, q, 2, 2, 3)]
        results = []
        for name in ("cpu", "reference"):
            leaves = [inputs[0].to(dtype), *inputs[1:]]
            leaves = [t.detach().requires_grad_() for t in leaves]
            with use_backend(name):
                out = fused_ms_deform_attn(leaves[0], shapes, *leaves[1:])
                results.append([out, *torch.autograd.grad(out.float().square().sum(), leaves)])
        step = 0.03 if dtype == torch.bfloat16 else 1e-3
        for a, b in zip(*results):
            atol = step * float(b.abs().max())
            torch.testing.assert_close(a.double(), b.double(), rtol=step, atol=atol)
"""
    capabilities = ("DEFAULT", "AVX2", "AVX512")
    found = torch.backends.cpu.get_cpu_capability()
    here = capabilities.index(found) if found in capabilities else 0
    if capabilities.index(instructions) > here:
        pytest.skip(f"this processor has no {instructions}")
    shared = cache_dir()  # what other tests have built is built
    done = run(code, shared)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_the_cpu_kernel_compiles_without_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MSDEFORM_CACHE", str(tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cpu_library("DEFAULT", extra_flags=("-Wall", "-Wextra", "-Werror")).exists()
