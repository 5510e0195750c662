"""A run with any recipe that is killed in an epoch and continued ends as the uninterrupted one."""

import sys
from pathlib import Path

import pytest

from tests.integration.runs import Command, assert_same_runs, metrics
from tests.lanes import some

# A new recipe or switch adds a line.
FLAGS: dict[str, str] = {
    "mds": "--one_to_many mds --cls_loss vfl",
    "hybrid": "--one_to_many hybrid --num_queries_one2many 9 --k_one2many 2 --cls_loss ia_bce "
    "--hybrid_proposals",
    "group": "--one_to_many group --group_detr 3 --union_set",
    "ms": "--one_to_many ms --dropout 0.1 --cls_loss giou_focal",
    "mr": "--one_to_many mr --mr_tokens 4",
    "relation": "--relation previous --num_denoising 10",
    "dino": "--mixed_query_selection --look_forward_twice --query_position scaled_box "
    "--decoder_norm --shared_heads --class_proposals --relation mds --num_denoising 10 "
    "--no_dn_contrast",
    "stable": "--cls_loss position_supervised --match_cost position_modulated --enc_fusion dense",
    "dcn": "--backbone resnet18 --backbone_weights none --dcn v2 --train_backbone_norm",
    "softmax": "--cls_loss softmax --no_two_stage",
    "align": "--cls_loss ia_bce --prime_samples 2",
    "dilateformer": "--backbone dilateformer_tiny --backbone_weights none --drop_path 0.2 "
    "--activation_checkpointing backbone",
    "dat": "--backbone dat_tiny --backbone_weights none --drop_path 0.2 "
    "--activation_checkpointing backbone",
    "swin": "--backbone timm/swin_tiny_patch4_window7_224 --backbone_weights none --drop_path 0.2 "
    "--norm_weight_decay 0 --activation_checkpointing backbone",
    "lite": "--encoder_updates lite --enc_fusion mlp",
    "sparse": "--encoder_updates sparse --dropout 0.1",
    "dense encoder": "--encoder_attn dense --dropout 0.1",
    "mswin": "--encoder_attn mswin+deformable --dropout 0.1",
    "msda": "--encoder_attn msda+deformable --hidden_dim 48 --nheads 3",
    "dat encoder": "--encoder_attn dat+deformable --dat_stride 2 --dropout 0.1",
    "enhancer": "--encoder_attn enhancer --decoder_tokens --dropout 0.1",
    "detr": "--num_feature_levels 1 --encoder_attn dense --decoder_attn dense --input_norm none "
    "--decoder_norm --cls_loss softmax --dropout 0.1 --no_two_stage --no_with_box_refine",
    "fpn": "--neck fpn",
    "hsfpn": "--neck hsfpn --neck_width 32 --num_feature_levels 4",
    "++": "--mixed_query_selection --look_forward_twice --cls_loss mal --match_cost high_order "
    "--high_order_from 0.5",
}

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="watches processes in /proc")


@pytest.mark.parametrize("flags", some(FLAGS, "mds"))
def test_killed_and_continued_it_ends_the_same(flags: str, shapes: Path, tmp_path: Path) -> None:
    options: tuple[str | Path, ...] = (
        "--coco_path", shapes, "--no_tensorboard", "--no_probe", "--device", "cpu",
        "--eval_every", "9", "--save_every", "1", *FLAGS[flags].split(),
    )  # fmt: skip
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    Command(whole, options).run()
    command = Command(killed, options)
    running = command.start()
    running.wait_until(lambda: len(metrics(killed)) >= 2)
    running.kill()
    assert len(metrics(killed)) < len(metrics(whole))
    command.run("--resume", "auto")
    assert_same_runs(killed, whole)
