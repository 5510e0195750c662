"""The state of a run in a checkpoint: made, checked whole before any of it is loaded, restored.

A moment of another size would make the fused optimiser write past its end, and a position outside
NumPy's generator makes it read there: neither is an error that could be caught.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from engine.optim import Precision, set_rates
from engine.time_limit import TimedRun, TimeLimit
from util.console import log
from util.errors import CheckpointError, brief
from util.random_state import check_rng_state, rng_state, set_rng_state

Spec = Any  # a mapping of specs, a list of one, or a function that raises ValueError
_MOST = 2**48  # of counts
_MOMENTS = {"step", "exp_avg", "exp_avg_sq"}


class SavedRun(TimedRun, Protocol):
    """What is saved and restored of a run, and what that depends on: the trainer."""

    optimizer: torch.optim.Optimizer
    precision: Precision
    identity: Mapping[str, Any]
    time_limit: TimeLimit | None
    epoch: int
    epoch_step: int
    seconds: float
    unevaluated: bool
    best: dict[str, float]
    thresholds: dict[str, float]

    def all_steps_done(self) -> bool:
        """Return whether the run has all its steps."""


def run_state(run: SavedRun) -> dict[str, Any]:
    """Return the checkpoint of the present position in the main process; all must call it."""
    return {
        # plain strides, for readers that know no channels-last tensors
        "model": {k: v.contiguous() for k, v in run.detector.state_dict().items()},
        "ema": run.ema.state_dict() if run.ema is not None else {},
        "optimizer": run.optimizer.state_dict(),
        "lr_scheduler": run.scheduler.state_dict(),
        "scaler": run.precision.scaler.state_dict(),
        "epoch": run.epoch - 1 if run.epoch_step == 0 else run.epoch,
        "progress": {
            "step": run.step,
            "next_epoch": run.epoch,
            "next_step": run.epoch_step,
            "seconds": run.seconds,
            "unevaluated": run.unevaluated,
            "steps": run.steps.state_dict(),
            "rng": run.world.gather(rng_state()),
            **({"time_limit": run.time_limit.state_dict()} if run.time_limit else {}),
        },
        "best": run.best,
        "thresholds": run.thresholds,
        **run.identity,
    }


def restore_run(run: SavedRun, content: Mapping[str, Any], source: object) -> None:
    """Restore the state and the position of a checkpoint of this run.

    Rates and weight decay are those of the present options, at the checkpoint's place in the
    schedule.

    Raises:
        CheckpointError: the content of `source` is not sound; nothing was loaded.
    """
    check_state(
        content,
        source,
        model=run.detector,
        averages=None if run.ema is None else run.ema.model,
        optimizer=run.optimizer,
        scheduler=run.scheduler,
    )
    progress = content["progress"]
    if run.time_limit is not None and "time_limit" in progress:
        run.time_limit.load_state_dict(progress["time_limit"])
        run.time_limit.lay_out(run)
    run.detector.load_state_dict(content["model"])
    _restore_optimizer(run.optimizer, run.scheduler, content)
    if content["scaler"]:  # of a run in fp16
        scale = {key: content["scaler"][key] for key in ("scale", "_growth_tracker")}
        scaler = run.precision.scaler
        scaler.load_state_dict({**scaler.state_dict(), **scale})
    if run.ema is not None:  # averages of a run that had none begin with its weights
        run.ema.load_state_dict(content["ema"] or {"model": content["model"], "count": 0})
    run.steps.load_state_dict(progress["steps"])
    run.step = progress["step"]
    run.epoch, run.epoch_step = progress["next_epoch"], progress["next_step"]
    run.seconds = progress["seconds"]
    # with more `max_steps` than before, the epoch continues
    over = run.epoch_step >= run.loader.steps or run.all_steps_done()
    run.unevaluated = progress["unevaluated"] and over
    run.best = dict(content["best"])
    run.thresholds = dict(content.get("thresholds", {}))  # older files have none
    states = progress["rng"]
    if run.world.size == len(states):
        set_rng_state(states[run.world.rank])
    else:
        log.info(
            f"the checkpoint is of {len(states)} processes, now there are {run.world.size}: "
            "dropout draws different numbers from here on"
        )


def _restore_optimizer(
    optimizer: torch.optim.Optimizer, scheduler: LambdaLR, content: Mapping[str, Any]
) -> None:
    """Load the moments and the place in the schedule; all options are those of the run.

    `check_state` must have found both sound.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state = {
        key: {name: _laid_out_as(parameters[key], moment) for name, moment in moments.items()}
        for key, moments in content["optimizer"]["state"].items()
    }
    optimizer.load_state_dict(
        {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}
    )
    saved = content["lr_scheduler"]
    place = {key: saved[key] for key in ("last_epoch", "_step_count", "_last_lr")}
    scheduler.load_state_dict({**scheduler.state_dict(), **place})
    set_rates(scheduler)


def _laid_out_as(parameter: Tensor, moment: Tensor) -> Tensor:
    """Return a moment with the strides of its parameter, which the fused kernel relies on."""
    if moment.shape != parameter.shape or moment.stride() == parameter.stride():
        return moment
    return torch.empty_like(parameter, dtype=moment.dtype, device=moment.device).copy_(moment)


def check_state(
    content: Mapping[str, Any],
    source: object,
    *,
    model: nn.Module,
    averages: nn.Module | None,
    optimizer: torch.optim.Optimizer,
    scheduler: LambdaLR,
) -> None:
    """Check every tensor, count, position and random state of a checkpoint of a run.

    `averages` is the model that the run's moving averages are in, if it has any.

    Raises:
        CheckpointError: something is not what this run could have saved; it begins with `source`.
    """
    try:
        _check_tensors(content["model"], model, "model")
        if averages is not None and content.get("ema"):
            _fit(content["ema"], {"model": _mapping, "count": _count}, "ema")
            _check_tensors(content["ema"]["model"], averages, "ema")
        _check_optimizer(content["optimizer"], optimizer, source)
        rates = len(scheduler.base_lrs)
        _fit(content["lr_scheduler"], {"last_epoch": _count, "_step_count": _count}, "lr_scheduler")
        _fit(content["lr_scheduler"], {"_last_lr": _several(_number, rates)}, "lr_scheduler")
        if content.get("scaler"):
            _fit(content["scaler"], {"scale": _positive, "_growth_tracker": _count}, "scaler")
        _fit(content["progress"], _PROGRESS, "progress")
        if "time_limit" in content["progress"]:
            _fit(content["progress"]["time_limit"], _TIME_LIMIT, "time_limit")
        for key in ("best", "thresholds"):
            _numbers(content.get(key, {}), key)
    except ValueError as error:
        raise CheckpointError(
            f"{source}: cannot be resumed: {error}. Use an earlier checkpoint, or start from its "
            "weights with `finetune`."
        ) from error


def _check_tensors(found: Any, model: nn.Module, place: str) -> None:
    """Compare named tensors with those of a model."""
    _mapping(found, place)
    expected = model.state_dict()
    for name in expected:
        if name not in found:
            raise ValueError(f"{place}: '{name}' is missing")
    for name, tensor in found.items():
        if name not in expected:
            raise ValueError(f"{place}: {brief(name)} is not in the model")
        _check_tensor(tensor, expected[name], f"{place}: '{name}'")
        if not tensor.isfinite().all():
            count = int((~tensor.isfinite()).sum())
            raise ValueError(
                f"{place}: {count} of the {tensor.numel()} values of '{name}' are not finite"
            )


def _check_tensor(found: Any, expected: Tensor, place: str) -> None:
    if not isinstance(found, Tensor):
        raise ValueError(f"{place} is {brief(found)}, not a tensor")
    if found.shape != expected.shape:
        raise ValueError(f"{place} is {tuple(found.shape)}, the model's {tuple(expected.shape)}")
    if found.is_floating_point() != expected.is_floating_point():
        raise ValueError(f"{place} is {found.dtype}, the model's {expected.dtype}")


def _check_optimizer(
    found: Mapping[str, Any], optimizer: torch.optim.Optimizer, source: object
) -> None:
    """Compare groups and moments with the parameters that they are of.

    Raises:
        CheckpointError: they are of other parameters, as of a version that froze others.
        ValueError: something else differs.
    """
    _fit(found, {"state": _mapping, "param_groups": [{"params": [_count]}]}, "optimizer")
    saved = [list(group["params"]) for group in found["param_groups"]]
    own = [group["params"] for group in optimizer.state_dict()["param_groups"]]
    if saved != own:
        sizes = [[len(group) for group in groups] for groups in (saved, own)]
        raise CheckpointError(
            f"{source}: cannot be resumed: it trains other parameters than this run would (groups "
            f"of {sizes[0]} and {sizes[1]}), as what `freeze` covers may differ between versions. "
            "Start a new run from it with `finetune`."
        )
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for key, moments in found["state"].items():
        place = f"optimizer: state {brief(key)}"
        if type(key) is not int or not 0 <= key < len(parameters):
            raise ValueError(f"{place} belongs to no parameter")
        if not isinstance(moments, dict) or set(moments) != _MOMENTS:
            raise ValueError(f"{place} has other parts than {', '.join(sorted(_MOMENTS))}")
        _check_tensor(moments["step"], torch.zeros(()), f"{place}, step,")
        if not 0 <= float(moments["step"]) < _MOST:
            raise ValueError(f"{place}, step, is {float(moments['step'])}")
        for name in ("exp_avg", "exp_avg_sq"):
            _check_tensor(moments[name], parameters[key], f"{place}, {name},")
            if moments[name].isnan().any():
                raise ValueError(f"{place}, {name}, is not a number in places")
        if (moments["exp_avg_sq"] < 0).any():
            raise ValueError(f"{place}, exp_avg_sq, is negative in places")


def _fit(value: Any, spec: Spec, place: str) -> None:
    """Compare plain values with what they must be.

    Raises:
        ValueError: something differs; it is named.
    """
    if isinstance(spec, Mapping):
        _mapping(value, place)
        for key, part in spec.items():
            if key not in value:
                raise ValueError(f"{place}: lacks '{key}'")
            _fit(value[key], part, f"{place}['{key}']")
    elif isinstance(spec, list):
        if type(value) not in (list, tuple):
            raise ValueError(f"{place} is {brief(value)}, not a list")
        for i, item in enumerate(value):
            _fit(item, spec[0], f"{place}[{i}]")
    else:
        spec(value, place)


def _mapping(value: Any, place: str) -> None:
    if not isinstance(value, dict):
        raise ValueError(f"{place} is {brief(value)}, not a mapping")


def _count(value: Any, place: str) -> None:
    if type(value) is not int or not 0 <= value < _MOST:
        raise ValueError(f"{place} is {brief(value)}, not a count")


def _number(value: Any, place: str) -> None:
    if type(value) not in (int, float) or not abs(value) < 1e300:
        raise ValueError(f"{place} is {brief(value)}, not a finite number")


def _positive(value: Any, place: str) -> None:
    _number(value, place)
    if value <= 0:
        raise ValueError(f"{place} is {brief(value)}, must be more than 0")


def _flag(value: Any, place: str) -> None:
    if type(value) is not bool:
        raise ValueError(f"{place} is {brief(value)}, not true or false")


def _several(spec: Spec, count: int) -> Callable[[Any, str], None]:
    def check(value: Any, place: str) -> None:
        _fit(value, [spec], place)
        if len(value) != count:
            raise ValueError(f"{place} has {len(value)} values, not {count}")

    return check


def _numbers(value: Any, place: str) -> None:
    """Check names with numbers, of which those that could not be measured may be NaN."""
    _mapping(value, place)
    for name, number in value.items():
        if not isinstance(name, str) or type(number) not in (int, float):
            raise ValueError(f"{place}: {brief(name)} is {brief(number)}, not a number")


def _averages(value: Any, place: str) -> None:
    if type(value) not in (list, tuple) or len(value) != 3:
        raise ValueError(f"{place} is {brief(value)}, not names, totals and a count")
    names, totals, count = value
    _count(count, f"{place}: the count")
    if not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{place}: the names are {brief(names)}")
    _several(_number, len(names))(totals, f"{place}: the totals")


def _start(value: Any, place: str) -> None:
    if value is not None:
        _number(value, place)


def _length(value: Any, place: str) -> None:
    if value is not None:
        costs = {"step": _positive, **dict.fromkeys(("epoch", "evaluation", "checkpoint"), _number)}
        counts = {"steps": _count, "decided_at": _count}
        _fit(value, {**counts, "used": _number, "costs": costs}, place)
        if not 0 < value["decided_at"] <= value["steps"]:
            raise ValueError(f"{place} is {value['steps']} steps at step {value['decided_at']}")


def _block(value: Any, place: str) -> None:
    """Check a step and sums of squares, of which no root could be taken were they negative."""
    _several(_number, len(value) if type(value) in (list, tuple) else 0)(value, place)
    if value[0] < 0 or value[-1] < 0 or not math.isfinite(sum(value)):
        raise ValueError(f"{place} is {brief(value)}")


def _random(value: Any, place: str) -> None:
    try:
        check_rng_state(value)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error


def _window(value: Any, place: str) -> None:
    _fit(value, {"start": _start, "warned": _flag, "blocks": [_block], "block": _block}, place)
    if [len(block) for block in value["blocks"]] != [3] * len(value["blocks"]):
        raise ValueError(f"{place}: its blocks are not of three numbers")
    if len(value["block"]) != 4 or value["block"][1] < 0:
        raise ValueError(f"{place}: its block is {brief(value['block'])}")


_TIME_LIMIT: Spec = {
    "hours": _positive,
    "used": _number,
    "times": [_number],
    "first_times": [_number],
    "evaluation": _start,
    "length": _length,
}
_PROGRESS: Spec = {
    "step": _count,
    "next_epoch": _count,
    "next_step": _count,
    "seconds": _number,
    "unevaluated": _flag,
    "steps": {"averages": _averages, "nonfinite": {"total": _count}, "watchdog": _window},
    "rng": [_random],
}
