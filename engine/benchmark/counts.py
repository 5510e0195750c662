"""What a model costs before it is timed: parameters and floating-point operations, by part."""

import copy
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from models.deformable_detr import DeformableDETR
from util.batch import PaddedBatch

OTHER = "other"  # queries, proposals, recipes
PARTS = ("backbone", "projections and neck", "encoder", "decoder", "heads", OTHER)


def modules_of(model: DeformableDETR) -> dict[str, list[nn.Module]]:
    """Return the modules of each part but `OTHER`; heads are no part of the decoder."""
    return {
        "backbone": [model.backbone],
        "projections and neck": [*model.input_proj, model.neck],
        "encoder": [model.transformer.encoder],
        "decoder": [model.transformer.decoder],
        "heads": [*model.class_embed, *model.bbox_embed],
    }


def parameters_by_part(model: DeformableDETR) -> dict[str, int]:
    """Return how many parameters each part has; what several share counts once."""
    parts = modules_of(model)
    # heads come last, and so are no part of a decoder that holds them as well
    owner = {
        parameter: name
        for name, modules in parts.items()
        for module in modules
        for parameter in module.parameters()
    }
    counts = dict.fromkeys(PARTS, 0)
    for parameter in model.parameters():
        counts[owner.get(parameter, OTHER)] += parameter.numel()
    return counts


def attention_flops(
    value: Sequence[int], shapes: Any, points: Any, weights: Sequence[int], *_: Any, **__: Any
) -> int:
    """Return the operations of deformable attention from the shapes of its inputs.

    Each sample reads four cells and adds them up by weight, in each channel of its head: four
    multiplications and four additions. As for other operations, what is done once per element is
    left out: softmax, locations, and the weights of the cells.

    Shape: value [N,S,M,D]; weights [N,Q,M,L,K].
    """
    n, queries, heads, levels, points_each = weights
    return 8 * n * queries * heads * levels * points_each * value[3]


def flops_by_part(model: DeformableDETR, batch_size: int, size: tuple[int, int]) -> dict[str, int]:
    """Return the operations of a forward pass by part, for images of this (height, width).

    A multiplication and an addition count as two. Products of matrices, convolutions and attention
    are counted, norms, activations and the like are not. Nothing is computed: tensors have no data.
    """
    copied = copy.deepcopy(model).eval().requires_grad_(False)
    counter = FlopCounterMode(
        display=False, custom_mapping={torch.ops.msdeform.ms_deform_attn: attention_flops}
    )
    with (
        torch.no_grad(),
        sdpa_kernel(SDPBackend.MATH),  # plain products, which are counted on every device
        FakeTensorMode(allow_non_fake_inputs=True),
        counter,
        _by_part(copied, counter) as counts,
    ):
        device = copied.transformer.level_embed.device
        images = torch.empty(batch_size, 3, *size, device=device)
        mask = torch.zeros(batch_size, *size, dtype=torch.bool, device=device)
        copied(PaddedBatch(images, mask, (size,) * batch_size))
    return {name: counts[name] for name in PARTS}


@contextmanager
def _by_part(model: DeformableDETR, counter: FlopCounterMode) -> Iterator[dict[str, int]]:
    """Give each operation to the innermost part that is running."""
    counts: dict[str, int] = defaultdict(int)
    running, before = [OTHER], counter.get_total_flops()

    def settle() -> None:
        nonlocal before
        total = counter.get_total_flops()
        counts[running[-1]] += total - before
        before = total

    def entered(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any) -> None:
            settle()
            running.append(name)

        return hook

    def left(module: nn.Module, inputs: Any, output: Any) -> None:
        settle()
        running.pop()

    handles: list[Any] = []
    for name, modules in modules_of(model).items():
        for module in _unique(modules):
            handles += [
                module.register_forward_pre_hook(entered(name)),
                module.register_forward_hook(left),
            ]
    try:
        yield counts
        settle()
    finally:
        for handle in handles:
            handle.remove()


def _unique(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """Return modules once each: heads may be shared by all layers."""
    return list(dict.fromkeys(modules))
