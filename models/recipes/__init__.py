"""Recipes: what trains a detector better, each in a file of its own, chosen by name."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from models.queries import Proposals, QueryGroup
from models.transformer import DeformableTransformer
from util.batch import Target
from util.registry import Registry


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


RECIPES: Registry[type[Recipe]] = Registry("recipe", __name__, {"one_to_many": ".one_to_many"})


class RecipeOptions(Mapping[str, type[Any]]):
    """The dataclass of each recipe's options by its name; one is imported when it is asked for."""

    def __getitem__(self, name: str) -> type[Any]:
        return RECIPES[name].options_class

    def __contains__(self, name: object) -> bool:
        return name in [*RECIPES]

    def __iter__(self) -> Iterator[str]:
        return iter(RECIPES)

    def __len__(self) -> int:
        return len([*RECIPES])
