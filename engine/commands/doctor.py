"""`main.py doctor`: hardware and op backends."""

import platform

import torch

from ops.self_test import check_backends
from util.console import console
from util.version import __version__

SECTIONS: dict[str, type] = {}


def main() -> int:
    """Report hardware and op backends, and test them."""
    console(
        f"deformable_detr {__version__}\n"
        f"python {platform.python_version()} on {platform.platform()}\n"
        f"torch {torch.__version__}, CUDA {torch.version.cuda or 'none'}"
    )
    healthy = True
    for line, passed in check_backends():
        console(line)
        healthy &= passed
    return 0 if healthy else 1
