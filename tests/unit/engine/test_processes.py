"""The launcher with small programs of its own: what it reports, returns and starts again."""

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from engine import processes as module
from engine.processes import STOP_SIGNALS, StopSignals, launch, report_failure
from util.errors import EXIT_USER_ERROR, ConfigError

Write = Callable[[str], Path]
LAUNCHED = "DEFORMABLE_DETR_LAUNCHED"


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Undo what launching sets in this process."""
    for name in (LAUNCHED, "TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, "1")
        monkeypatch.delenv(name)
    handlers = {s: signal.getsignal(s) for s in (signal.SIGUSR1, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Return a function that writes a program which knows its `rank` and a `folder`."""

    def write_program(text: str) -> Path:
        head = "import json, os, pathlib, signal, sys, time\nrank = int(os.environ['RANK'])\n"
        path = tmp_path / "program.py"
        path.write_text(f"{head}folder = pathlib.Path({str(tmp_path)!r})\n{text}")
        return path

    return write_program


@pytest.mark.long
def test_every_process_gets_the_arguments_and_its_variables(tmp_path: Path, write: Write) -> None:
    program = write(
        "names = ('WORLD_SIZE', 'LOCAL_RANK', 'OMP_NUM_THREADS')\n"
        "found = [sys.argv[1:], *(os.environ[n] for n in names), 'MASTER_PORT' in os.environ]\n"
        "(folder / f'{rank}.json').write_text(json.dumps(found))\n"
    )
    assert launch(program, ["--lr", "1"], processes=3, device="cpu", restarts=0) == 0
    threads = str(max(1, len(os.sched_getaffinity(0)) // 3))
    for rank in range(3):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found == [["--lr", "1"], "3", str(rank), threads, True]


def test_a_signal_that_comes_after_another_processes_is_the_same_request() -> None:
    """A launcher signals one process after the other; the first may tell the others sooner."""
    with StopSignals() as stop:
        stop.follow(0)
        assert stop.number == 0
        stop.follow(signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        stop.follow(signal.SIGINT)
    assert stop.number == signal.SIGTERM


@pytest.mark.long
def test_runs_in_a_thread_leave_signals_to_the_program(write: Write) -> None:
    def catch() -> int:
        with StopSignals() as stop:
            return stop.number

    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    program = write("")
    with ThreadPoolExecutor(1) as thread:
        assert thread.submit(catch).result() == 0
        started = thread.submit(launch, program, [], processes=2, device="cpu", restarts=0)
        assert started.result() == 0
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before


@pytest.mark.long
def test_a_killed_process_ends_the_others_and_is_named_last(
    write: Write, capfd: pytest.CaptureFixture[str]
) -> None:
    program = write("if rank == 1: os.kill(os.getpid(), signal.SIGKILL)\ntime.sleep(100)\n")
    started = time.monotonic()
    assert launch(program, [], processes=2, device="cpu", restarts=0) == 128 + signal.SIGKILL
    assert time.monotonic() - started < 30
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("error: rank 1: killed by SIGKILL, probably out of memory")


@pytest.mark.long
def test_an_exit_code_is_passed_through(write: Write, capfd: pytest.CaptureFixture[str]) -> None:
    program = write("if rank == 0: sys.exit('a message')\ntime.sleep(100)\n")
    assert launch(program, [], processes=2, device="cpu", restarts=0) == 1
    first, last = capfd.readouterr().err.splitlines()
    assert first == "a message"
    assert last == "error: rank 0: ended with exit code 1; see its message above"


@pytest.mark.long
def test_all_start_again_after_a_failure_as_often_as_asked(
    tmp_path: Path, write: Write, capfd: pytest.CaptureFixture[str]
) -> None:
    program = write(
        "count = int(os.environ['TORCHELASTIC_RESTART_COUNT'])\n"
        "(folder / f'{rank}_{count}').touch()\n"
        "if rank == 1 and count < 2: os.kill(os.getpid(), signal.SIGKILL)\n"
        "if count < 2: time.sleep(100)\n"
    )
    assert launch(program, [], processes=2, device="cpu", restarts=2) == 0
    started = {path.name for path in tmp_path.iterdir()} - {"program.py"}
    assert {name for name in started if name.startswith("1")} == {"1_0", "1_1", "1_2"}
    assert "0_2" in started
    assert "error:" not in capfd.readouterr().err


def test_more_gpus_than_there_are_is_refused(write: Write) -> None:
    with pytest.raises(ConfigError, match=r"^gpus 999: this machine has \d+ GPUs\. Use"):
        launch(write(""), [], processes=999, device="cuda", restarts=0)


@pytest.mark.long
def test_a_user_error_of_all_processes_is_printed_once(
    write: Write, capfd: pytest.CaptureFixture[str]
) -> None:
    root = Path(module.__file__).parents[1]
    program = write(
        f"sys.path.insert(0, {str(root)!r})\n"
        "from engine.processes import report_failure\n"
        "from util.errors import ConfigError\n"
        "error = ConfigError('--lr: expected: 1: or 2, got none.')\n"
        "sys.exit(report_failure(error, str(error)))\n"
    )
    assert launch(program, [], processes=2, device="cpu", restarts=0) == EXIT_USER_ERROR
    (line,) = capfd.readouterr().err.splitlines()
    assert line in {f"error: rank {i}: --lr: expected: 1: or 2, got none." for i in (0, 1)}


def test_a_single_process_prints_the_line_unchanged(capsys: pytest.CaptureFixture[str]) -> None:
    error = ConfigError("--lr: wrong.")
    assert report_failure(error, str(error)) == EXIT_USER_ERROR
    assert capsys.readouterr().err == "error: --lr: wrong.\n"


def test_other_launchers_see_the_rank_in_the_error(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "3")
    assert report_failure(ConfigError("--lr: wrong."), "--lr: wrong.") == EXIT_USER_ERROR
    assert capsys.readouterr().err == "error: rank 3: --lr: wrong.\n"


def test_a_bug_keeps_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert report_failure(KeyError("x"), None) is None
    assert capsys.readouterr().err == ""
