"""What a recipe adds to the training of a detector."""

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from models.queries import Proposals, QueryGroup
from models.transformer import DeformableTransformer
from util.batch import Target


class Recipe(nn.Module):
    """Further queries in training. A recipe's parameters have keys under `recipes.NAME`.

    `options_class` is the dataclass of its options, declared by `configs.options.option`; a recipe
    is built from an instance of it and the detector's transformer, whose sizes it may read.
    """

    options_class: ClassVar[type[Any]]

    def __init__(
        self, options: Any, transformer: DeformableTransformer, *, num_classes: int
    ) -> None:
        super().__init__()

    def queries(
        self,
        transformer: DeformableTransformer,
        memory: Tensor,
        proposals: Proposals | None,
        targets: Sequence[Target],
    ) -> list[QueryGroup]:
        """Return groups of queries for a training step; proposals are a two-stage encoder's.

        Every step returns groups of the same names, which all processes log together. Shape:
        memory [N,S,C].
        """
        raise NotImplementedError
