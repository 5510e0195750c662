"""Every preset is accepted by the real parser, builds, and trains."""

from pathlib import Path

import pytest

from configs.load import read_options, to_yaml
from models.build import build_model
from models.recipes import KnownRecipes
from tests.integration.conftest import Cli, read_log
from tests.lanes import some

PRESETS = sorted(Path("configs").glob("*.yaml"))
LARGE = [Path("configs/dino_swin_l.yaml")]  # 218 M parameters


@pytest.mark.parametrize(
    "preset", some(PRESETS, *(p for p in PRESETS if p not in LARGE)), ids=lambda p: p.stem
)
def test_preset_builds_and_its_resolved_form_is_a_config(preset: Path, tmp_path: Path) -> None:
    config = read_options(str(preset), {}, KnownRecipes()).config()
    model = build_model(config.model, num_classes=91, recipes=config.recipes)
    assert sum(p.numel() for p in model.parameters()) > 10_000
    resolved = tmp_path / "config.yaml"
    resolved.write_text(to_yaml(config))
    assert read_options(str(resolved), {}, KnownRecipes()).config() == config


@pytest.mark.parametrize(
    ("preset", "parameters"),
    [
        ("deformable_detr_r50_single_scale", 34_066_593),
        ("deformable_detr_r50_single_scale_dc5", 34_066_593),
        ("deformable_detr_r50", 40_069_665),
        ("deformable_detr_r50_refine", 40_849_660),
        ("deformable_detr_r50_refine_two_stage", 41_181_529),
    ],
)
def test_published_presets_have_the_published_size(preset: str, parameters: int) -> None:
    config = read_options(f"configs/{preset}.yaml", {}).config()
    model = build_model(config.model, num_classes=91)
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_every_preset_opens_with_what_it_is() -> None:
    for preset in PRESETS:
        assert preset.read_text().startswith("# "), preset


@pytest.mark.parametrize("preset", some([p.stem for p in PRESETS], "deformable_detr_r50_dcn"))
def test_a_preset_trains_two_steps(preset: str, cli: Cli, shapes: Path, tmp_path: Path) -> None:
    done = cli(
        "train", "--config", f"configs/{preset}.yaml", "--coco_path", shapes, "--device", "cpu",
        "--output_dir", tmp_path, "--backbone_weights", "none", "--max_steps", "2",
        "--batch_size", "1", "--effective_batch_size", "1", "--train_scales", "64",
        "--eval_scale", "64", "--max_size", "96", "--crop_scales", "64", "--crop_size", "48", "64",
        "--num_workers", "0", "--no_probe", "--no_tensorboard", "--num_images", "0",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert read_log(tmp_path)[-1]["train_loss"] > 0
