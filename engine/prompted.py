"""Grounding DINO with a prompt: a detector of ours whose classes are the words of a text.

Tokenizer, text encoder and image backbone are those of Hugging Face transformers, run as they are.
The text is encoded once; its words then stand where a trained detector has learned class tokens.
"""

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from configs.schema import ModelConfig
from engine.claims import check_size
from models.backbones.other import OtherBackbone
from models.build import build_model
from models.deformable_detr import DeformableDETR
from models.encoders.enhancer import EnhancerEncoder
from models.prompt import SEPARATORS, Phrases, PromptLayout, lay_out, phrases_of
from models.weights.folder import read_json
from models.weights.grounding_dino import TOKENS, max_tokens
from models.weights.load import Pretrained, local_place
from models.weights.transfer import BACKBONE, load_strict
from util.classes import Classes
from util.errors import CheckpointError, ConfigError

_TOKENIZERS = ("tokenizer.json", "vocab.txt")
_LEFT_OUT = ("text_backbone.", "text_projection.", BACKBONE)


def prompted_model(
    source: str, pretrained: Pretrained, config: ModelConfig, text: str
) -> tuple[DeformableDETR, Classes]:
    """Return a detector of what a text names, and the names.

    Raises:
        CheckpointError: the folder lacks a tokenizer, or weights.
        ConfigError: the text names nothing, or too much, or transformers is not installed.
    """
    phrases = phrases_of(text)
    place = local_place(source)
    folder = place if place.is_dir() else place.parent
    tokenizer, theirs = _load(folder, pretrained.state_dict, source)
    words = tokenizer(". ".join(phrases) + ".")["input_ids"]
    most = max_tokens(read_json(folder / "config.json"))
    if len(words) > most:
        raise ConfigError(
            f"prompt: has {len(words)} words and parts of words, and {source} reads {most}. "
            "Name fewer things at a time."
        )
    layout = lay_out(words, tokenizer.convert_tokens_to_ids(list(SEPARATORS)))
    if len(layout.spans) != len(phrases) or any(first == last for first, last in layout.spans):
        raise ConfigError("prompt: has a phrase that contains no words. Rephrase it.")
    tokens = _encoded(theirs.model, words, layout)
    backbone = OtherBackbone(theirs.model.backbone.conv_encoder.model)
    model = build_model(config, num_classes=len(words), backbone=backbone)
    load_strict(model, _weights(model, pretrained.state_dict, tokens), source)
    encoder = model.transformer.encoder
    assert isinstance(encoder, EnhancerEncoder)
    encoder.place_tokens(layout.positions, layout.together)
    model.recipes["prompt"] = Phrases(layout.spans, model.transformer, num_classes=len(words))
    return model, Classes(tuple(range(1, 1 + len(phrases))), phrases)


def _load(folder: Path, weights: Mapping[str, Tensor], source: str) -> tuple[Any, Any]:
    """Return tokenizer and model of transformers; `weights` are those of the file."""
    if not any((folder / name).is_file() for name in _TOKENIZERS):
        raise CheckpointError(
            f"{source}: has no tokenizer, neither {' nor '.join(_TOKENIZERS)}. Download the whole "
            "repository."
        )
    try:
        transformers: Any = importlib.import_module("transformers")
    except ImportError as error:
        raise ConfigError(
            f"prompt: needs the package transformers ({error}). Install it: pip install "
            "'transformers>=5.2,<6'"
        ) from error
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    kind = transformers.GroundingDinoForObjectDetection
    only_here: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        config = kind.config_class.from_pretrained(str(folder), **only_here)
        layers = getattr(config.text_config, "num_hidden_layers", 0)
        if layers + sum(getattr(config.backbone_config, "depths", ())) > len(weights):
            raise ValueError("it describes more layers than it has weights")
        with torch.device("meta"):
            stated = sum(parameter.numel() for parameter in kind(config).parameters())
        check_size(stated, weights, source)
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder), **only_here)
        theirs, report = kind.from_pretrained(
            str(folder), config=config, output_loading_info=True, **only_here
        )
    except CheckpointError:
        raise
    except Exception as error:  # of many kinds, without a base class
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{source}: transformers cannot read tokenizer and model ({reason}). The folder must "
            "hold all files of a Grounding DINO."
        ) from error
    if missing := sorted(report["missing_keys"]):
        raise CheckpointError(f"{source}: lacks weights, such as '{missing[0]}'. Save it again.")
    return tokenizer, theirs.float().eval()


@torch.no_grad()
def _encoded(model: Any, words: list[int], layout: PromptLayout) -> Tensor:
    """Return what the text encoder makes of the words of each phrase. Shape: [T,C]."""
    ids = torch.tensor([words])
    output = model.text_backbone(
        ids,
        layout.together[None, None],
        torch.zeros_like(ids),
        layout.positions[None],
        return_dict=True,
    )
    tokens: Tensor = model.text_projection(output.last_hidden_state)[0]
    return tokens


def _weights(model: DeformableDETR, given: dict[str, Tensor], tokens: Tensor) -> dict[str, Tensor]:
    """Return all weights: scores are products of queries and words, and nothing else."""
    weights = {k: tensor for k, tensor in given.items() if not k.startswith(_LEFT_OUT)}
    for name, tensor in model.state_dict().items():
        if name.startswith(BACKBONE):  # is complete
            weights[name] = tensor
        elif "class_embed." in name:
            fill = torch.ones_like if name.endswith(".scale") else torch.zeros_like
            weights[name] = fill(tensor)
    return {**weights, TOKENS: tokens}
