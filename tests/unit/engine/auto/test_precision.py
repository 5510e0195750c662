"""The number format of `--precision auto`: what is timed, and what stays as it was."""

from dataclasses import replace

import pytest
import torch

from configs.schema import Config, DataConfig, ModelConfig, OptimConfig
from engine.auto.precision import choose_precision, time_steps, with_precision
from util.device import has_bfloat16
from util.world import World

CPU = torch.device("cpu")
SMALL = Config(
    model=ModelConfig(backbone="timm/test_resnet", hidden_dim=16, nheads=2, enc_layers=1,
                      dec_layers=1, dim_feedforward=16, num_queries=4),
    data=DataConfig(eval_scale=32, max_size=48),
    optim=OptimConfig(precision="auto"),
)  # fmt: skip


def test_steps_in_both_formats_take_time_and_leave_random_numbers_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    assert choose_precision(SMALL, CPU) in ("fp32", "bf16")
    assert torch.rand(4).equal(expected)
    seconds = time_steps(SMALL, CPU, ("bf16", "fp32"))
    assert list(seconds) == ["bf16", "fp32"]
    assert all(0 < s < 60 for s in seconds.values())


def test_a_device_without_bfloat16_computes_in_float32(capsys: pytest.CaptureFixture[str]) -> None:
    device = torch.device("meta")
    assert not has_bfloat16(device)
    assert with_precision(SMALL, device, World()).optim == OptimConfig(precision="fp32")
    assert "precision auto: fp32 (meta has no bfloat16)" in capsys.readouterr().out


@pytest.mark.parametrize(("seconds", "chosen"), [(0.5, "bf16"), (0.95, "fp32"), (1.5, "fp32")])
def test_bfloat16_must_save_a_tenth(
    monkeypatch: pytest.MonkeyPatch, seconds: float, chosen: str
) -> None:
    times = {"fp32": 1.0, "bf16": seconds}
    monkeypatch.setattr("engine.auto.precision.time_steps", lambda *_: times)
    assert choose_precision(SMALL, CPU) == chosen


def test_a_format_that_is_given_stays() -> None:
    given = replace(SMALL, optim=OptimConfig(precision="bf16"))
    assert with_precision(given, torch.device("meta"), World()) is given
