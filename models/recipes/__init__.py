"""Recipes: what trains a detector better, each in a file of its own, chosen by name."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from configs.options import Checked
from models.proposals import Proposals
from models.queries import DetectorOutput, QueryGroup
from models.transformer import DeformableTransformer, TransformerOutput
from util.batch import EffectiveBatch, Target
from util.registry import Registry


@dataclass(frozen=True, kw_only=True)
class RecipeOptions(Checked):
    """Options of a recipe; subclasses declare each by `configs.options.option`."""

    @property
    def active(self) -> bool:
        """Return whether there is anything to do: a recipe of no queries is as if not chosen."""
        return True


class Recipe(nn.Module):
    """What a recipe does with a detector. Its parameters have keys under `recipes.NAME`.

    It is built from an instance of its `options_class` and the detector's transformer, whose
    switches it may set. `detects`: a trained model needs the recipe to detect, too.
    """

    options_class: ClassVar[type[Any]]
    detects: ClassVar[bool] = False

    def __init__(
        self, options: Any, transformer: DeformableTransformer, *, num_classes: int
    ) -> None:
        super().__init__()

    def prepare(
        self, targets: Sequence[Target], whole: EffectiveBatch, *, fixed_sizes: bool
    ) -> Any:
        """Return what the queries of a training step need to know of its targets.

        What depends on other images depends on `whole`, the effective batch. This runs before the
        forward pass, and is not compiled. With `fixed_sizes`, that pass is: each new shape of a
        tensor, and each new number that `queries` uses, compiles it once more.
        """
        return None

    def queries(
        self,
        transformer: DeformableTransformer,
        memory: Tensor,
        proposals: Proposals | None,
        prepared: Any,
    ) -> list[QueryGroup]:
        """Return groups of queries for a training step; proposals are a two-stage encoder's.

        Every step returns groups of the same names, which all processes log together. `prepared`
        is what `prepare` has returned. Shape: memory [N,S,C].
        """
        return []

    def regroup(
        self,
        transformer: DeformableTransformer,
        groups: list[QueryGroup],
        proposals: Proposals | None,
        *,
        learning: bool,
    ) -> list[QueryGroup]:
        """Return all groups of queries that are decoded, the first those that detect.

        Unlike `queries`, it may start from those that detect, or change how they pass the decoder
        and how they and the encoder learn. `learning`: it is a training step.
        """
        return groups

    def detecting_heads(self) -> Sequence[nn.Module]:
        """Return heads that predict what is detected, beside the detector's own."""
        return []

    def output(self, output: DetectorOutput, decoded: TransformerOutput) -> DetectorOutput:
        """Return what is detected and learned, in training and in evaluation."""
        return output


RECIPES: Registry[type[Recipe]] = Registry(
    "recipe",
    __name__,
    {
        "denoising": ".denoising",
        "group": ".group",
        "hybrid": ".hybrid",
        "mds": ".mds",
        "mr": ".mr",
        "ms": ".ms",
    },
)
# Of these a model has one: an option of this name chooses it.
ALTERNATIVES: Mapping[str, tuple[str, ...]] = {
    "one_to_many": ("hybrid", "group", "ms", "mr", "mds")
}


class KnownRecipes(Mapping[str, type[Any]]):
    """The dataclass of each recipe's options by its name; one is imported when it is asked for."""

    alternatives = ALTERNATIVES

    def __getitem__(self, name: str) -> type[Any]:
        return RECIPES[name].options_class

    def __contains__(self, name: object) -> bool:
        return name in [*RECIPES]

    def __iter__(self) -> Iterator[str]:
        return iter(RECIPES)

    def __len__(self) -> int:
        return len([*RECIPES])
