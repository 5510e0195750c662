"""Who a process is among those of a run, and what they say to each other."""

import json
import os
import socket
import stat
from pathlib import Path

import pytest
import torch.distributed as dist
from PIL import Image
from torch.multiprocessing.spawn import start_processes

from configs.schema import DataConfig
from datasets.build import load_index
from main import main
from util.distributed import (
    destroy_process_group,
    init_process_group,
    lost_contact,
    rank_at_start,
    started_by_launcher,
    take_slurm_variables,
)
from util.errors import ConfigError
from util.main_process import from_main
from util.world import World

TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
MORE = ("LOCAL_WORLD_SIZE", "TORCHELASTIC_RESTART_COUNT")
SLURM = {
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "node[03-06]",
    "SLURM_JOB_ID": "1234567",
}


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget what a launcher or a job of this machine has set, and what a test sets."""
    for name in (*TORCHRUN, *MORE, *SLURM):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def set_all(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def fake_scontrol(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Put a program named scontrol before all others."""
    program = folder / "scontrol"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)


def test_srun_names_rank_size_and_first_host(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    set_all(monkeypatch, SLURM)
    fake_scontrol(
        tmp_path, monkeypatch, '[ "$*" = "show hostnames node[03-06]" ] && seq -f node%02g 3 6'
    )
    take_slurm_variables()
    found = {name: os.environ[name] for name in TORCHRUN}
    assert found == {
        "RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "MASTER_ADDR": "node03",
        "MASTER_PORT": str(20000 + 1234567 % 20000),
    }  # fmt: skip
    assert started_by_launcher()


@pytest.mark.parametrize("job", ["0", "19999", "20000", "987654321"])
def test_the_port_of_a_job_is_free_for_users(monkeypatch: pytest.MonkeyPatch, job: str) -> None:
    set_all(monkeypatch, {**SLURM, "SLURM_JOB_ID": job, "SLURM_STEP_NODELIST": "one"})
    take_slurm_variables()
    assert os.environ["MASTER_ADDR"] == "one"
    assert 1024 < int(os.environ["MASTER_PORT"]) < 65536


def test_an_address_and_a_port_that_are_set_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    set_all(monkeypatch, {**SLURM, "MASTER_ADDR": "here", "MASTER_PORT": "99"})
    take_slurm_variables()
    assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == ("here", "99")
    assert os.environ["RANK"] == "5"


def test_torchrun_within_srun_takes_precedence(monkeypatch: pytest.MonkeyPatch) -> None:
    set_all(monkeypatch, {**SLURM, "RANK": "2", "WORLD_SIZE": "4"})
    take_slurm_variables()
    assert (os.environ["RANK"], os.environ["WORLD_SIZE"]) == ("2", "4")
    assert "MASTER_PORT" not in os.environ


def test_a_job_of_one_task_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    set_all(monkeypatch, {**SLURM, "SLURM_STEP_NUM_TASKS": "1"})
    take_slurm_variables()
    assert not started_by_launcher()
    assert init_process_group("cpu") == World()


@pytest.mark.parametrize("script", ["exit 1", None])
def test_hosts_that_cannot_be_listed_are_a_one_line_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str | None
) -> None:
    set_all(monkeypatch, SLURM)
    if script is None:
        monkeypatch.setenv("PATH", str(tmp_path))
    else:
        fake_scontrol(tmp_path, monkeypatch, script)
    with pytest.raises(ConfigError, match=r"^SLURM_STEP_NODELIST: .*node\[03-06\].*MASTER_ADDR"):
        take_slurm_variables()


@pytest.mark.parametrize(
    ("given", "missing"),
    [
        ({"RANK": "0"}, "MASTER_ADDR, MASTER_PORT"),
        ({}, "RANK, MASTER_ADDR, MASTER_PORT"),
        ({"MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}, "RANK"),
    ],
)
def test_incomplete_launcher_variables_are_refused(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, str], missing: str
) -> None:
    set_all(monkeypatch, {"WORLD_SIZE": "2", **given})
    with pytest.raises(ConfigError, match=f"^WORLD_SIZE 2: {missing} must be set, too"):
        init_process_group("cpu")


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE 'two': this variable .* whole number at least 1"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE '0': "),
        ({"WORLD_SIZE": "2", "RANK": "x"}, "RANK 'x': .* from 0 to 1, as WORLD_SIZE is 2"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK '2': .* from 0 to 1"),
        ({"RANK": "3"}, "RANK '3': .* from 0 to 0, as WORLD_SIZE is 1"),
        (
            {"WORLD_SIZE": "2", "MASTER_PORT": "99999"},
            "MASTER_PORT '99999': .* from 1 to 65535",
        ),
        ({"LOCAL_RANK": "-1"}, "LOCAL_RANK '-1': "),
        ({"LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "2"}, "LOCAL_RANK '2': .* LOCAL_WORLD_SIZE is 2"),
        ({"LOCAL_WORLD_SIZE": "9" * 5000}, "LOCAL_WORLD_SIZE '9{40}': "),
        ({"TORCHELASTIC_RESTART_COUNT": "no"}, "TORCHELASTIC_RESTART_COUNT 'no': "),
        ({**SLURM, "SLURM_STEP_NUM_TASKS": "many"}, "SLURM_STEP_NUM_TASKS 'many': "),
        ({**SLURM, "SLURM_PROCID": "9"}, "RANK '9': .* from 0 to 7"),
        ({**SLURM, "SLURM_LOCALID": "?"}, r"SLURM_LOCALID '\?': "),
        ({**SLURM, "SLURM_JOB_ID": ""}, "SLURM_JOB_ID: srun has not set it, although SLURM_STEP_N"),
    ],
)
def test_bad_numbers_of_a_launcher_are_refused_in_one_line(
    variables: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_all(monkeypatch, {**variables, "SLURM_STEP_NODELIST": "one"})
    with pytest.raises(ConfigError, match=f"^{message}") as error:
        take_slurm_variables()
    assert len(str(error.value)) < 200
    assert rank_at_start() >= 0  # what reports the error asks this, too
    started_by_launcher()


def test_a_bad_number_is_a_one_line_error_of_every_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2x")
    assert main(["train", "--device", "cpu"]) == 2
    assert capsys.readouterr().err.startswith("error: WORLD_SIZE '2x': this variable of the env")


def test_a_single_process_gets_back_its_own_items() -> None:
    world = World()
    assert world.main
    assert world.sum([1.5, 2]) == [1.5, 2]
    assert world.gather("x") == ["x"]
    assert world.broadcast({"a": 1}) == {"a": 1}
    assert from_main(world, lambda: {"a": 1}) == {"a": 1}
    destroy_process_group()  # nothing to leave


def exchange(rank: int, port: int, folder: Path) -> None:
    """Be one of three processes that talk to each other."""
    os.environ |= {
        "RANK": str(rank), "WORLD_SIZE": "3", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)
    }  # fmt: skip
    world = init_process_group("cpu")
    assert (world.rank, world.size, world.main) == (rank, 3, rank == 0)
    big = 2.0**53 - 3  # float32 would lose it
    assert world.sum([rank, big * (rank == 1), 0.1]) == [3.0, big, pytest.approx(0.3)]
    assert world.sum([float("nan") if rank == 2 else 1.0])[0] != 1.0
    assert world.gather({"rank": rank}) == ([{"rank": i} for i in range(3)] if rank == 0 else [])
    assert world.broadcast([rank, None] if rank == 0 else None) == [0, None]
    calls: list[int] = []

    def make() -> str:
        calls.append(rank)
        return f"of {rank}"

    def fail() -> None:
        raise ConfigError(f"seen by {rank}")

    assert from_main(world, make) == "of 0"
    assert calls == ([0] if rank == 0 else [])
    with pytest.raises(ConfigError, match="seen by 0"):
        from_main(world, fail)
    name = "set.json" if rank == 0 else "nowhere.json"  # the others do not read it
    data = DataConfig(train_images=str(folder / "data"), train_annotations=str(folder / name))
    index = load_index(data, "train", world=world)
    assert index.images.ids.tolist() == [7]
    assert index.boxes.tolist() == [[1, 2, 4, 6]]
    if rank == 2:
        os._exit(0)  # without a word
    try:
        while True:
            world.sum([1.0])
    except RuntimeError as error:
        (folder / f"{rank}").write_text(str(lost_contact(error)))
    destroy_process_group()
    assert not dist.is_initialized()


@pytest.mark.long
def test_processes_exchange_numbers_and_items_and_notice_a_loss(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    (tmp_path / "data").mkdir()
    Image.new("RGB", (20, 10)).save(tmp_path / "data" / "a.png")
    content = {
        "images": [{"id": 7, "file_name": "a.png", "width": 20, "height": 10}],
        "annotations": [{"id": 1, "image_id": 7, "category_id": 1, "bbox": [1, 2, 3, 4]}],
        "categories": [{"id": 1, "name": "cat"}],
    }
    (tmp_path / "set.json").write_text(json.dumps(content))
    processes = start_processes(exchange, (port, tmp_path), nprocs=3, join=False)  # type: ignore[no-untyped-call]
    while not processes.join(timeout=60):
        pass
    assert [(tmp_path / rank).read_text() for rank in ("0", "1")] == ["True", "True"]
    assert not (tmp_path / "2").exists()


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (dist.DistNetworkError("no route"), True),
        (dist.DistBackendError("NCCL error"), True),
        (RuntimeError("[../gloo/transport/tcp/pair.cc] Connection closed by peer"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ConfigError("gloo"), False),
    ],
)
def test_losing_a_process_is_distinguished_from_other_errors(error: Exception, lost: bool) -> None:
    assert lost_contact(error) == lost
