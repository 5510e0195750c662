"""Steps: the same gradients in any number of processes and micro-batches, and what is skipped."""

import socket
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from engine.train import StepRunner, UnreadableImages, grouped, inputs_of
from torch import nn
from torch.multiprocessing.spawn import start_processes

from configs.schema import Config, OptimConfig, RunConfig
from datasets.loader import BatchSplit
from engine.commands.train import Place, build_runner
from engine.run_log import RunLog
from models.build import build_model
from tests.unit.engine.shared_steps import (
    BROKEN,
    CASES,
    CLASSES,
    IMAGES,
    SHARES,
    STEPS,
    Result,
    logged,
    micro_batches,
    work,
)
from tests.unit.models.small import small_config
from util.batch import Batch, UnreadableImage
from util.distributed import World
from util.errors import UserError

WAYS = [(size, micro) for size, micros in SHARES.items() for micro in micros]
FINITE = [name for name in CASES if name != "poisoned"]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, list[Result]]]:
    """Return a folder of logs, and by number of processes what each of them found."""
    folder = tmp_path_factory.mktemp("steps")
    with socket.socket() as one, socket.socket() as other:
        for free in (one, other):
            free.bind(("localhost", 0))
        ports = {1: 0, 2: one.getsockname()[1], 3: other.getsockname()[1]}
    processes = start_processes(work, (ports, folder), nprocs=3, join=False)  # type: ignore[no-untyped-call]
    while not processes.join(timeout=120):
        pass
    return folder, {
        size: [torch.load(folder / f"{size}_{rank}.pth") for rank in range(size)] for size in SHARES
    }


Results = tuple[Path, dict[int, list[Result]]]


@pytest.mark.parametrize(("size", "micro"), WAYS)
@pytest.mark.parametrize("case", FINITE)
def test_gradients_are_those_of_one_big_batch(
    results: Results, case: str, size: int, micro: int
) -> None:
    expected = results[1][1][0][f"{case} 1"]["gradients"]
    assert len(expected) == STEPS
    for process in results[1][size]:
        actual = process[f"{case} {micro}"]["gradients"]
        assert len(actual) == STEPS
        for now, wanted in zip(actual, expected, strict=True):
            assert now.keys() == wanted.keys()
            for name, gradient in wanted.items():
                error = (now[name] - gradient).norm() / (gradient.norm() + 1e-8)
                assert error < 1e-8, name


@pytest.mark.parametrize(("size", "micro"), WAYS)
@pytest.mark.parametrize("case", FINITE)
def test_logged_losses_are_those_of_one_big_batch(
    results: Results, case: str, size: int, micro: int
) -> None:
    folder, found = results
    expected = logged(folder / "1" / f"{case} 1")
    actual = logged(folder / str(size) / f"{case} {micro}")
    assert [line["step"] for line in actual] == list(range(STEPS))
    for now, wanted in zip(actual, expected, strict=True):
        values = {k: v for k, v in wanted.items() if "time" not in k}
        assert {k: v for k, v in now.items() if "time" not in k} == pytest.approx(values, rel=1e-5)
    for process in found[size]:
        means = found[1][0][f"{case} 1"]["averages"]
        assert process[f"{case} {micro}"]["averages"] == pytest.approx(means, rel=1e-5)


@pytest.mark.parametrize(("size", "micro"), WAYS)
def test_one_image_that_is_not_finite_skips_the_step_of_all_processes(
    results: Results, size: int, micro: int
) -> None:
    folder, found = results
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


def small_runner(folder: Path, log: RunLog, **options: float) -> StepRunner:
    """Return what trains a small detector in this process, one micro-batch a step."""
    config = Config(
        model=small_config(enc_layers=1, dec_layers=1),
        optim=OptimConfig(**options),  # type: ignore[arg-type]
        run=RunConfig(output_dir=str(folder), max_nonfinite=2),
    )
    model = build_model(config.model, num_classes=CLASSES)
    place = Place(World(), torch.device("cpu"), BatchSplit(IMAGES))
    return build_runner(model, config, place, log, steps_per_epoch=4)


def weights(model: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def same(before: list[torch.Tensor], model: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_a_step_without_a_readable_image_counts_and_changes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = Batch(None, [], [UnreadableImage(7, "seven.png", "gone")])
    steps = []
    with RunLog(tmp_path, tensorboard=False) as log:
        runner = small_runner(tmp_path, log)
        before = weights(runner.model)
        runner.run(
            [bad, bad],
            epoch=0,
            stopping=lambda: False,
            on_step=lambda latest: steps.append(runner.step) or False,  # type: ignore[func-returns-value]
        )
        assert same(before, runner.model)
    assert steps == [1, 2]
    assert set(runner.unreadable.images) == {"seven.png"}
    assert capsys.readouterr().out.count("'seven.png' cannot be read (gone)") == 1


def test_training_ends_before_a_step_or_after_it(tmp_path: Path) -> None:
    (batch, _) = micro_batches(BatchSplit(IMAGES), broken=BROKEN, poisoned=-1)
    latest: list[Mapping[str, float] | None] = []
    with RunLog(tmp_path, tensorboard=False) as log:
        runner = small_runner(tmp_path, log)

        def on_step(values: Mapping[str, float] | None) -> bool:
            latest.append(values)
            return runner.step == 3

        before = weights(runner.model)
        runner.run([batch] * 9, epoch=0, stopping=lambda: True, on_step=on_step)
        assert same(before, runner.model)
        assert runner.step == 0
        runner.flush_every = 2
        runner.run([batch] * 9, epoch=0, stopping=lambda: False, on_step=on_step)
        assert runner.step == 3
        assert not same(before, runner.model)
    assert [values is None for values in latest] == [True, False, True]
    assert [line["step"] for line in logged(tmp_path)] == [0, 1, 2]


def test_too_many_skipped_steps_end_the_run_and_leave_the_weights(tmp_path: Path) -> None:
    (batch, _) = micro_batches(BatchSplit(IMAGES), broken=(), poisoned=2)
    with RunLog(tmp_path, tensorboard=False) as log:
        runner = small_runner(tmp_path, log, ema_decay=0.5)
        before = weights(runner.model)
        with pytest.raises(UserError, match=r"got none in 2 steps in a row \(image 3 of 12"):
            runner.run([batch] * 5, epoch=0, stopping=lambda: False, on_step=lambda latest: False)
        assert same(before, runner.model)
        assert runner.ema is not None
        averages = runner.ema.state_dict()["model"]
        assert all(torch.isfinite(v).all() for v in averages.values())


def test_a_probe_leaves_nothing_behind(tmp_path: Path) -> None:
    (batch, _) = micro_batches(BatchSplit(IMAGES), broken=(), poisoned=-1)
    assert batch.images is not None
    with RunLog(tmp_path, tensorboard=False) as log:
        runner = small_runner(tmp_path, log)
        before = weights(runner.model)
        runner.probe(batch.images, batch.targets)
        assert same(before, runner.model)
    assert all(p.grad is None for p in runner.model.parameters())
    assert not (tmp_path / "metrics.jsonl").exists()


def test_groups_are_whole_but_for_the_last() -> None:
    batches = [Batch(None, [], []) for _ in range(5)]
    assert [len(group) for group in grouped(batches, 2)] == [2, 2, 1]
    assert list(grouped([], 3)) == []


def test_a_blank_image_stands_in_where_none_could_be_read() -> None:
    images, targets = inputs_of(Batch(None, [], []))
    assert images.images.shape[:2] == (1, 3)
    assert not images.images.any()
    assert not images.mask.any()
    assert [len(t["labels"]) for t in targets] == [0]


def test_each_unreadable_image_is_named_once(capsys: pytest.CaptureFixture[str]) -> None:
    unreadable = UnreadableImages()
    for name in ("a", "b", "a"):
        unreadable.report(Batch(None, [], [UnreadableImage(1, name, "torn")]))
    assert capsys.readouterr().out.splitlines() == [
        f"warning: image 1 '{name}' cannot be read (torn); going on without it." for name in "ab"
    ]
