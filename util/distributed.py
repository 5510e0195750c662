"""How the processes of a run meet and part, whether torchrun, srun or we started them."""

import contextlib
import os
import subprocess

import torch.distributed as dist

from util.errors import ConfigError
from util.meeting import TIMEOUT, meet
from util.world import World

_FIRST_PORT, _PORTS = 20000, 20000


def take_slurm_variables() -> None:
    """Set torchrun's variables from those of `srun`, where it started several tasks.

    Raises:
        ConfigError: the first host's name cannot be found, or a variable of srun or torchrun is
            not a number or out of range.
    """
    tasks = _variable("SLURM_STEP_NUM_TASKS", low=1) or 1
    if "RANK" not in os.environ and tasks > 1:
        rank, local_rank, job = (
            str(_needed(name)) for name in ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_JOB_ID")
        )
        if "MASTER_ADDR" not in os.environ:
            os.environ["MASTER_ADDR"] = _first_host(os.environ.get("SLURM_STEP_NODELIST", ""))
        os.environ.update(RANK=rank, LOCAL_RANK=local_rank, WORLD_SIZE=str(tasks))
        os.environ.setdefault("MASTER_PORT", str(_FIRST_PORT + int(job) % _PORTS))
    _check_variables()


def _check_variables() -> None:
    """Raise ConfigError if a variable of torchrun is not a number or out of range."""
    size = _variable("WORLD_SIZE", low=1) or 1
    local_size = _variable("LOCAL_WORLD_SIZE", low=1)
    _variable("RANK", high=size - 1, why=f", as WORLD_SIZE is {size}")
    why = f", as LOCAL_WORLD_SIZE is {local_size}" if local_size else ""
    _variable("LOCAL_RANK", high=local_size - 1 if local_size else None, why=why)
    if size > 1:  # one process meets nobody
        _variable("MASTER_PORT", low=1, high=65535)
    _variable("TORCHELASTIC_RESTART_COUNT")


def _variable(name: str, *, low: int = 0, high: int | None = None, why: str = "") -> int | None:
    """Return the whole number that a variable of the environment holds, None if it is not set.

    Raises:
        ConfigError: it holds something else, or a number out of range.
    """
    text = os.environ.get(name, "")
    if not text:
        return None
    number = int(text) if text.isascii() and text.isdecimal() and len(text) < 19 else -1
    if number < low or (high is not None and number > high):
        bounds = f"from {low} to {high}{why}" if high is not None else f"at least {low}"
        raise ConfigError(
            f"{name} '{text[:40]}': this variable of the environment must be a whole number "
            f"{bounds}. Unset it, or start the run with torchrun or srun."
        )
    return number


def _needed(name: str) -> int:
    """Return the number that a variable of srun holds."""
    number = _variable(name)
    if number is None:
        raise ConfigError(
            f"{name}: srun has not set it, although SLURM_STEP_NUM_TASKS is "
            f"{os.environ['SLURM_STEP_NUM_TASKS']}. Start the run with srun, or unset that."
        )
    return number


def _first_host(hosts: str) -> str:
    if not any(c in hosts for c in "[,"):
        return hosts
    try:
        listed = subprocess.run(
            ["scontrol", "show", "hostnames", hosts], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError) as error:
        raise ConfigError(
            f"SLURM_STEP_NODELIST: `scontrol` cannot list the hosts '{hosts}' ({error}). "
            "Set MASTER_ADDR to the first host."
        ) from error
    return listed.stdout.split()[0]


def rank_at_start() -> int:
    """Return this process's rank as its launcher set it, before the processes have met."""
    return _number("RANK", 0)


def started_by_launcher() -> bool:
    """Return whether torchrun, `gpus` or srun started this process as one of several."""
    return _number("WORLD_SIZE", 1) > 1


def _number(name: str, default: int) -> int:
    """Return a variable's number; the default too where `take_slurm_variables` refuses it."""
    with contextlib.suppress(ConfigError):
        return _variable(name) or default
    return default


def init_process_group(device_type: str) -> World:
    """Join the process group, if this process is one of several.

    Raises:
        ConfigError: variables of the launcher are missing, or its port is not free.
        UserError: other processes have not come.
    """
    _check_variables()
    if not started_by_launcher():
        return World()
    missing = [n for n in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(n)]
    if missing:
        raise ConfigError(
            f"WORLD_SIZE {os.environ['WORLD_SIZE']}: {', '.join(missing)} must be set, too. "
            "Start the run with `gpus`, torchrun or srun."
        )
    # processes that are started again would meet the addresses of those before in the same store
    attempt = f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT') or 0}"
    store = meet(_number("RANK", 0), _number("WORLD_SIZE", 1), attempt)
    dist.init_process_group(
        "nccl" if device_type == "cuda" else "gloo",
        store=dist.PrefixStore(attempt, store),  # type: ignore[attr-defined]
        rank=_number("RANK", 0),
        world_size=_number("WORLD_SIZE", 1),
        timeout=TIMEOUT,
    )
    return World(
        dist.get_rank(),
        dist.get_world_size(),
        _number("LOCAL_RANK", 0),
        _number("LOCAL_WORLD_SIZE", 1),
        dist.new_group(backend="gloo", timeout=TIMEOUT),
    )


def destroy_process_group() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def lost_contact(error: BaseException) -> bool:
    """Return whether an error says that another process is gone."""
    kinds = (dist.DistBackendError, dist.DistNetworkError)
    text = str(error).lower()
    return isinstance(error, kinds) or (
        isinstance(error, RuntimeError) and ("gloo" in text or "connection closed by peer" in text)
    )
