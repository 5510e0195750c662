"""How the processes of a run meet and part, whether torchrun, srun or we started them."""

import datetime
import os
import subprocess

import torch.distributed as dist

from util.errors import ConfigError
from util.world import World

TIMEOUT = datetime.timedelta(minutes=30)  # of any exchange: rank 0 may be computing AP meanwhile
_FIRST_PORT, _PORTS = 20000, 20000


def take_slurm_variables() -> None:
    """Set torchrun's variables from those of `srun`, where it started several tasks.

    Raises:
        ConfigError: the first host's name cannot be found.
    """
    tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))
    if "RANK" in os.environ or tasks < 2:
        return
    os.environ.update(
        RANK=os.environ["SLURM_PROCID"],
        LOCAL_RANK=os.environ["SLURM_LOCALID"],
        WORLD_SIZE=str(tasks),
    )
    if "MASTER_ADDR" not in os.environ:
        os.environ["MASTER_ADDR"] = _first_host(os.environ["SLURM_STEP_NODELIST"])
    port = _FIRST_PORT + int(os.environ["SLURM_JOB_ID"]) % _PORTS
    os.environ.setdefault("MASTER_PORT", str(port))


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
    return int(os.environ.get("RANK", "0"))


def started_by_launcher() -> bool:
    """Return whether torchrun, `gpus` or srun started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def init_process_group(device_type: str) -> World:
    """Join the process group, if this process is one of several.

    Raises:
        ConfigError: the variables of the launcher are not whole.
    """
    if not started_by_launcher():
        return World()
    missing = [n for n in ("RANK", "MASTER_ADDR", "MASTER_PORT") if n not in os.environ]
    if missing:
        raise ConfigError(
            f"WORLD_SIZE {os.environ['WORLD_SIZE']}: {', '.join(missing)} must be set, too. "
            "Start the run with `gpus`, torchrun or srun."
        )
    store, rank, size = next(dist.rendezvous("env://", timeout=TIMEOUT))  # type: ignore[attr-defined]
    # processes that are started again would meet the addresses of those before in the same store
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    dist.init_process_group(
        "nccl" if device_type == "cuda" else "gloo",
        store=dist.PrefixStore(f"attempt_{attempt}", store),  # type: ignore[attr-defined]
        rank=rank,
        world_size=size,
        timeout=TIMEOUT,
    )
    return World(
        dist.get_rank(),
        dist.get_world_size(),
        int(os.environ.get("LOCAL_RANK", "0")),
        int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
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
