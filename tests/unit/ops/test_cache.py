"""Building and keeping kernels: once, in one process, and an error that explains a failure."""

import os
import shutil
import stat
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ops import BackendError, compiler
from ops.cache import _usable, built, cache_dir
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


def write_ours(path: Path) -> None:
    path.write_text("ours")


@pytest.fixture(autouse=True)
def _not_remembered() -> None:
    _usable.cache_clear()


def run(code: str, cache: Path, **variables: str) -> "subprocess.CompletedProcess[str]":
    """Run Python code with a cache of its own."""
    environment = {**os.environ, "MSDEFORM_CACHE": str(cache), "OMP_NUM_THREADS": "1", **variables}
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.slow
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


@pytest.mark.long
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


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The place of temporary files."""
    place = tmp_path / "temporary"
    place.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    return place


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="needs owners of files")
@pytest.mark.parametrize("mode", [0o777, 0o770, 0o1777])
def test_a_folder_that_others_can_write_is_not_used(
    tmp_path: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str], mode: int,
) -> None:  # fmt: skip
    open_to_all = tmp_path / "cache"
    open_to_all.mkdir()
    open_to_all.chmod(mode)
    monkeypatch.setenv("MSDEFORM_CACHE", str(open_to_all))
    own = temporary / f"msdeform-{os.getuid()}"
    assert [cache_dir(), cache_dir()] == [own, own]
    (line,) = capfd.readouterr().err.splitlines()
    assert f"{open_to_all} is not used for kernels: other users can write it" in line
    assert str(own) in line
    planted = open_to_all / "thing.so"
    planted.write_text("planted")
    assert built("thing.so", "a thing", write_ours).read_text() == "ours"
    assert stat.S_IMODE(own.stat().st_mode) == 0o700


@pytest.mark.skipif(getattr(os, "getuid", lambda: 1)() != 0, reason="only root gives files away")
def test_a_folder_and_a_file_of_another_user_are_not_used(
    tmp_path: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    foreign = tmp_path / "cache"
    foreign.mkdir()
    monkeypatch.setenv("MSDEFORM_CACHE", str(foreign))
    made = built("thing.so", "a thing", write_ours)
    assert made.parent == foreign
    made.write_text("planted")
    os.chown(made, 12345, 12345)
    assert built("thing.so", "a thing", write_ours).read_text() == "ours"
    os.chown(foreign, 12345, 12345)
    _usable.cache_clear()
    assert cache_dir().parent == temporary
    os.chown(cache_dir(), 12345, 12345)
    _usable.cache_clear()
    with pytest.raises(BackendError, match=r"belongs to another user \(id 12345\).*MSDEFORM_CACHE"):
        cache_dir()


def test_a_link_in_place_of_our_folder_is_not_followed(
    tmp_path: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "theirs").mkdir()
    (temporary / f"msdeform-{os.getuid()}").symlink_to(tmp_path / "theirs")
    monkeypatch.delenv("MSDEFORM_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    with pytest.raises(BackendError, match="it is a link"):
        cache_dir()


def test_without_a_home_folder_kernels_are_among_the_temporary_files(
    temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("MSDEFORM_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as for an unknown user id
    assert cache_dir() == temporary / f"msdeform-{os.getuid()}"


def half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def without_its_sum(path: Path) -> None:
    path.with_name(f"{path.name}.sha256").unlink()


def of_another_mode(path: Path) -> None:
    path.chmod(0o666)


def emptied(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [half, without_its_sum, of_another_mode, emptied])
def test_altered_cache_entries_are_built_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[[Path], None]
) -> None:
    monkeypatch.setenv("MSDEFORM_CACHE", str(tmp_path))
    made: list[int] = []

    def make(path: Path) -> None:
        made.append(1)
        path.write_bytes(bytes(range(256)) * 40)

    damage(built("thing.so", "a thing", make))
    again = built("thing.so", "a thing", make)
    assert again.read_bytes() == bytes(range(256)) * 40
    built("thing.so", "a thing", make)
    assert len(made) == 2
    assert not list(tmp_path.glob("*.part*"))


@pytest.mark.slow
def test_a_library_that_was_cut_is_built_again_and_loads(tmp_path: Path) -> None:
    assert run(ATTEND, tmp_path).returncode == 0
    (library,) = tmp_path.glob("cpu-*.so")
    half(library)
    done = run(ATTEND, tmp_path)  # loading half a library would be a SIGBUS
    assert done.returncode == 0, done.stderr
    assert "building the CPU kernel" in done.stderr


@pytest.mark.parametrize(
    ("cxx", "words"), [("g++ 'x", 'CXX="g++ \'x" is not a command'), ("true", "made no file")]
)
def test_a_compiler_that_is_not_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cxx: str, words: str
) -> None:
    monkeypatch.setenv("MSDEFORM_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", cxx)
    with pytest.raises(BackendError) as caught:
        cpu_library("DEFAULT")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_compiler_that_takes_too_long_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = tmp_path / "slow"
    slow.write_text('#!/bin/sh\n[ "$1" = --version ] && exit 0\nexec sleep 60\n')
    slow.chmod(0o755)
    monkeypatch.setenv("MSDEFORM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", str(slow))
    monkeypatch.setattr(compiler, "_BUILD_TIMEOUT", 0.5)
    with pytest.raises(BackendError, match=r"failed: .*timed out after 0.5 seconds \(full output"):
        cpu_library("DEFAULT")


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
    assert built("thing.so", "a thing", write_ours).exists()


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
