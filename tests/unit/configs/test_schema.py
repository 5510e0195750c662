"""The program's own options: defaults, contradictions, and every preset that is shipped."""

import dataclasses
import typing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from configs.command_line import OptionParser, read_command_line
from configs.load import Given, Values, read_options, to_yaml
from configs.schema import (
    SECTIONS,
    Config,
    DataConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
)
from engine.commands.eval import EvalOptions
from models.build import build_criterion
from models.recipes import KnownRecipes
from util.errors import ConfigError

PRESETS = sorted((Path(__file__).parents[3] / "configs").glob("*.yaml"))


def test_names_are_unique_over_all_sections() -> None:
    names = [f.name for section in SECTIONS.values() for f in dataclasses.fields(section)]
    assert len(set(names)) == len(names)


def test_sections_are_those_of_the_config() -> None:
    sections = typing.get_type_hints(Config)
    del sections["recipes"]
    assert sections == dict(SECTIONS)


def test_defaults_are_the_published_recipe() -> None:
    model, loss, optim = ModelConfig(), LossConfig(), OptimConfig()
    assert (model.hidden_dim, model.nheads, model.num_queries, model.dim_feedforward) == (
        256, 8, 300, 1024,
    )  # fmt: skip
    assert (loss.set_cost_class, loss.set_cost_bbox, loss.set_cost_giou) == (2, 5, 2)
    assert build_criterion(loss).weights == {"loss_ce": 2, "loss_bbox": 5, "loss_giou": 2}
    assert (optim.lr, optim.lr_backbone, optim.lr_linear_proj_mult) == (2e-4, 2e-5, 0.1)
    assert (optim.weight_decay, optim.epochs, optim.lr_drop) == (1e-4, 50, 40)
    assert optim.clip_max_norm == 0.1
    assert DataConfig().train_scales == (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        (ModelConfig, {"two_stage": True}, "two_stage: needs `with_box_refine`"),
        (ModelConfig, {"hidden_dim": 100}, "hidden_dim: must be a multiple of `nheads 8`, not 100"),
        (ModelConfig, {"hidden_dim": 12, "nheads": 3}, "hidden_dim: must be a multiple of 8"),
        (ModelConfig, {"dilation": True}, "dilation: DC5 is a single-scale model"),
        (ModelConfig, {"num_feature_levels": 2}, "num_feature_levels: must be one of 1, 3, 4"),
        (ModelConfig, {"position_embedding": "sin"}, "Did you mean 'sine'?"),
        (ModelConfig, {"num_queries": 0}, "num_queries: must be at least 1, not 0."),
        (ModelConfig, {"dropout": 1.5}, "dropout: must be at least 0 and at most 1, not 1.5."),
        (DataConfig, {"crop_size": (600, 384)}, "crop_size: must be two sizes, the smaller first"),
        (DataConfig, {"crop_size": (600,)}, "crop_size: must be two sizes"),
        (DataConfig, {"fixed_size": 15}, "fixed_size: must be 0 or at least 16"),
        (DataConfig, {"mosaic_affine": (10.0,)}, "mosaic_affine: must be degrees, a shift"),
        (DataConfig, {"mosaic_affine": (10.0, 0.1, 0.0, 1.5)}, "mosaic_affine: must be degrees"),
        (DataConfig, {"mosaic_affine": (10.0, 0.1, 1.5, 0.5)}, "mosaic_affine: must be degrees"),
        (DataConfig, {"augment_phases": (0.5, 0.1, 1.0)}, "augment_phases: must be three shares"),
        (DataConfig, {"augment_phases": (0.5, 0.6)}, "augment_phases: must be three shares"),
        (DataConfig, {"train_scales": ()}, "train_scales: needs at least one size"),
        (OptimConfig, {"lr": 0.0}, "lr: must be more than 0, not 0.0."),
        (OptimConfig, {"lr_drop_epochs": (10, 0)}, "lr_drop_epochs: must be at least 1, not 0."),
        (OptimConfig, {"lr_flat": 0.8, "lr_tail": 0.3}, "lr_flat 0.8: and `lr_tail 0.3`"),
        (OptimConfig, {"max_hours": -1.0}, "max_hours: must be at least 0"),
        (OptimConfig, {"lr_scheduler": "flat"}, "must be one of step, cosine, flat_cosine"),
        (RunConfig, {"seed": -1}, "seed: must be at least 0, not -1."),
        (EvalOptions, {"max_dets": 100}, "max_dets: must be 0 or more than COCO's 100"),
        (EvalOptions, {"max_dets": -1}, "max_dets: must be at least 0, not -1."),
    ],
)
def test_contradictions_and_bounds_are_one_line_errors(
    section: type[Any], values: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as error:
        section(**values)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


UNION, PRIME = {"union_set": True}, {"cls_loss": "ia_bce", "prime_samples": 2}
LAST = {"aux_loss": False}
HYBRID = {"hybrid_proposals": True}
TWO_STAGE = {"with_box_refine": True, "two_stage": True}


def test_a_presets_averages_are_left_out_by_one_option() -> None:
    """The preset's `ema_tau` stays, and means nothing then."""
    preset = read_options("finetune_small", {}, KnownRecipes())
    assert preset.config().optim.ema_tau > 0
    config = Given({"optim": {"ema_decay": 0.0}}, KnownRecipes()).on(preset).config()
    config.check_effects()
    assert not config.optim.ema_decay


@pytest.mark.parametrize(
    ("model", "loss", "recipes", "message"),
    [
        ({}, UNION, {"mds": {}}, "union_set: has no effect with `one_to_many mds`"),
        (TWO_STAGE, PRIME, {"mds": {}}, "prime_samples: has no effect with `one_to_many mds`"),
        (LAST, UNION, {}, "union_set: has no effect on the last decoder layer alone"),
        (TWO_STAGE | {"dec_layers": 1}, UNION, {}, "union_set: has no effect on the last"),
        (LAST, PRIME, {}, "prime_samples: has no effect on the last decoder layer alone"),
        (TWO_STAGE | LAST, PRIME, {}, ""),  # the encoder learns by it
        (TWO_STAGE, UNION, {"ms": {}}, ""),
        (TWO_STAGE | LAST, PRIME, {"mr": {}}, "prime_samples: has no effect on the last"),
        ({}, {}, {"hybrid": HYBRID}, "hybrid_proposals: has no effect without `two_stage`"),
        (TWO_STAGE, {}, {"hybrid": HYBRID}, ""),
    ],
)
def test_options_of_a_new_run_that_would_do_nothing_are_refused(
    model: dict[str, Any], loss: dict[str, Any], recipes: dict[str, Any], message: str
) -> None:
    config = Given({"model": model, "loss": loss, "recipes": recipes}, KnownRecipes()).config()
    if not message:
        config.check_effects()
        return
    with pytest.raises(ConfigError, match=message) as error:
        config.check_effects()
    assert "\n" not in str(error.value)


def config_of(argv: str) -> Config:
    """Return the options of a run's command line."""
    command = SimpleNamespace(SECTIONS=SECTIONS, RECIPES={})
    return read_command_line(OptionParser(), command, argv.split()).config()


def test_official_spellings_are_understood() -> None:
    command = (
        "--lr 2e-4 --lr_backbone 2e-5 --lr_linear_proj_mult 0.1 --lr_drop 40 --batch_size 2 "
        "--epochs 50 --clip_max_norm 0.1 --with_box_refine --two_stage --backbone resnet50 "
        "--position_embedding sine --num_feature_levels 4 --enc_layers 6 --dec_layers 6 "
        "--dim_feedforward 1024 --hidden_dim 256 --dropout 0.1 --nheads 8 --num_queries 300 "
        "--enc_n_points 4 --dec_n_points 4 --no_aux_loss --set_cost_class 2 --set_cost_bbox 5 "
        "--set_cost_giou 2 --cls_loss_coef 2 --bbox_loss_coef 5 --giou_loss_coef 2 "
        "--focal_alpha 0.25 --coco_path data --output_dir out --device cuda --seed 42 "
        "--num_workers 2 --weight_decay 1e-4 --lr_drop_epochs 30 40"
    )
    config = config_of(command)
    assert config.model.two_stage
    assert not config.model.aux_loss
    assert config.optim.lr_drop_epochs == (30, 40)
    assert config.run.output_dir == "out"


@pytest.mark.parametrize(
    ("script", "preset"),
    [
        ("", "deformable_detr_r50"),
        ("--with_box_refine", "deformable_detr_r50_refine"),
        ("--with_box_refine --two_stage", "deformable_detr_r50_refine_two_stage"),
        ("--num_feature_levels 1", "deformable_detr_r50_single_scale"),
        ("--num_feature_levels 1 --dilation", "deformable_detr_r50_single_scale_dc5"),
    ],
)
def test_official_scripts_give_the_models_and_losses_of_the_presets(
    script: str, preset: str
) -> None:
    config = config_of(script)
    expected = read_options(preset, {}).config()
    assert (config.model, config.loss) == (expected.model, expected.loss)
    assert dataclasses.replace(config.optim, effective_batch_size=32) == expected.optim


def test_a_resolved_config_is_a_config_file(tmp_path: Path) -> None:
    config = Given({"model": {"num_queries": 7}, "data": {"crop_scales": (99,)}}).config()
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(config), encoding="utf-8")
    assert read_options(str(file), {}).config() == config
    overridden = read_options(str(file), {"model": {"num_queries": 8}}).config()
    assert overridden.model.num_queries == 8
    assert overridden.data.crop_scales == (99,)


def test_a_data_location_replaces_every_location_below_it() -> None:
    base: Values = {
        "data": {"coco_path": "coco", "val_images": "v", "max_size": 99},
        "run": {"seed": 1},
    }
    given = {"data": {"train_images": "t"}}
    merged = {"data": {"max_size": 99, "train_images": "t"}, "run": {"seed": 1}}
    assert Given(given).on(Given(base)).values == merged
    kept = Given({"data": {"max_size": 5}}).on(Given(base))
    assert kept.values["data"]["coco_path"] == "coco"
    assert base["data"]["coco_path"] == "coco"


@pytest.mark.parametrize("preset", PRESETS, ids=[p.stem for p in PRESETS])
def test_presets_load_and_say_what_they_reproduce(preset: Path) -> None:
    read_options(str(preset), {}, KnownRecipes()).config()
    assert preset.read_text(encoding="utf-8").startswith("#")


def test_an_augmentation_recipe_yields_to_explicit_options() -> None:
    assert Given({}).config().data == Given({"data": {"augment": "official"}}).config().data
    strong = Given({"data": {"augment": "strong", "mosaic": 0.0}}).config().data
    assert (strong.mosaic, strong.mixup, strong.random_crop) == (0.0, 0.1, False)
    none = Given({"data": {"augment": "none", "hflip": 0.5}}).config().data
    assert (none.hflip, none.random_crop) == (0.5, False)
    lsj = Given({"data": {"augment": "lsj", "fixed_size": 640}}).config().data
    assert (lsj.fixed_size, lsj.scale_jitter, lsj.random_crop) == (640, (0.1, 2.0), False)
    dense = Given({"data": {"augment": "dense", "mosaic_affine": ()}}).config().data
    assert (dense.mosaic_affine, dense.copy_blend) == ((), 0.5)


def test_a_recipe_replaces_the_parts_of_the_one_below() -> None:
    saved = {
        "data": dataclasses.asdict(
            Given({"data": {"augment": "strong", "max_size": 99}}).config().data
        )
    }
    for preset in ("dense", "lsj"):
        old = {"data": dataclasses.asdict(Given({"data": {"augment": preset}}).config().data)}
        plain = Given({"data": {"augment": "official"}}).on(Given(old)).config().data
        assert plain == Given({"data": {"augment": "official"}}).config().data
    again = Given({"data": {"augment": "official"}}).on(Given(saved)).config().data
    assert (again.mosaic, again.random_crop, again.max_size) == (0.0, True, 99)
    kept = Given({"data": {"hflip": 0.1}}).on(Given(saved)).config().data
    assert (kept.mosaic, kept.hflip) == (0.25, 0.1)
