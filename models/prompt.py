"""A prompt: the words of several phrases side by side, and scores of words to scores of phrases."""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from models.queries import DetectorOutput
from models.recipes import Recipe
from models.transformer import DeformableTransformer, TransformerOutput
from util.errors import ConfigError

# T words, N batch, Q queries.

SEPARATORS = (".", "?")  # after which another phrase begins


def phrases_of(text: str) -> tuple[str, ...]:
    """Return the phrases of a text like "kettle . mug", in lower case, each once.

    Raises:
        ConfigError: there is none.
    """
    parts = (" ".join(part.lower().split()) for part in re.split(r"[.?]", text))
    phrases = tuple(dict.fromkeys(part for part in parts if part))
    if not phrases:
        raise ConfigError(
            'prompt: names nothing. Write what to look for, with dots between: "kettle . mug".'
        )
    return phrases


@dataclass(frozen=True)
class PromptLayout:
    """Which words of a prompt belong together (Grounding DINO, Sec. 3.4).

    `spans` are the first word of each phrase and the one after its last. A phrase with its
    separator is a sentence of its own. Shape: positions [T], of each word in its phrase; together
    [T,T], True where two words see each other.
    """

    spans: tuple[tuple[int, int], ...]
    positions: Tensor
    together: Tensor


def lay_out(words: Sequence[int], separators: Collection[int]) -> PromptLayout:
    """Return how the ids of words, from the first mark to the last, are cut into phrases.

    A phrase ends with one of the `separators`; the marks at both ends see themselves alone.
    """
    positions = torch.zeros(len(words), dtype=torch.long)
    together = torch.eye(len(words), dtype=torch.bool)
    spans, start = [], 1
    for index in range(1, len(words) - 1):
        if words[index] in separators:
            sentence = slice(start, index + 1)
            together[sentence, sentence] = True
            positions[sentence] = torch.arange(index + 1 - start)
            spans.append((start, index))
            start = index + 1
    return PromptLayout(tuple(spans), positions, together)


class Phrases(Recipe):
    """Scores of phrases, each that of its best word."""

    detects = True

    def __init__(
        self, options: Any, transformer: DeformableTransformer, *, num_classes: int
    ) -> None:
        """Take the spans of phrases for options."""
        super().__init__(options, transformer, num_classes=num_classes)
        self.spans: tuple[tuple[int, int], ...] = options

    def output(self, output: DetectorOutput, decoded: TransformerOutput) -> DetectorOutput:
        """Return scores of phrases in place of those of words. Shape: [N,Q,T] to [N,Q,phrases]."""
        logits = [output["pred_logits"][..., first:last].amax(-1) for first, last in self.spans]
        return {**output, "pred_logits": torch.stack(logits, dim=-1)}
