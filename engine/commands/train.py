"""`main.py train`: a new run, or one continued."""

from contextlib import ExitStack

from configs.load import Given
from configs.schema import SECTIONS
from engine.plan import processes
from engine.processes import process_group
from engine.start import start
from models.recipes import KnownRecipes
from util.device import set_deterministic

__all__ = ["RECIPES", "SECTIONS", "main", "processes"]
RECIPES = KnownRecipes()
AUTO = True  # options may be left to a plan


def main(given: Given) -> int:
    """Train on COCO-format data, or continue a run."""
    options = processes(given)
    if options.deterministic:
        set_deterministic()
    with process_group(options.device) as (world, device), ExitStack() as stack:
        return start(given, options, world, device, stack).fit()
