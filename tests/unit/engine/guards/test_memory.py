"""Out of memory: recognised from the real thing, and told with what helps."""

import pytest
import torch

from engine.guards.guard import MemoryGuard, out_of_memory
from engine.probe import random_batch
from util.batch import Batch
from util.errors import UserError


def cpu_failure() -> RuntimeError:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50, dtype=torch.uint8)  # a million GiB
    return caught.value


def test_the_allocators_own_errors_are_recognised() -> None:
    assert out_of_memory(cpu_failure())
    assert out_of_memory(MemoryError())
    assert out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    with pytest.raises(MemoryError) as caught:
        bytearray(2**60)
    assert out_of_memory(caught.value)


def test_other_errors_are_not() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.ones(2) @ torch.ones(3)
    assert not out_of_memory(caught.value)
    assert not out_of_memory(ValueError("out of memory"))
    assert MemoryGuard(1).on_error(caught.value, [random_batch(1, (4, 4), 1)]) is None


def advice(error: RuntimeError | MemoryError, *batches: Batch, accumulation: int = 1) -> str:
    """Return what the guard says, on one line."""
    found = MemoryGuard(accumulation).on_error(error, batches)
    assert isinstance(found, UserError)
    assert "\n" not in str(found)
    return str(found)


def test_out_of_memory_advice_names_shapes_boxes_and_options() -> None:
    batches = random_batch(4, (8, 13), 93), random_batch(3, (80, 133), 0)
    message = advice(cpu_failure(), *batches, accumulation=8)
    for words in (
        "3 x 80 x 133", "93 boxes", "(1048576.0 GiB more", "`batch_size 2` with the same "
        "`effective_batch_size`", "4 x 8", "`activation_checkpointing`", "`precision bf16`",
        "`train_scales`", "`max_size`",
    ):  # fmt: skip
        assert words in message


def test_the_advice_for_one_image_names_no_smaller_batch() -> None:
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a")
    message = advice(error, random_batch(1, (64, 96), 0))
    assert "2.50 GiB more" in message
    assert "batch_size" not in message
    message = advice(MemoryError(), random_batch(1, (64, 96), 0))
    assert "boxes an image. Try `activation_checkpointing" in message
