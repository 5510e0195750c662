"""What backbones of our own share: their makers' weight files, and stochastic depth."""

import re
from collections.abc import Callable, Sequence

from torch import nn

from models.backbones import BackboneOptions, weights_from_file
from models.weights.unwrap import keys_of
from util.errors import CheckpointError

OUTPUT_NORMS = "norms."  # of the maps; classifiers have none
_COUNTER = "num_batches_tracked"


def drop_path_rates(options: BackboneOptions, depths: Sequence[int]) -> list[list[float]]:
    """Return for each stage how often each of its blocks is left out in training.

    The rate rises from block to block up to `drop_path`, but for those that are frozen.
    """
    last = sum(depths) - 1
    rates = iter([options.drop_path * i / last for i in range(last + 1)])
    by_stage = [[next(rates) for _ in range(depth)] for depth in depths]
    frozen = max(options.frozen_stages - 1, 0)
    return [[0.0] * len(r) if i < frozen else r for i, r in enumerate(by_stage)]


def load_published(
    network: nn.Module,
    options: BackboneOptions,
    name: str,
    *,
    published: Callable[[str], str],
    unused: str,
) -> None:
    """Fill a network from a file; all of it must be there, and nothing else.

    `published` returns the name that the makers have for one of ours. `unused` is an expression
    that the names in the file that are of no use start with, such as those of the classifier. The
    norms of the maps may be missing as a whole, and then stay as they are.

    Raises:
        CheckpointError: the file holds something else, or a download is asked for.
    """
    if options.weights == "none":
        return
    place = f"`backbone_weights {options.weights}`"
    if options.weights == "imagenet":
        raise CheckpointError(
            f"{place}: {name} is not downloaded. Pass the file that its makers published, or none "
            "to start from scratch."
        )
    target = network.state_dict()
    ours = {published(key): key for key in target}
    found = weights_from_file(options.weights, name, ours)
    given = {key: tensor for key, tensor in found.items() if not re.match(unused, key)}
    expected = {key for key in ours if not key.endswith(_COUNTER)}
    if not any(key.startswith(OUTPUT_NORMS) for key in given):
        expected = {key for key in expected if not key.startswith(OUTPUT_NORMS)}
    counters = {key for key in given if key.endswith(_COUNTER)}
    wrong = [f"'{key}' is missing" for key in sorted(expected - given.keys())]
    wrong += [
        f"'{key}' is not in the network" for key in sorted(given.keys() - ours.keys() - counters)
    ]
    wrong += [
        f"'{key}' is {tuple(given[key].shape)}, the network's {tuple(target[ours[key]].shape)}"
        for key in sorted(expected & given.keys())
        if given[key].shape != target[ours[key]].shape
    ]
    if wrong:
        raise CheckpointError(
            f"{place}: does not hold {name}: {wrong[0]}, and {len(wrong) - 1} more keys do not "
            f"fit. Keys found: {keys_of(found)}; expected: {keys_of(ours)}."
        )
    tensors = {ours[key]: tensor for key, tensor in given.items() if key in ours}
    network.load_state_dict(tensors, strict=False)
