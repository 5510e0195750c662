"""What is dear to make, once."""

import pytest

from datasets.split import BatchSplit
from engine.run_log import RunLog
from engine.trainer import Trainer
from tests.unit.engine.shared_steps import IMAGES, micro_batches, small_trainer, train_epoch


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    """A trainer after two steps, with a checkpoint in its folder."""
    folder = tmp_path_factory.mktemp("run")
    batches = micro_batches(BatchSplit(IMAGES), broken=(), poisoned=-1)
    with RunLog(folder) as log:
        trainer = small_trainer(folder, log, batches, ema_decay=0.5)
        trainer.identity = {"classes": {"ids": [1], "names": ["a"]}, "config": {"model": {}},
                            "versions": {}}  # fmt: skip
        train_epoch(trainer)
        trainer.save()
    return trainer
