"""What is said of options that other programs have."""

import importlib

import pytest

from configs.command_line import OptionParser, with_underscores
from configs.options import check_names
from configs.other_names import _ANSWERS, _OURS, unknown_hint
from configs.schema import SECTIONS
from engine.commands import COMMANDS
from util.errors import ConfigError, nearest_hint

# argparse of the official main.py, without what is an option here too
OFFICIAL = [
    "lr_backbone_names", "lr_linear_proj_names", "sgd", "frozen_weights",
    "position_embedding_scale", "masks", "mask_loss_coef", "dice_loss_coef", "dataset_file",
    "coco_panoptic_path", "remove_difficult", "start_epoch", "eval", "cache_mode",
]  # fmt: skip


def known_options(command: str) -> list[str]:
    parser = OptionParser()
    for title, section in importlib.import_module(f"engine.commands.{command}").SECTIONS.items():
        parser.add_section(title, section)
    return parser.flags


@pytest.mark.parametrize("name", [*OFFICIAL, "num_classes", "weights", "imgsz", "no_cuda"])
def test_official_and_common_names_have_an_answer_in_training(name: str) -> None:
    flags = known_options("train")
    assert f"--{name}" not in flags
    hint = unknown_hint(f"--{name}", flags, "nothing")
    assert hint != "nothing"
    assert "Did you mean" not in hint


@pytest.mark.parametrize(
    ("command", "name", "answer"),
    [
        ("train", "dataset_file", "Here it is `data_format`."),
        ("train", "weights", "Here it is `finetune`."),
        ("eval", "weights", "Here it is `checkpoint`."),
        ("predict", "conf-thres", "Here it is `score_threshold`."),
        ("train", "fp16", "Here it is `precision fp16`."),
        ("train", "no-cuda", "Here it is `device cpu`."),
        ("train", "Batch_Size", "Did you mean `batch_size`?"),
        ("train", "optimizer", "The optimiser is AdamW: set `lr`, "),
        ("push", "repo-id", "Here it is `repo`."),
        ("app", "server_port", "Here it is `port`."),
        ("eval", "no_masks", "There are no masks"),
        ("train", "num_querys", "Did you mean '--num_queries'?"),
        ("train", "drop_paths", "Did you mean '--drop_path'?"),
        ("train", "dropblock", "nothing"),  # looks like dropout
    ],
)
def test_the_suggestion_is_an_option_of_the_command(command: str, name: str, answer: str) -> None:
    hint = unknown_hint(f"--{name}", known_options(command), "nothing")
    assert hint.startswith(answer)


def test_every_replacement_is_an_option_of_some_command() -> None:
    flags = {"--config"}.union(*(known_options(command) for command in COMMANDS))
    for name, ours in _OURS.items():
        assert all(f"--{option.partition(' ')[0]}" in flags for option in ours), name
    of_training = {f"--{name}" for name in _ANSWERS} & set(known_options("train"))
    assert not of_training  # another command may have one: it is not asked about it there
    assert not set(_ANSWERS) & set(_OURS)


def test_a_file_gets_the_same_answers() -> None:
    with pytest.raises(
        ConfigError, match=r"unknown option 'data\.dataset_file'\. Here it is `data_"
    ):
        check_names({"dataset_file": "coco"}, SECTIONS["data"], "file: ", "data.")


def test_dashes_within_a_flag_are_underscores_and_values_stay() -> None:
    argv = ["--batch-size=2", "a-b", "--x=a-b", "--no-aux-loss", "-1", "--", "--in-place"]
    assert with_underscores(argv) == [
        "--batch_size=2", "a-b", "--x=a-b", "--no_aux_loss", "-1", "--", "--in-place",
    ]  # fmt: skip


def test_a_long_list_of_words_is_cut() -> None:
    hint = nearest_hint("kettle", [f"model_{i:04}" for i in range(1000)])
    assert len(hint) < 500
    assert hint.endswith(", ... (1000).")
