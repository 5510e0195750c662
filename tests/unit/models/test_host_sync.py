"""A training step reads nothing back to the host but the matching costs."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from configs.schema import LossConfig
from models.build import build_criterion
from models.recipes import RECIPES
from tests.lanes import some
from tests.unit.models.small import VARIANTS, random_images, small_model
from util.batch import pad_images

READS_BACK = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique"}


class Record(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Collects the operators that would wait for a device."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in READS_BACK:
            self.found.add(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.long
@pytest.mark.parametrize("recipe", ["denoising", "hybrid", "group", "ms", "mr", "mds"])
@pytest.mark.parametrize("counts", [(2, 3), (0, 0)])
@pytest.mark.parametrize("variant", some(VARIANTS, "two_stage"))
def test_no_operator_of_a_step_waits_for_the_device(
    variant: str, counts: tuple[int, int], recipe: str
) -> None:
    model = small_model(**VARIANTS[variant]).train()
    options = RECIPES[recipe].options_class()
    model.recipes[recipe] = RECIPES[recipe](options, model.transformer, num_classes=5).double()
    batch = pad_images(random_images((65, 90), (50, 70)))
    targets = [
        {
            "image_id": torch.tensor(n),
            "labels": torch.zeros(n, dtype=torch.int64),
            "boxes": torch.full((n, 4), 0.3),
        }
        for n in counts
    ]
    with Record() as record:
        losses = build_criterion(LossConfig(union_set=True))(model(batch, targets), targets)
        losses["loss"].backward()  # type: ignore[no-untyped-call]
    assert record.found == set()
