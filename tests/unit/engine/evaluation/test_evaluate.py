"""Outputs that are not finite are errors; several processes stop an evaluation together."""

import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch.multiprocessing.spawn import start_processes

from configs.schema import LossConfig
from engine.evaluation.evaluate import Interrupted, detect, evaluate
from engine.processes import StopSignals
from models.build import build_criterion
from models.postprocess import PostProcess
from tests.unit.engine.evaluation.shared import evaluator_with, make_coco
from tests.unit.models.definitions import random_targets
from tests.unit.models.small import random_images, small_model
from util.batch import Batch, pad_images
from util.distributed import destroy_process_group, init_process_group
from util.errors import UserError
from util.world import World

CPU = torch.device("cpu")


def one_batch() -> Batch:
    """Return one image, number 7, with two boxes."""
    (target,) = random_targets([2], 5)
    target |= {"image_id": torch.tensor(7), "orig_size": torch.tensor([64, 96])}
    return Batch(pad_images(random_images((64, 96))), [target], [])


def test_a_score_that_is_not_finite_is_an_error_of_the_user() -> None:
    model = small_model()
    model.class_embed[0].bias.data[1] = float("nan")  # type: ignore[operator]
    results = detect(model, PostProcess(), [one_batch()], device=CPU, description="")
    with pytest.raises(UserError, match="image 7: the model produced NaN or inf"):
        list(results)


def test_a_loss_that_is_not_finite_is_an_error() -> None:
    model = small_model()
    model.bbox_embed[0].layers[-1].bias.data[0] = float("nan")  # type: ignore[union-attr, index]
    criterion = build_criterion(LossConfig())
    with pytest.raises(FloatingPointError, match="image 7"):
        evaluate(
            model, PostProcess(), [one_batch()], cast(Any, None), device=CPU, criterion=criterion
        )


LIMIT = 60.0  # seconds after which processes count as hanging


def evaluate_in(world: World, batches: Iterator[Batch], stop: StopSignals) -> str:
    """Evaluate on batches of image 7; return how it ended."""
    coco = make_coco({"images": [{"id": 7}], "categories": [{"id": 1}], "annotations": []})
    try:
        result, _ = evaluate(
            small_model(), PostProcess(), batches, evaluator_with(coco), device=CPU, world=world,
            stopping=lambda: bool(stop.number),
        )  # fmt: skip
    except Interrupted:
        return "interrupted"
    return f"{result.num_images} image"


def batches_of(world: World, moment: str) -> Iterator[Batch]:
    """Yield few batches in rank 0 and many in rank 1, of which one gets a signal."""
    end = time.monotonic() + LIMIT
    for number in range(10**6 if world.rank and moment != "never" else 3):
        yield one_batch()
        if number == 2 and moment == f"in rank {world.rank}":
            os.kill(os.getpid(), signal.SIGTERM)
        assert time.monotonic() < end, "continues although the other process was asked to stop"


def be_one_of_two(rank: int, port: int, folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)
    }  # fmt: skip
    world = init_process_group("cpu")
    ends = []
    for moment in ("never", "in rank 0", "in rank 1"):
        with StopSignals() as stop:
            ends.append(evaluate_in(world, batches_of(world, moment), stop))
    (folder / str(rank)).write_text(", ".join(ends))
    destroy_process_group()


@pytest.mark.slow
def test_a_signal_to_one_process_stops_the_evaluation_in_all(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    processes = start_processes(be_one_of_two, (port, tmp_path), nprocs=2, join=False)  # type: ignore[no-untyped-call]
    end = time.monotonic() + 2 * LIMIT
    try:
        while not processes.join(timeout=1):
            assert time.monotonic() < end, "hangs"
    finally:
        for process in processes.processes:
            process.kill()
    for rank in "01":
        assert (tmp_path / rank).read_text() == "1 image, interrupted, interrupted"
