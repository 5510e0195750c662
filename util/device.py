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


def check_precision(name: str, device: torch.device) -> None:
    """Refuse a precision that the device does not have.

    Raises:
        ConfigError: it names the device and what to use in place of it.
    """
    cuda = device.type == "cuda"
    instead = "fp32"
    if name == "tf32" and not (cuda and not torch.version.hip):
        needed = "a CUDA device with TensorFloat-32"
    elif name == "fp16" and not cuda:
        needed = "a CUDA device"
        instead = "bf16" if has_bfloat16(device) else "fp32"
    elif name == "bf16" and not has_bfloat16(device):
        needed = "a device with bfloat16"
        instead = "fp16" if cuda else "fp32"
    else:
        return
    raise ConfigError(
        f"precision {name}: needs {needed}; this one is {device.type}. Use `precision {instead}`."
    )


def has_bfloat16(device: torch.device) -> bool:
    """Return whether a model can compute in bfloat16 there, on a GPU with hardware for it."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "mps":
        return torch.backends.mps.is_macos_or_newer(14, 0)
    return torch.amp.is_autocast_available(device.type)
