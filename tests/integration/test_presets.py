"""Every preset is accepted by the real parser and builds."""

from pathlib import Path

import pytest

from configs.load import read_options, to_yaml
from models.build import build_model
from models.recipes import KnownRecipes

PRESETS = sorted(Path("configs").glob("*.yaml"))


@pytest.mark.parametrize("preset", PRESETS, ids=lambda p: p.stem)
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
