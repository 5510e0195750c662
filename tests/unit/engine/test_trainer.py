"""Steps: the same gradients in any number of processes and micro-batches, and what is skipped."""

import signal
import socket
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.multiprocessing.spawn import start_processes

from configs.schema import Config, OptimConfig, RunConfig
from datasets.split import BatchSplit
from engine.checkpoint import load_checkpoint
from engine.guards import UnreadableImages
from engine.probe import try_step
from engine.run_log import RunLog
from models.build import build_model
from tests.lanes import some
from tests.unit.engine.shared_steps import (
    BOXES,
    BROKEN,
    CASES,
    CLASSES,
    IMAGES,
    QUICK,
    SHARES,
    STEPS,
    Result,
    logged,
    make_trainer,
    micro_batches,
    small_trainer,
    train_epoch,
    work,
)
from tests.unit.models.small import small_config
from util.batch import Batch, UnreadableImage
from util.errors import UserError
from util.world import World

WAYS = [(size, micro) for size, micros in SHARES.items() for micro in micros]
FINITE = [name for name in CASES if name != "poisoned"]


# A folder of logs, and by number of processes what each of them found.
Results = tuple[Path, dict[int, list[Result]]]
ResultsOf = Callable[[str], Results]


@pytest.fixture(scope="module")
def results_of(tmp_path_factory: pytest.TempPathFactory) -> ResultsOf:
    """Return what gives the results of a case. All quick ones run together, and all others."""

    @cache
    def run(*, quick: bool) -> Results:
        folder = tmp_path_factory.mktemp("steps")
        names = [name for name in CASES if (name in QUICK) == quick]
        with socket.socket() as one, socket.socket() as other:
            for free in (one, other):
                free.bind(("localhost", 0))
            ports = {1: 0, 2: one.getsockname()[1], 3: other.getsockname()[1]}
        processes = start_processes(  # type: ignore[no-untyped-call]
            work, (names, ports, folder), nprocs=3, join=False
        )
        while not processes.join(timeout=120):
            pass
        return folder, {
            size: [torch.load(folder / f"{size}_{rank}.pth") for rank in range(size)]
            for size in SHARES
        }

    return lambda case: run(quick=case in QUICK)


@pytest.mark.long
@pytest.mark.parametrize(("size", "micro"), WAYS)
@pytest.mark.parametrize("case", some(FINITE, *QUICK))
def test_gradients_are_those_of_one_big_batch(
    results_of: ResultsOf, case: str, size: int, micro: int
) -> None:
    _, found = results_of(case)
    expected = found[1][0][f"{case} 1"]["gradients"]
    assert len(expected) == STEPS
    for process in found[size]:
        actual = process[f"{case} {micro}"]["gradients"]
        assert len(actual) == STEPS
        for now, wanted in zip(actual, expected, strict=True):
            assert now.keys() == wanted.keys()
            # a gradient that is zero but for rounding is compared with the others
            floor = 1e-6 * max(gradient.norm() for gradient in wanted.values())
            for name, gradient in wanted.items():
                error = (now[name] - gradient).norm() / (gradient.norm() + floor)
                assert error < 1e-8, name


@pytest.mark.long
@pytest.mark.parametrize(("size", "micro"), WAYS)
@pytest.mark.parametrize("case", some(FINITE, *QUICK))
def test_logged_losses_are_those_of_one_big_batch(
    results_of: ResultsOf, case: str, size: int, micro: int
) -> None:
    folder, found = results_of(case)
    expected = logged(folder / "1" / f"{case} 1")
    actual = logged(folder / str(size) / f"{case} {micro}")
    assert [line["step"] for line in actual] == list(range(STEPS))
    for now, wanted in zip(actual, expected, strict=True):
        values = {k: v for k, v in wanted.items() if "time" not in k}
        assert {k: v for k, v in now.items() if "time" not in k} == pytest.approx(values, rel=1e-5)
    for process in found[size]:
        means = found[1][0][f"{case} 1"]["averages"]
        assert process[f"{case} {micro}"]["averages"] == pytest.approx(means, rel=1e-5)


@pytest.mark.long
@pytest.mark.parametrize(("size", "micro"), WAYS)
def test_one_image_that_is_not_finite_skips_the_step_of_all_processes(
    results_of: ResultsOf, size: int, micro: int
) -> None:
    folder, found = results_of("poisoned")
    for process in found[size]:
        result = process[f"poisoned {micro}"]
        assert result["steps"] == result["skipped"] == STEPS
        assert not result["changed"]
        assert result["averages"] == {}
    reports = sorted((folder / str(size) / f"poisoned {micro}" / "nonfinite").iterdir())
    assert len(reports) == STEPS * size
    blamed = [path for path in reports if "image" in path.read_text().split("first_nonfinite")[1]]
    assert len(blamed) == STEPS  # by the process that had the image
    assert {path.stem.rsplit("_")[-1] for path in blamed} == {f"rank{2 % size}"}


class CountingWorld(World):
    """A single process that notes its exchanges."""

    def __init__(self) -> None:
        super().__init__()
        self.__dict__["exchanged"] = []

    def every(self, values: Sequence[float]) -> list[list[float]]:
        """Take note of what is added up."""
        self.__dict__["exchanged"].append(list(values))
        return super().every(values)


def test_a_step_makes_one_exchange_between_the_hosts(tmp_path: Path) -> None:
    batches = micro_batches(BatchSplit(IMAGES), broken=BROKEN, poisoned=-1)
    with RunLog(tmp_path) as log:
        trainer = small_trainer(tmp_path, log, batches)
        trainer.world = world = CountingWorld()
        trainer.flush_every = 9
        train_epoch(trainer)
    images = IMAGES - len(BROKEN)
    counts = [n for i, n in enumerate(BOXES) if i not in BROKEN]
    expected = [[images, sum(counts), max(counts), 0]] * STEPS
    assert world.__dict__["exchanged"] == expected


def weights(model: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def same(before: list[torch.Tensor], model: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_a_step_without_a_readable_image_counts_and_changes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = Batch(None, [], [UnreadableImage(7, "seven.png", "gone")])
    with RunLog(tmp_path) as log:
        trainer = small_trainer(tmp_path, log, [bad, bad])
        before = weights(trainer.detector)
        train_epoch(trainer)
        assert same(before, trainer.detector)
    assert (trainer.step, trainer.epoch_step) == (2, 2)
    assert trainer.scheduler.last_epoch == 0
    assert set(trainer.guards.unreadable.images) == {"seven.png"}
    assert capsys.readouterr().out.count("'seven.png' cannot be read (gone)") == 1


def test_training_ends_before_a_step_or_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (batch, _) = micro_batches(BatchSplit(IMAGES), broken=BROKEN, poisoned=-1)
    logged_at: list[tuple[int, int]] = []
    with RunLog(tmp_path) as log:
        trainer = small_trainer(tmp_path, log, [batch] * 9)
        before = weights(trainer.detector)
        trainer.stop.number = signal.SIGTERM
        train_epoch(trainer)
        assert same(before, trainer.detector)
        assert trainer.step == 0
        trainer.stop.number, trainer.flush_every, trainer.max_steps = 0, 2, 3
        monkeypatch.setattr(
            trainer.guards.memory, "on_log", lambda s: logged_at.append((s.step, trainer.step))
        )
        train_epoch(trainer)
        assert trainer.step == 3
        assert not same(before, trainer.detector)
    assert logged_at == [(0, 2), (1, 3), (2, 3)]  # the last one waits, until the end
    assert [line["step"] for line in logged(tmp_path)] == [0, 1, 2]


def test_too_many_skipped_steps_end_the_run_and_leave_the_weights(tmp_path: Path) -> None:
    (batch, _) = micro_batches(BatchSplit(IMAGES), broken=(), poisoned=2)
    with RunLog(tmp_path) as log:
        trainer = small_trainer(tmp_path, log, [batch] * 5, ema_decay=0.5)
        before = weights(trainer.detector)
        with pytest.raises(UserError, match=r"not finite in 2 steps in a row \(image 3 of 12"):
            train_epoch(trainer)
        assert same(before, trainer.detector)
        assert trainer.ema is not None
        averages = trainer.ema.state_dict()["model"]
        assert all(torch.isfinite(v).all() for v in averages.values())


@pytest.mark.parametrize("max_steps", [1, 2])
def test_more_steps_continue_an_epoch_whose_evaluation_was_interrupted(
    tmp_path: Path, max_steps: int
) -> None:
    (batch, _) = micro_batches(BatchSplit(IMAGES), broken=(), poisoned=-1)
    with RunLog(tmp_path) as log:
        trainer = small_trainer(tmp_path, log, [batch] * 3)
        trainer.identity = {"classes": {"ids": []}, "config": {}, "versions": {}}
        trainer.step = trainer.epoch_step = 1
        trainer.unevaluated = True  # at the end of --max_steps 1
        trainer.save()
        trainer.max_steps = max_steps
        trainer.load_state_dict(load_checkpoint(tmp_path / "last.pth"))
    assert trainer.unevaluated == (max_steps == 1)


@pytest.mark.long
def test_an_interrupted_evaluation_that_is_no_longer_wanted_is_left_out(tmp_path: Path) -> None:
    """As where the run goes on with `no_validate`, or with another `eval_every`."""
    (batch, _) = micro_batches(BatchSplit(IMAGES), broken=(), poisoned=-1)
    with RunLog(tmp_path) as log:
        trainer = small_trainer(tmp_path, log, [batch], epochs=2)
        trainer.identity = {"classes": {"ids": []}, "config": {}, "versions": {}}
        trainer.step = trainer.epoch_step = 1
        trainer.unevaluated = True
        assert trainer.fit() == 0
    assert (trainer.step, trainer.epoch) == (2, 2)
    assert not load_checkpoint(tmp_path / "last.pth")["progress"]["unevaluated"]


def test_a_run_without_a_loss_scale_continues_with_the_initial_one(tmp_path: Path) -> None:
    with RunLog(tmp_path) as log:
        trainer = small_trainer(tmp_path, log, [])
        trainer.identity = {"classes": {"ids": []}, "config": {}, "versions": {}}
        trainer.save()
        content = load_checkpoint(tmp_path / "last.pth")
        assert content["scaler"] == {}
        trainer.precision.scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
        trainer.load_state_dict(content)
    assert trainer.precision.scaler.get_scale() == 64.0


def test_a_step_that_does_not_fit_into_memory_says_what_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (batch, _) = micro_batches(BatchSplit(IMAGES), broken=(), poisoned=-1)
    with RunLog(tmp_path) as log:
        trainer = small_trainer(tmp_path, log, [batch])

        def fail(error: Exception) -> None:
            raise error

        monkeypatch.setattr(trainer.precision, "step", lambda *_: fail(MemoryError()))
        with pytest.raises(UserError, match="out of memory on 12 x 32 x 32 pixels with up to 9"):
            train_epoch(trainer)
        monkeypatch.setattr(trainer.precision, "step", lambda *_: fail(RuntimeError("another")))
        with pytest.raises(RuntimeError, match="another"):
            train_epoch(trainer)


def test_a_probe_leaves_nothing_behind(tmp_path: Path) -> None:
    (batch, _) = micro_batches(BatchSplit(IMAGES), broken=(), poisoned=-1)
    with RunLog(tmp_path) as log:
        trainer = small_trainer(tmp_path, log, [batch])
        before = {k: v.clone() for k, v in trainer.detector.state_dict().items()}
        try_step(trainer, batch)
    assert all(v.equal(before[k]) for k, v in trainer.detector.state_dict().items())
    assert all(p.grad is None for p in trainer.detector.parameters())
    assert not (tmp_path / "metrics.jsonl").exists()


def test_each_unreadable_image_is_named_once(capsys: pytest.CaptureFixture[str]) -> None:
    unreadable = UnreadableImages()
    for name in ("a", "b", "a"):
        unreadable.report(Batch(None, [], [UnreadableImage(1, name, "torn")]))
    assert capsys.readouterr().out.splitlines() == [
        f"warning: image 1 '{name}' cannot be read (torn) and is skipped." for name in "ab"
    ]


def test_averages_never_see_a_pixel_that_is_not_finite(tmp_path: Path) -> None:
    """Norms that are trained have seen it, until the guard restores them."""
    (batch, _) = micro_batches(BatchSplit(IMAGES), broken=(), poisoned=2)
    config = Config(
        model=small_config(enc_layers=1, dec_layers=1, train_backbone_norm=True),
        optim=OptimConfig(ema_decay=0.5, frozen_stages=0),
        run=RunConfig(output_dir=str(tmp_path)),
    )
    model = build_model(config.model, num_classes=CLASSES, frozen_stages=0)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with RunLog(tmp_path) as log:
        trainer = make_trainer(config, model, [batch], BatchSplit(IMAGES), World(), log)
        train_epoch(trainer)
    assert trainer.ema is not None
    for state in (model.state_dict(), trainer.ema.state_dict()["model"]):
        assert all(value.equal(before[key]) for key, value in state.items())
