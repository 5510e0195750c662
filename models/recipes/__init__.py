"""Recipes: what trains a detector better, each in a file of its own, chosen by name."""

from collections.abc import Iterator, Mapping
from typing import Any

from models.recipes.base import Recipe
from util.registry import Registry

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
