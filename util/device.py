"""Choice of device and of its algorithms."""

import os

import torch

from util.errors import ConfigError
from util.world import World


def pick_device(name: str) -> torch.device:
    """Return the device called `name`; "auto" is the first GPU, else the CPU.

    Raises:
        ConfigError: no such device on this machine.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type == "meta":
            raise RuntimeError("it holds no numbers.")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"device {name}: cannot be used here: {reason} "
            "`python main.py doctor` lists what is there."
        ) from error
    return device


def own_device(device: torch.device, world: World) -> torch.device:
    """Return the GPU of this process where several share a machine, else `device`."""
    if device.type != "cuda" or world.size == 1:
        return device
    own = torch.device("cuda", world.local_rank)
    torch.cuda.set_device(own)
    return own


def set_deterministic() -> None:
    """Choose algorithms that give the same bits on every run; call it before a GPU is used."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
