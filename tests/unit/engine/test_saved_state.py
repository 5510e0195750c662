"""A checkpoint that a run could not have written is refused by name before anything is loaded."""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from datasets.split import BatchSplit
from engine.checkpoint import load_checkpoint
from engine.run_log import RunLog
from engine.trainer import Trainer
from tests.unit.engine.shared_steps import IMAGES, micro_batches, small_trainer, train_epoch
from util.errors import CheckpointError

Content = dict[str, Any]
Change = Callable[[Content], object]
NAME = "transformer.level_embed"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Trainer, Content]:
    """A trainer after two steps, and the content of its checkpoint."""
    folder = tmp_path_factory.mktemp("run")
    batches = micro_batches(BatchSplit(IMAGES), broken=(), poisoned=-1)
    with RunLog(folder) as log:
        trainer = small_trainer(folder, log, batches, ema_decay=0.5)
        trainer.identity = {"classes": {"ids": []}, "config": {}, "versions": {}}
        train_epoch(trainer)
        trainer.save()
    return trainer, load_checkpoint(folder / "last.pth")


def put(*path: Any, value: Any) -> Change:
    """Return what sets the value at the end of a path of keys."""

    def change(content: Content) -> None:
        inner: Any = content
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = value

    return change


def every_moment(name: str, value: torch.Tensor) -> Change:
    def change(content: Content) -> None:
        for moments in content["optimizer"]["state"].values():
            moments[name] = value

    return change


def rng(name: str, place: int, value: Any) -> Change:
    return put("progress", "rng", 0, name, place, value=value)


def test_averages_of_a_run_that_had_none_begin_with_its_weights(tmp_path: Path) -> None:
    with RunLog(tmp_path) as log:
        before = small_trainer(tmp_path, log, [])
        before.identity = {"classes": {"ids": []}, "config": {}, "versions": {}}
        before.save()
        trainer = small_trainer(tmp_path, log, [], ema_decay=0.5)
        trainer.load_state_dict(load_checkpoint(tmp_path / "last.pth"))
    assert trainer.ema is not None
    averages = trainer.ema.state_dict()
    weights = before.detector.state_dict()
    assert averages["model"].keys() == weights.keys()
    assert all(averages["model"][name].equal(tensor) for name, tensor in weights.items())
    assert averages["count"] == 0


ATTACKS: dict[str, tuple[Change, str]] = {
    "moments of one value": (every_moment("exp_avg", torch.zeros(1)), r"exp_avg, is \(1,\)"),
    "complex moments": (
        lambda c: put("optimizer", "state", 0, "exp_avg", value=c["optimizer"]["state"][0][
            "exp_avg"].to(torch.complex64))(c),
        "exp_avg, is torch.complex64",
    ),
    "negative squares": (
        lambda c: c["optimizer"]["state"][0]["exp_avg_sq"].fill_(-1),
        "exp_avg_sq, is negative",
    ),
    "moments that are NaN": (
        lambda c: c["optimizer"]["state"][3]["exp_avg"].fill_(math.nan),
        "state 3, exp_avg, is not a number",
    ),
    "step of two values": (every_moment("step", torch.zeros(2)), "step, is"),
    "negative step": (every_moment("step", torch.tensor(-1.0)), r"step, is -1\.0"),
    "step that is text": (put("optimizer", "state", 0, "step", value="1"), "not a tensor"),
    "state of no parameter": (put("optimizer", "state", 10**6, value={}), "belongs to no"),
    "state under text": (put("optimizer", "state", "0", value={}), "belongs to no"),
    "another part": (put("optimizer", "state", 0, "max_exp_avg_sq", value=1), "other parts"),
    "fewer groups": (lambda c: c["optimizer"]["param_groups"].pop(), "groups of"),
    "fewer parameters": (lambda c: c["optimizer"]["param_groups"][0]["params"].pop(),
                         "trains other parameters than .* with `finetune`"),
    "a weight of another size": (put("model", NAME, value=torch.zeros(1)), f"'{NAME}' is"),
    "a weight that is text": (put("model", NAME, value="x" * 10**6), "not a tensor"),
    "a weight of integers": (
        lambda c: put("model", NAME, value=c["model"][NAME].long())(c), "torch.int64"),
    "a weight that is missing": (lambda c: c["model"].pop(NAME), f"'{NAME}' is missing"),
    "a weight under a number": (put("model", 7, value=torch.zeros(1)), "7 is not in the model"),
    "a weight that is NaN": (lambda c: c["model"][NAME].view(-1)[0].fill_(math.nan),
                             f"model: 1 of the .* values of '{NAME}' are not finite"),
    "an average that is infinite": (lambda c: c["ema"]["model"][NAME].fill_(math.inf), "ema: "),
    "averages that are a list": (put("ema", value=[1]), "ema is"),
    "negative count": (put("ema", "count", value=-1), "not a count"),
    "negative position": (put("progress", "next_step", value=-1), r"\['next_step'\] is -1"),
    "position of 5,000 digits": (put("progress", "step", value=10**5000), "many digits"),
    "position that is true": (put("progress", "next_epoch", value=True), "not a count"),
    "time that is NaN": (put("progress", "seconds", value=math.nan), "not a finite number"),
    "no random states": (put("progress", "rng", value=None), "not a list"),
    "torch's state is short": (put("progress", "rng", 0, "torch", value=torch.zeros(9,
                               dtype=torch.uint8)), "RNG state|GeneratorImpl"),
    "NumPy's position is outside": (rng("numpy", 2, 10**6), "'numpy'"),
    "NumPy's position is negative": (rng("numpy", 2, -1), "'numpy'"),
    "NumPy's words are few": (rng("numpy", 1, [1]), "'numpy'"),
    "NumPy's generator is another": (rng("numpy", 0, "PCG64"), "'numpy'"),
    "Python's words are few": (rng("python", 1, [1, 2]), "state vector"),
    "the GPU's state is short": (put("progress", "rng", 0, "cuda",
                                 value=[torch.zeros(3, dtype=torch.uint8)]), "'cuda'"),
    "schedule before its begin": (put("lr_scheduler", "last_epoch", value=-5), "last_epoch"),
    "schedule with few rates": (put("lr_scheduler", "_last_lr", value=[1.0]), "_last_lr"),
    "means without names": (put("progress", "steps", "averages", value=[["a"], [], 1]), "totals"),
    "a block without errors": (put("progress", "steps", "watchdog", "blocks", value=[[1.0]]),
                               "three numbers"),
    "negative errors": (put("progress", "steps", "watchdog", "block", value=[0.0, 1, 1, -1.0]),
                        "block"),
    "a count of skipped steps": (put("progress", "steps", "nonfinite", value=[]), "a mapping"),
    "best of text": (put("best", value={"AP": "high"}), "best: 'AP' is 'high'"),
    "thresholds of text": (put("thresholds", value={3: 0.5}), "thresholds: 3"),
}  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize("case", ATTACKS)
def test_an_unsound_state_is_named_and_nothing_is_loaded(
    saved: tuple[Trainer, Content], case: str
) -> None:
    trainer, sound = saved
    change, words = ATTACKS[case]
    content = copy.deepcopy(sound)
    change(content)
    before = {k: v.clone() for k, v in trainer.detector.state_dict().items()}
    place = (trainer.step, trainer.epoch, trainer.epoch_step)
    with pytest.raises(CheckpointError, match=words) as caught:
        trainer.load_state_dict(content, "x.pth")
    assert str(caught.value).startswith("x.pth: cannot be resumed: ")
    assert len(str(caught.value)) < 500
    assert (trainer.step, trainer.epoch, trainer.epoch_step) == place
    assert all(v.equal(before[k]) for k, v in trainer.detector.state_dict().items())


def test_what_a_run_has_saved_is_sound(saved: tuple[Trainer, Content]) -> None:
    trainer, sound = saved
    trainer.load_state_dict(sound)
    moments = trainer.optimizer.state_dict()["state"]
    assert moments.keys() == sound["optimizer"]["state"].keys()
    assert all(moments[i]["exp_avg"].equal(m["exp_avg"])
               for i, m in sound["optimizer"]["state"].items())  # fmt: skip


def test_moments_of_another_layout_are_put_in_that_of_their_parameter(
    saved: tuple[Trainer, Content],
) -> None:
    trainer, sound = saved
    content = copy.deepcopy(sound)
    for moments in content["optimizer"]["state"].values():
        value = moments["exp_avg"]
        moments["exp_avg"] = value.t().contiguous().t() if value.dim() == 2 else value
    trainer.load_state_dict(content)
    for parameter in trainer.optimizer.param_groups[0]["params"]:
        state = trainer.optimizer.state.get(parameter)
        assert not state or state["exp_avg"].stride() == parameter.stride()


def test_options_in_a_file_do_not_reach_the_optimiser(saved: tuple[Trainer, Content]) -> None:
    trainer, sound = saved
    content = copy.deepcopy(sound)
    content["optimizer"]["param_groups"][0].update(lr=1e9, betas=(7, 7), fused="yes")
    content["lr_scheduler"].update(step="gone", optimizer=None, lr_lambdas=[{"a": 1}] * 9)
    trainer.load_state_dict(content)
    group = trainer.optimizer.param_groups[0]
    assert (group["betas"], group["fused"]) == ((0.9, 0.999), True)
    assert group["lr"] < 1
    assert callable(trainer.scheduler.step)
