"""Grounding DINO with a prompt: the boxes of Hugging Face's own model."""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from engine.detector import Detector
from main import main
from models.encoders.enhancer import EnhancerEncoder
from models.prompt import lay_out, phrases_of
from models.weights.load import load_pretrained
from tests.lanes import as_published
from tests.unit.models.weights.grounding import save_folder
from util.batch import pad_images
from util.errors import CheckpointError, ConfigError

transformers: Any = pytest.importorskip("transformers")

PROMPT = "Kettle . red mug.teapot"
published: Any = importlib.import_module(
    "transformers.models.grounding_dino.modeling_grounding_dino"
)
PUBLISHED = pytest.mark.skipif(
    not as_published(transformers.__version__), reason="older transformers: see as_published"
)
PHRASES = ("kettle", "red mug", "teapot")
SIZE = (96, 160)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("grounding")
    save_folder(place)
    return place


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    return published.GroundingDinoForObjectDetection.from_pretrained(folder).eval()


def words_of(folder: Path) -> dict[str, Tensor]:
    """Return what Hugging Face's tokenizer makes of the prompt."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    found: dict[str, Tensor] = tokenizer("kettle. red mug. teapot.", return_tensors="pt")
    return found


@pytest.mark.long
@PUBLISHED
@torch.no_grad()
def test_in_float64_scores_and_boxes_are_those_of_hugging_face(folder: Path, theirs: Any) -> None:
    """Of two images, one of them padded, in every word."""
    words = words_of(folder)
    model = Detector.load(folder, device="cpu", prompt=PROMPT).model.double()
    exact = published.GroundingDinoForObjectDetection.from_pretrained(folder).double().eval()
    encoded: list[Tensor] = []
    exact.model.text_projection.register_forward_hook(lambda m, x, output: encoded.append(output))
    torch.manual_seed(1)
    batch = pad_images([torch.randn(3, *SIZE).double(), torch.randn(3, 80, 130).double()])
    twice = {name: tensor.expand(2, -1) for name, tensor in words.items()}
    expected = exact(pixel_values=batch.images, pixel_mask=(~batch.mask).long(), **twice)
    encoder = model.transformer.encoder
    assert isinstance(encoder, EnhancerEncoder)
    torch.testing.assert_close(encoder.class_tokens.weight, encoded[0][0], rtol=1e-5, atol=1e-6)
    encoder.class_tokens.weight.copy_(encoded[0][0])
    del model.recipes["prompt"]
    found = model(batch)
    count = words["input_ids"].shape[1]
    assert expected.logits.dtype == torch.float32  # rounded in the end
    torch.testing.assert_close(found["pred_logits"].float(), expected.logits[..., :count])
    torch.testing.assert_close(found["pred_boxes"], expected.pred_boxes, rtol=1e-6, atol=1e-7)


@PUBLISHED
def test_the_command_writes_the_boxes_of_hugging_face(
    folder: Path, theirs: Any, tmp_path: Path
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    command = [
        "predict", "--checkpoint", str(folder), "--prompt", PROMPT, "--input",
        str(tmp_path / "a.png"), "--output_dir", str(tmp_path / "out"), "--device", "cpu",
        "--num_workers", "0", "--num_select", "27", "--score_threshold", "0.5",
    ]  # fmt: skip
    assert main(command) == 0
    found = json.loads((tmp_path / "out" / "predictions.json").read_text())
    processor = transformers.GroundingDinoImageProcessor.from_pretrained(folder)
    inputs = processor(images=Image.fromarray(pixels), return_tensors="pt")
    words = words_of(folder)
    with torch.no_grad():
        output = theirs(**inputs, **words)
    tokens = words["input_ids"][0].tolist()
    ends = [i for i, token in enumerate(tokens) if token == 1012]
    starts = [1, *(end + 1 for end in ends[:-1])]
    height, width = SIZE
    expected = []
    for query in range(9):
        x, y, w, h = output.pred_boxes[0, query].tolist()
        box = [(x - w / 2) * width, (y - h / 2) * height, w * width, h * height]
        for name, first, last in zip(PHRASES, starts, ends, strict=True):
            score = max(output.logits[0, query, first:last].sigmoid().tolist())
            expected.append((name, score, box))
    assert len(found) == 27  # three names of nine boxes
    for name, score, box in expected:
        near = [
            entry
            for entry in found
            if entry["category_name"] == name
            and entry["score"] == pytest.approx(score, abs=1e-4)
            and entry["bbox"] == pytest.approx(box, abs=0.01)
        ]
        assert near, (name, score, box)


@PUBLISHED
def test_words_are_laid_out_as_by_hugging_face() -> None:
    marks = (101, 102, 1012, 1029)
    words = [101, 1030, 1012, 1034, 1031, 1029, 1036, 1037, 1035, 1012, 102]
    layout = lay_out(words, (1012, 1029))
    together, positions = published.generate_masks_with_special_tokens_and_transfer_map(
        torch.tensor([words]), torch.tensor(marks)
    )
    assert layout.together.equal(together[0])
    assert layout.positions.equal(positions[0])
    assert layout.spans == ((1, 2), (3, 5), (6, 9))


def test_phrases_are_lower_case_and_each_stands_once() -> None:
    assert phrases_of(" A  Red kettle.. mug ? a red Kettle") == ("a red kettle", "mug")


@pytest.mark.parametrize("text", [".", " ? . ", "  "])
def test_a_prompt_without_words_is_refused(folder: Path, text: str) -> None:
    with pytest.raises(ConfigError, match="prompt: names nothing"):
        Detector.load(folder, device="cpu", prompt=text)


def test_the_command_says_so_in_one_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    for prompt, expected in ((" . ", "error: --prompt: names nothing"), ("", "Use predict with")):
        command = [
            "predict", "--checkpoint", str(folder), "--input", str(tmp_path / "a.png"),
            "--output_dir", str(tmp_path / "out"), "--device", "cpu", "--prompt", prompt,
        ]  # fmt: skip
        assert main(command) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert expected in line.replace("`", "")


def test_a_prompt_that_is_too_long_is_refused(folder: Path) -> None:
    text = ". ".join(f"{colour} kettle {i}" for i, colour in enumerate(["red", "blue"] * 4))
    with pytest.raises(ConfigError, match=r"prompt: has 34 words .* reads 20\. Name fewer"):
        Detector.load(folder, device="cpu", prompt=text)


def test_without_a_prompt_it_is_said_what_to_do(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="what a text names. Use `predict` with `prompt`"):
        Detector.load(folder, device="cpu")


def test_without_transformers_it_is_said_what_to_install(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConfigError, match="needs the package transformers .*pip install"):
        Detector.load(folder, device="cpu", prompt=PROMPT)


def test_a_folder_without_a_tokenizer_is_refused(folder: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(folder / name)
    with pytest.raises(CheckpointError, match="has no tokenizer, neither"):
        Detector.load(tmp_path, device="cpu", prompt=PROMPT)


def test_another_checkpoint_reads_no_prompt(tmp_path: Path) -> None:
    config = transformers.DeformableDetrConfig(
        d_model=32, encoder_layers=1, decoder_layers=2, encoder_ffn_dim=16, decoder_ffn_dim=16,
        encoder_attention_heads=4, decoder_attention_heads=4, num_queries=5, backbone="resnet18",
        use_timm_backbone=True, use_pretrained_backbone=False,
    )  # fmt: skip
    transformers.DeformableDetrForObjectDetection(config).save_pretrained(tmp_path)
    assert load_pretrained(str(tmp_path)).other_backbone == ""
    with pytest.raises(CheckpointError, match="is not a Grounding DINO.*Leave `prompt` out"):
        Detector.load(tmp_path, device="cpu", prompt=PROMPT)
