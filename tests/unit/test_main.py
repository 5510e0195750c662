"""The command line itself: what it prints where the terminal lacks letters, and of errors."""

import dataclasses
import errno
import importlib
import io
import os
import subprocess
import sys
import typing
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._dynamo import exc
from torch.utils.data import DataLoader, TensorDataset

from configs.command_line import arguments
from configs.load import Given
from configs.schema import Config
from engine.commands import COMMANDS
from main import main
from util.errors import in_one_line

ROOT = Path(__file__).parents[2]


def test_letters_that_the_terminal_lacks_are_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(written, "cp1252", errors="strict"))
    assert main(["细胞 \udce9"]) == 2
    sys.stderr.flush()
    assert rb"unknown command '\u7ec6\u80de \udce9'" in written.getvalue()


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.ENOSPC, "Free space or choose another `output_dir`."),
        (errno.EACCES, "Change its permissions or choose another `output_dir`."),
        (errno.ENAMETOOLONG, "Shorten the name or choose another `output_dir`."),
        (errno.EMFILE, "Raise the limit of open files (`ulimit -n`) or lower `num_workers`."),
    ],
)
def test_an_error_of_the_disk_says_what_helps(number: int, advice: str) -> None:
    error = OSError(number, os.strerror(number), "runs/mine/last.pth")
    what = f"runs/mine/last.pth: cannot be used: {os.strerror(number)}. "
    assert in_one_line(error) == what + advice
    assert in_one_line(OSError(errno.ECHILD, "of something else")) is None


def test_an_operation_that_cannot_be_deterministic_is_a_mistake_of_the_user() -> None:
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises(RuntimeError) as caught:
            torch.zeros(2).put_(torch.tensor([0]), torch.ones(1))
    finally:
        torch.use_deterministic_algorithms(False)
    assert in_one_line(caught.value) == (
        "deterministic: PyTorch has no deterministic put_ on this device. Leave `deterministic` "
        "out, or the option that needs it."
    )


def test_what_cannot_be_compiled_is_said_in_one_line() -> None:
    def breaks(x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return x + 1

    with pytest.raises(Exception, match="graph") as caught:
        torch.compile(breaks, fullgraph=True, backend="eager")(torch.zeros(1))
    line = in_one_line(caught.value)
    assert line is not None
    assert line.startswith("compile: PyTorch could not compile the model: ")
    assert "\n" not in line
    assert "Leave `compile` out" in line


def test_more_sizes_of_batches_than_are_compiled_is_a_mistake_of_the_user() -> None:
    names = ("FailOnRecompileLimitHit", "RecompileLimitExceeded")  # by version
    limits = tuple(getattr(exc, name) for name in names if hasattr(exc, name))
    compiled = torch.compile(lambda x: x + 1, fullgraph=True, dynamic=False, backend="eager")
    with torch._dynamo.config.patch(cache_size_limit=2):
        for size in (1, 2):
            compiled(torch.zeros(size))
        with pytest.raises(limits) as caught:
            compiled(torch.zeros(3))
    line = in_one_line(caught.value)
    assert line is not None
    assert "`pad_multiple` 128" in line


def test_a_killed_loader_is_reported_whatever_it_interrupts() -> None:
    """PyTorch raises it wherever the main process is, in `torch.save` too, whose end then fails."""
    death = "DataLoader worker (pid 7) is killed by signal: Killed. "
    failure = RuntimeError("unexpected pos 132544 vs 132432")
    assert in_one_line(failure) is None
    failure.__context__ = RuntimeError(death)
    line = in_one_line(failure)
    assert line is not None
    assert line.startswith(f"data loading: {death.strip()} The system")


def test_a_loader_killed_while_sending_a_batch_is_reported() -> None:
    """Its socket is reset then, before its death is noticed."""

    class Dies:
        def __init__(self, *_: object, **__: object) -> None: ...

        def get(self, timeout: float | None = None) -> object:
            raise ConnectionResetError("Connection reset by peer")

    loader = iter(DataLoader(TensorDataset(torch.zeros(2)), num_workers=1))
    loader._data_queue = Dies()  # type: ignore[attr-defined]
    with pytest.raises(ConnectionResetError) as caught:
        next(loader)
    line = in_one_line(caught.value)
    assert line is not None
    assert line.startswith("data loading: Connection reset by peer The system")
    assert in_one_line(ConnectionResetError("of something else")) is None


def test_help_of_the_program_needs_no_pytorch() -> None:
    code = (
        "import sys, main; assert main.main(['--help']) == 0; assert main.main([]) == 2; "
        "loaded = {'torch', 'numpy', 'engine.processes'} & set(sys.modules); "
        "assert not loaded, loaded"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    for name, what in COMMANDS.items():
        assert f"  {name:10}{what}\n" in done.stdout


@pytest.mark.long
def test_every_command_is_in_the_table_and_has_a_module() -> None:
    files = {path.stem for path in (ROOT / "engine" / "commands").glob("*.py")}
    assert set(COMMANDS) <= files
    for name in COMMANDS:
        command = importlib.import_module(f"engine.commands.{name}")
        hints = typing.get_type_hints(command.main)
        assert hints.pop("return") is int
        assert set(hints.values()) <= {Config, Given, *command.SECTIONS.values()}, name
        assert arguments(command, Given()).keys() == hints.keys()


def test_help_of_a_command_is_grouped_and_short(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main(["train", "--help"])
    assert done.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == ["usage: main.py train [options]", "", COMMANDS["train"]]
    groups = [line for line in lines if line.endswith(":") and not line.startswith(" ")]
    assert groups[:5] == ["options:", "data:", "model:", "optim:", "loss:"]
    assert "--help_all lists" in lines[-1]


def help_of(command: str, capsys: pytest.CaptureFixture[str]) -> str:
    """Return what a command's --help prints, in one line."""
    with pytest.raises(SystemExit):
        main([command, "--help"])
    return " ".join(capsys.readouterr().out.split())


def test_help_lists_training_data_before_validation_data(
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = help_of("train", capsys)
    order = ("--coco_path", "--train_images", "--val_images", "--eval_scale", "--backbone", "--lr ")
    assert sorted(order, key=text.index) == list(order)


@pytest.mark.parametrize("command", ["eval", "predict"])
def test_help_says_where_a_checkpoint_sets_the_default(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = help_of(command, capsys)
    for flag in ("--eval_scale", "--max_size", "--nms_iou"):
        described = text[text.index(f"{flag} ") :].partition("(")[2]
        assert described.startswith("default: the checkpoint's)"), flag


@pytest.mark.parametrize("command", ["check", "preview"])
def test_help_leaves_out_what_does_not_matter_to_a_command(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = help_of(command, capsys)
    for flag in ("--train_images", "--num_queries", "--output_dir"):
        assert f"{flag} " in text
    for flag in ("--dec_layers", "--lr", "--finetune", "--k_one2many"):
        assert f"{flag} " not in text


def test_a_default_on_switch_explains_its_negative_form() -> None:
    for name in COMMANDS:
        for section in importlib.import_module(f"engine.commands.{name}").SECTIONS.values():
            for f in dataclasses.fields(section):
                assert f.default is not True or f.metadata["off"], f.name


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["trian"], "command line: unknown command 'trian'. Did you mean 'train'?"),
        (["train", "--num_queries", "0"], "--num_queries: must be at least 1, not 0."),
        (
            ["train", "--two_stage"],
            "--two_stage: needs --with_box_refine, as in the paper.",
        ),
        (
            ["train", "--hidden_dim", "100"],
            "--hidden_dim: must be a multiple of --nheads 8, not 100.",
        ),
        (["predict", "--batch_size", "0"], "--batch_size: must be at least 1, not 0."),
        (
            ["predict", "--track_patience", "2"],
            "--track_patience: says how long --track remembers. Add --track.",
        ),
        (["train", "--num-queries", "0"], "--num_queries: must be at least 1, not 0."),
        (["predict", "--batch-size=0"], "--batch_size: must be at least 1, not 0."),
        (
            ["train", "--num-classes", "3"],
            "command line: unknown option '--num_classes'. The classes and their number come from "
            "the annotations",
        ),
        (
            ["train", "--local-rank=0"],
            "command line: unknown option '--local_rank'. Start the processes with --gpus N, tor",
        ),
        (["eval", "--weights", "x"], "command line: unknown option '--weights'. Here it is --chec"),
        (["train", "--config", "epochs"], "config file epochs: no such file."),
        (
            ["predict", "--input", "epochs", "--output_dir", "out"],
            "--input epochs: no image, folder or pattern leads to a file.",
        ),
        (
            ["check", "--data_path", "epochs", "--data_format", "voc", "--splits", "val"],
            "epochs: not a VOC folder",
        ),
        (
            ["doctor", "--device", "cpu"],
            "command line: unknown option '--device'. It is an option of main.py train.",
        ),
    ],
)
def test_errors_name_options_as_flags(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(argv) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")
