"""A small random folder of Grounding DINO, with a tokenizer, as save_pretrained() writes it."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.unit.models.small import perturb

transformers: Any = pytest.importorskip("transformers")
WORDS = ("kettle", "mug", "ket", "##tle", "red", "blue", "tea", "##pot")
SIZES: dict[str, Any] = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 3, "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "num_queries": 9, "encoder_n_points": 2, "decoder_n_points": 3, "max_text_len": 20,
}  # fmt: skip


def vocabulary() -> list[str]:
    """Return words with the ids of BERT's marks, which Grounding DINO counts on."""
    words = [f"[unused{i}]" for i in range(1100)]
    words[0], words[100], words[101], words[102] = "[PAD]", "[UNK]", "[CLS]", "[SEP]"
    words[103], words[1012], words[1029] = "[MASK]", ".", "?"
    words[1030 : 1030 + len(WORDS)] = WORDS
    return words


def save_folder(folder: Path, **options: Any) -> Any:
    """Write the folder; return the perturbed model, in evaluation mode."""
    torch.manual_seed(0)
    swin = transformers.SwinConfig(
        embed_dim=8, depths=[1, 2, 2, 2], num_heads=[1, 1, 2, 2], window_size=3, image_size=64,
        out_indices=[2, 3, 4],
    )  # fmt: skip
    bert = transformers.BertConfig(
        vocab_size=1100, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=16, max_position_embeddings=32,
    )  # fmt: skip
    config = transformers.GroundingDinoConfig(
        backbone_config=swin, text_config=bert, **(SIZES | options)
    )
    model = transformers.GroundingDinoForObjectDetection(config).eval()
    perturb(model)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    (folder / "words.txt").write_text("\n".join(vocabulary()))
    tokenizer = transformers.BertTokenizer(str(folder / "words.txt"))
    (folder / "words.txt").unlink()
    tokenizer.save_pretrained(folder)
    images = transformers.GroundingDinoImageProcessor(
        size={"shortest_edge": 96, "longest_edge": 160}
    )
    images.save_pretrained(folder)
    return model
