"""What a plan chooses: rules that hold for all data, machines, hours and given options."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.load import Given, read_options, to_yaml
from engine.auto.choices import Machine, Measurement, Planner, SizeTrial
from engine.auto.facts import Facts
from models.recipes import KnownRecipes

GIB = 2**30
FACTS = Facts(
    images=300, val_images=50, boxes=12000, most_boxes=58, short_side=480.0, aspect=4 / 3,
    area=4 / 3, small=0.035, large=0.12, overlapping=0.0,
)  # fmt: skip
CPU, GPU = Machine(False, True, 16 * GIB), Machine(True, True, 80 * GIB)


def measurement(seconds: float, memory: float = 0.1 * GIB) -> Measurement:
    """Return costs in proportion to the pixels, for an image of 240 x 320."""
    small, large = (SizeTrial(n * 76800, n * seconds, n * memory) for n in (1, 4))
    return Measurement((small, large), 0.3 * large.seconds, 0.0, 0.05 * GIB)


def planner(
    facts: Facts = FACTS,
    machine: Machine = CPU,
    hours: float | None = 1.0,
    *,
    given: Any = None,
    measured: Measurement | None = None,
    epochs: int = 50,
) -> Planner:
    name = "finetune_r50" if machine.gpu else "finetune_small"
    preset = read_options(name, {}, KnownRecipes()).config()
    measured = measured or measurement(0.1)
    return Planner(facts, machine, preset, given or {}, hours, epochs, measured)


def config_of(plan: Planner) -> Any:
    """Return the config of the run that is planned."""
    name = "finetune_r50" if plan.machine.gpu else "finetune_small"
    preset = read_options(name, {}, KnownRecipes())
    return Given(plan.given, KnownRecipes()).on(Given(plan.values)).on(preset).config()


def numbers(low: float, high: float) -> "st.SearchStrategy[float]":
    return st.floats(math.log(low), math.log(high)).map(math.exp)


SOME_FACTS = st.builds(
    Facts,
    images=st.integers(1, 200_000),
    val_images=st.integers(1, 10_000),
    boxes=st.just(1),
    most_boxes=st.integers(1, 5000),
    short_side=numbers(8, 8000),
    aspect=st.floats(4 / 3, 2),
    area=st.floats(0.5, 2),
    small=numbers(1e-4, 0.9),
    large=numbers(1e-3, 1),
    overlapping=st.floats(0, 1),
)
MACHINES = st.builds(
    Machine,
    gpu=st.booleans(),
    bfloat16=st.booleans(),
    memory=st.one_of(st.just(0), st.integers(GIB, 200 * GIB)),
    processes=st.sampled_from([1, 2, 3, 8]),
)
MEASUREMENTS = st.builds(measurement, numbers(1e-3, 10), numbers(1e6, 1e10))
GIVEN = st.fixed_dictionaries(
    {},
    optional={
        "data": st.fixed_dictionaries(
            {},
            optional={
                "eval_scale": st.integers(16, 1000),
                "train_scales": st.sampled_from([(96,), (320, 480, 640)]),
                "max_size": st.integers(64, 2000),
                "nms_iou": st.sampled_from([None, 0.5]),
                "num_select": st.integers(1, 500),
            },
        ),
        "model": st.fixed_dictionaries(
            {},
            optional={
                "num_queries": st.integers(1, 900),
                "num_feature_levels": st.sampled_from([1, 3, 4, 5]),
            },
        ),
        "optim": st.fixed_dictionaries(
            {},
            optional={
                "batch_size": st.integers(1, 8),
                "effective_batch_size": st.integers(1, 64),
                "lr_scheduler": st.sampled_from(["step", "flat_cosine"]),
            },
        ),
        "run": st.fixed_dictionaries({}, optional={"eval_every": st.integers(1, 9)}),
    },
)


@pytest.mark.long
@given(SOME_FACTS, MACHINES, numbers(0.001, 1000), GIVEN, MEASUREMENTS)
@settings(deadline=None)
def test_every_plan_is_accepted_and_what_is_given_wins(
    facts: Facts, machine: Machine, hours: float, options: Any, measured: Measurement
) -> None:
    plan = planner(facts, machine, hours, given=options, measured=measured)
    config = config_of(plan)
    for section, entries in options.items():
        for name, value in entries.items():
            assert getattr(getattr(config, section), name) == value
    lines = [choice.line() for choice in plan.choices]
    named = {name for entries in options.values() for name in entries}
    assert {word for line in lines for word in line.replace(",", "").split()} >= named
    assert sum(line.count("(given)") for line in lines) == len(named)
    again = planner(facts, machine, hours, given=options, measured=measured)
    assert [c.line() for c in again.choices] == lines
    assert list(again.notices()) == list(plan.notices())


@pytest.mark.long
@given(SOME_FACTS, MACHINES, numbers(0.001, 1000), MEASUREMENTS)
@settings(deadline=None)
def test_no_choice_is_below_its_floor(
    facts: Facts, machine: Machine, hours: float, measured: Measurement
) -> None:
    plan = planner(facts, machine, hours, measured=measured)
    config = config_of(plan)
    model, data, optim = config.model, config.data, config.optim
    assert model.num_queries >= max(100, min(1.5 * facts.most_boxes, 1500))
    assert model.num_queries % 50 == 0
    assert data.num_select >= min(facts.most_boxes, model.num_queries)
    assert data.max_size >= max(data.train_scales)
    assert min(data.train_scales) >= 16
    assert optim.effective_batch_size % (optim.batch_size * machine.processes) == 0
    # a coarse level for boxes of more than eight cells of the one before
    cells = facts.large * data.eval_scale / (32 * 2 ** (model.num_feature_levels - 3))
    assert cells <= 8.001 or model.num_feature_levels == 5
    limits = min(160, 32 * math.floor(2 * facts.short_side / 32))
    assert data.eval_scale >= limits
    assert config.run.eval_every >= 1


@pytest.mark.long
@given(SOME_FACTS, MACHINES, numbers(0.01, 100), st.floats(1, 100), MEASUREMENTS)
@settings(deadline=None)
def test_more_hours_never_shrink_images(
    facts: Facts, machine: Machine, hours: float, factor: float, measured: Measurement
) -> None:
    less, more = (planner(facts, machine, h, measured=measured) for h in (hours, hours * factor))
    assert less.side <= more.side
    assert more.side <= more.wanted == less.wanted


@given(SOME_FACTS, MACHINES, numbers(0.01, 100), MEASUREMENTS)
@settings(deadline=None)
def test_images_are_no_smaller_than_time_memory_and_their_own_size_demand(
    facts: Facts, machine: Machine, hours: float, measured: Measurement
) -> None:
    plan = planner(facts, machine, hours, measured=measured)
    side = plan.side
    notices = " ".join(plan.notices())
    small = facts.small * side
    assert ("may vanish" in notices) == (round(small) < 16)
    next_larger = side + 32
    if small >= 16 or side >= min(2048, 2 * facts.short_side) - 32:
        return
    # by definition: at the next size, either an epoch takes a tenth of the time or memory is full
    pixels = facts.area * next_larger**2
    speed = machine.processes if machine.gpu else 1
    epoch = facts.images * measured.trials[1].seconds * pixels / measured.trials[1].pixels / speed
    largest = (1.1 * next_larger) ** 2 * facts.aspect
    of_image = measured.trials[1].memory * largest / measured.trials[1].pixels
    share = (0.8 if machine.gpu else 0.5) * machine.memory
    full = bool(machine.memory) and measured.fixed_memory + of_image > share * (1 - 1e-9)
    assert full or 10 * epoch > 0.85 * 3600 * hours * (1 - 1e-9)
    assert full or small >= 7.999  # a cell of the finest level, whatever the hours


def test_small_boxes_get_larger_images_within_the_hours() -> None:
    plan = planner()
    assert (plan.side, list(plan.notices())) == (480, [])  # 16 / 0.035 = 457, in steps of 32
    assert plan.values["data"]["train_scales"] == (416, 464, 480, 496, 544)
    assert plan.values["data"]["max_size"] == 736
    assert "at 400 they would be 14" in plan.choices[0].line()
    # 0.1 s for 76,800 pixels: ten epochs of 300 images at 480 take 0.33 hours, of 0.85 * 0.39
    hurried = planner(hours=0.3)
    assert hurried.side == 416
    (notice,) = hurried.notices()
    assert "smaller than 15 pixels" in notice
    assert "parts of at most 437 pixels" in notice
    assert "give at least 0.39 hours" in notice
    assert "at 480, 0.3 hours hold 7.7 of 10 epochs" in hurried.choices[0].line()
    # where boxes would be smaller than a cell, there are fewer epochs instead
    impossible = planner(hours=0.03)
    assert impossible.side == 256  # 8 / 0.035 = 229
    assert "0.03 hours hold 2.7 epochs" in list(impossible.notices())[1]


def test_little_memory_means_micro_batches_and_then_smaller_images() -> None:
    sizes = []
    for memory in (16, 3, 1):
        plan = planner(machine=Machine(False, True, memory * GIB), hours=None)
        optim = plan.values["optim"]
        assert optim["effective_batch_size"] == 4
        sizes.append((plan.side, optim["batch_size"]))
    # an image of 528 x 704 keeps 0.48 GiB, and half of the memory may be taken
    assert sizes == [(480, 4), (480, 2), (448, 1)]


def test_large_boxes_get_coarse_levels_and_crowds_queries() -> None:
    assert planner(replace(FACTS, large=0.3)).values["model"]["num_feature_levels"] == 3
    assert planner(replace(FACTS, large=0.9)).values["model"]["num_feature_levels"] == 4
    for most, queries in ((1, 100), (66, 100), (67, 150), (100, 150), (101, 200), (5000, 1500)):
        plan = planner(replace(FACTS, most_boxes=most))
        assert plan.values["model"]["num_queries"] == queries
        assert any("queries are few" in notice for notice in plan.notices()) == (most > 1000)


def test_nms_is_left_out_where_it_would_remove_objects_or_is_not_needed() -> None:
    for facts, hours, expected in (
        (FACTS, 1.0, 0.7),
        (replace(FACTS, overlapping=0.02), 1.0, None),
        (FACTS, 100.0, None),
    ):
        assert planner(facts, hours=hours).values["data"]["nms_iou"] == expected


def test_a_gpu_gets_its_preset_with_crops_in_proportion() -> None:
    config = config_of(planner(replace(FACTS, small=0.08), GPU, hours=10.0))
    assert config.model.backbone == "resnet50"
    assert [*config.recipes] == ["denoising"]
    assert config.optim.precision == "bf16"
    assert config.optim.effective_batch_size == 16
    assert config.data.train_scales == tuple(range(480, 801, 32))
    assert (config.data.crop_scales, config.data.crop_size) == ((400, 500, 600), (384, 600))
    small = config_of(planner(replace(FACTS, small=0.08, short_side=320.0), GPU))
    assert small.data.eval_scale == 640
    assert small.data.crop_size == (307, 480)


def test_costs_lie_on_a_line_through_both_trials() -> None:
    trials = SizeTrial(100, 2.0, 10.0), SizeTrial(300, 5.0, 30.0)
    measured = Measurement(trials, 0.0, 0.0, 0.0)
    assert measured.at(100) == pytest.approx((2.0, 10.0))
    assert measured.at(200) == pytest.approx((3.5, 20.0))
    assert measured.at(600) == pytest.approx((9.5, 60.0))
    # a clock that trembled cannot make larger images free
    odd = replace(measured, trials=(SizeTrial(100, 6.0, 10.0), trials[1]))
    assert odd.at(600)[0] == pytest.approx(5.0 + 300 * 5.0 / 300 / 2)


def test_a_plan_is_an_ordinary_file(tmp_path: Path) -> None:
    config = config_of(planner())
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert read_options(str(tmp_path / "config.yaml"), {}, KnownRecipes()).config() == config
