"""`main.py plan`: the options that `train --config auto` would choose, with their reasons."""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from configs.load import Given, to_yaml
from configs.options import Checked, option
from configs.schema import SECTIONS as RUN
from configs.schema import RunConfig
from engine.auto.complete import make_plan
from engine.plan import fresh_options
from models.recipes import KnownRecipes
from util.console import console
from util.device import pick_device
from util.errors import ConfigError
from util.files import make_output_dir, write_atomic


@dataclass(frozen=True, kw_only=True)
class PlanOptions(Checked):
    """What `plan` does in addition to printing."""

    output: str = option("", "new YAML file for the options, which `train --config` takes")


SECTIONS = {**RUN, "plan": PlanOptions}
RECIPES = KnownRecipes()
AUTO = True


def main(given: Given, options: PlanOptions) -> int:
    """Print the options that fit the data, this machine and the hours."""
    run = given.section("run", RunConfig)
    if run.resume:
        raise ConfigError("resume: a resumed run keeps its options. Remove it.")
    output = Path(options.output) if options.output else None
    if output is not None:
        if output.exists():
            raise ConfigError(f"output {output}: the file exists. Choose another name.")
        make_output_dir(output.parent, f"output {output}:")
    given = replace(given, auto=True)
    make = partial(make_plan, device=pick_device(run.device), processes=run.gpus)
    config = fresh_options(given, make).given.config()
    if output is None:
        console("--output FILE writes all options to a file, which train --config takes.")
    else:
        write_atomic(output, to_yaml(config))
        console(f"written: {output}; python main.py train --config {output} --output_dir DIR")
    return 0
