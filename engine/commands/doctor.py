"""`main.py doctor`: what this machine offers."""

import argparse
import platform

import torch

from configs.options import Values
from ops.self_test import check_backends
from util.console import console


def doctor(args: argparse.Namespace, given: Values) -> int:
    """Say what this machine offers, and check the attention op."""
    console(f"python {platform.python_version()} on {platform.platform()}")
    console(f"torch {torch.__version__}, CUDA {torch.version.cuda or 'none'}")
    healthy = True
    for line, passed in check_backends():
        console(line)
        healthy &= passed
    return 0 if healthy else 1
