"""Optimiser, its parameter groups, and the learning-rate schedule."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from configs.schema import OptimConfig

_BACKBONE = "backbone.0."
_LINEAR_PROJ = ("reference_points", "sampling_offsets")


def parameter_groups(model: nn.Module, config: OptimConfig) -> list[dict[str, object]]:
    """Return the three official groups: transformer and heads, backbone, linear projections.

    Parameters that need no gradient are left out; weight decay holds for everything.
    """
    groups: dict[str, list[nn.Parameter]] = {"transformer": [], "backbone": [], "linear_proj": []}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if name.startswith(_BACKBONE):
            groups["backbone"].append(parameter)
        elif any(part in name for part in _LINEAR_PROJ):
            groups["linear_proj"].append(parameter)
        else:
            groups["transformer"].append(parameter)
    rates = {
        "transformer": config.lr,
        "backbone": config.lr_backbone,
        "linear_proj": config.lr * config.lr_linear_proj_mult,
    }
    return [{"name": n, "params": groups[n], "lr": rates[n]} for n in groups]


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """Build AdamW over the official parameter groups."""
    groups = parameter_groups(model, config)
    fused = all(p.device.type in ("cpu", "cuda") for p in model.parameters())
    return torch.optim.AdamW(groups, lr=config.lr, weight_decay=config.weight_decay, fused=fused)


def restore_optimizer(
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LambdaLR,
    content: Mapping[str, Any],
) -> None:
    """Load the state of both, but keep the rates and the weight decay they were built with."""
    built = [(group["initial_lr"], group["weight_decay"]) for group in optimizer.param_groups]
    base_lrs = list(scheduler.base_lrs)
    optimizer.load_state_dict(content["optimizer"])
    scheduler.load_state_dict({**content["lr_scheduler"], "base_lrs": base_lrs})
    for group, (rate, decay), factor in zip(
        optimizer.param_groups, built, scheduler.lr_lambdas, strict=True
    ):
        now = rate * factor(scheduler.last_epoch)
        group.update(initial_lr=rate, weight_decay=decay, lr=now)


def learning_rate_factor(config: OptimConfig, steps_per_epoch: int) -> Callable[[int], float]:
    """Return the factor on every group's rate as a function of the steps done.

    "step": a tenth after every `lr_drop` epochs, or after each of `lr_drop_epochs`. "cosine": from
    1 to 0 over all epochs. Both start with `warmup_steps` of linear warm-up.
    """
    total = max(config.epochs * steps_per_epoch, 1)

    def factor(step: int) -> float:
        warmup = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
        if config.lr_scheduler == "cosine":
            return warmup * 0.5 * (1 + math.cos(math.pi * min(step / total, 1.0)))
        epoch = step // max(steps_per_epoch, 1)
        drops = sum(epoch >= e for e in config.lr_drop_epochs)
        if not config.lr_drop_epochs:
            drops = epoch // config.lr_drop
        return warmup * float(0.1**drops)

    return factor


def build_scheduler(
    optimizer: torch.optim.Optimizer, config: OptimConfig, steps_per_epoch: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """Build the schedule; it is stepped once per training step."""
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, learning_rate_factor(config, steps_per_epoch)
    )
