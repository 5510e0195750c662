"""The same two training steps, shared out in several ways: what a process of each does."""

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d
from tqdm import tqdm

from configs.schema import Config, LossConfig, OptimConfig, RunConfig
from datasets.dataset import CocoDetection
from datasets.loader import TrainLoader, with_images
from datasets.split import BatchSplit
from engine.build import assemble_trainer
from engine.checkpoint import CheckpointFolder
from engine.run_log import RunLog
from engine.trainer import Trainer
from models.backbones import BACKBONES, Backbone, BackboneOptions
from models.backbones.dat import DAT
from models.backbones.dat import Size as DATSize
from models.backbones.deformable_conv import Version, make_deformable
from models.backbones.dilateformer import DilateFormer
from models.backbones.dilateformer import Size as DilateFormerSize
from models.backbones.resnet import ResidualBasic
from models.build import build_model
from models.deformable_detr import DeformableDETR
from models.recipes.denoising import Options as DenoisingOptions
from models.recipes.group import Options as GroupOptions
from models.recipes.hybrid import Options
from models.recipes.mds import Options as MDSOptions
from models.recipes.mr import Options as MrOptions
from models.recipes.ms import Options as MSOptions
from tests.unit.models.definitions import random_targets
from tests.unit.models.small import VARIANTS, perturb, small_config
from util.batch import Batch, UnreadableImage, pad_images
from util.distributed import destroy_process_group, init_process_group
from util.world import World

IMAGES, STEPS, CLASSES = 12, 2, 5
BOXES = (0, 9, 2, 0, 1, 0, 0, 5, 3, 0, 0, 4)  # none for the first of three processes
BROKEN = (1, 4, 7, 10)  # all images of the second of three
SMALL_DAT, SMALL_DILATEFORMER = "small/dat", "small/dilateformer"  # backbones, see below
SHARES = {1: (1, 4), 2: (2,), 3: (1, 4)}  # processes: micro-batches of each
CASES: dict[str, dict[str, Any]] = {
    **{variant: {"variant": variant} for variant in VARIANTS},
    "hybrid": {"recipes": {"hybrid": Options(num_queries_one2many=20, k_one2many=3)}},
    "denoising": {"recipes": {"denoising": DenoisingOptions(num_denoising=20)}},
    "denoising, two-stage": {
        "recipes": {"denoising": DenoisingOptions(num_denoising=20)},
        "variant": "two_stage",
    },
    "mds": {"variant": "two_stage", "recipes": {"mds": MDSOptions()}, "loss": {"cls_loss": "vfl"}},
    "group": {
        "variant": "two_stage",
        "recipes": {"group": GroupOptions(group_detr=3)},
        "loss": {"union_set": True},
    },
    "ms": {"variant": "two_stage", "recipes": {"ms": MSOptions()}},
    "mr": {
        "variant": "two_stage",
        "model": {
            "mixed_query_selection": True,
            "query_position": "box",
            "class_proposals": True,
        },
        "recipes": {"mr": MrOptions()},
        "loss": {"cls_loss": "mal"},
    },
    "plus_plus": {
        "variant": "two_stage",
        "model": {"mixed_query_selection": True, "look_forward_twice": True},
        "loss": {"cls_loss": "position_supervised", "match_cost": "position_modulated"},
    },
    "dino": {
        "variant": "two_stage",
        "model": {
            "mixed_query_selection": True,
            "look_forward_twice": True,
            "query_position": "scaled_box",
            "decoder_norm": True,
            "shared_heads": True,
            "class_proposals": True,
        },
    },
    "relation": {
        "variant": "two_stage",
        "model": {"relation": "previous"},
        "loss": {"match_cost": "high_order", "high_order_from": 0.0},
    },
    "relation, denoising": {
        "variant": "two_stage",
        "model": {"relation": "previous"},
        "recipes": {"denoising": DenoisingOptions(num_denoising=20)},
    },
    "softmax": {
        "model": {"scores": "softmax"},
        "loss": {"cls_loss": "softmax", "match_cost": "probability"},
    },
    "relation mds": {
        "variant": "two_stage",
        "model": {"relation": "mds", "enc_fusion": "mlp"},
        "recipes": {
            "denoising": DenoisingOptions(num_denoising=20, dn_contrast=False),
            "hybrid": Options(num_queries_one2many=20, k_one2many=3, hybrid_proposals=True),
        },
        "loss": {"cls_loss": "giou_focal", "match_cost": "high_order", "high_order_from": 0.0},
    },
    "align": {
        "variant": "two_stage",
        "model": {"encoder_updates": "sparse"},
        "loss": {"cls_loss": "ia_bce", "prime_samples": 2},
    },
    "lite": {"model": {"encoder_updates": "lite", "enc_fusion": "dense", "enc_layers": 2}},
    "sparse": {"variant": "two_stage", "model": {"encoder_updates": "sparse", "rho": 0.4}},
    "dense encoder": {"model": {"encoder_attn": "dense"}},
    "mswin": {"model": {"encoder_attn": "mswin+deformable"}},
    "msda": {"model": {"encoder_attn": "msda+deformable", "hidden_dim": 48, "nheads": 3}},
    "dat encoder": {"model": {"encoder_attn": "dat+deformable", "dat_stride": 2}},
    "dcn": {"model": {"backbone": "small/deformable_blocks", "dcn": "v2"}},
    "dat": {"model": {"backbone": SMALL_DAT}},
    "dilateformer": {"model": {"backbone": SMALL_DILATEFORMER}},
    "enhancer": {
        "variant": "two_stage",
        "model": {"encoder_attn": "enhancer", "decoder_tokens": True},
    },
    "detr": {
        "model": {
            "num_feature_levels": 1,
            "encoder_attn": "dense",
            "decoder_attn": "dense",
            "input_norm": "none",
            "decoder_norm": True,
            "scores": "softmax",
        },
        "loss": {"cls_loss": "softmax", "match_cost": "probability"},
    },
    "hsfpn": {"model": {"neck": "hsfpn", "neck_width": 32}},
    "broken": {"broken": BROKEN},
    "poisoned": {"poisoned": 2},
}
# one of each kind, for runs in which every second counts
QUICK = (
    "plain", "two_stage", "hybrid", "denoising, two-stage", "relation, denoising", "softmax",
    "enhancer", "broken", "poisoned",
)  # fmt: skip
Result = dict[str, Any]


class DeformableBlocks(nn.Module):
    """Three stages of one residual block each, as of a ResNet-18 with few channels."""

    channels: tuple[int, ...] = (8, 16, 32)
    strides: tuple[int, ...] = (8, 16, 32)
    mean, std = (0.5, 0.5, 0.5), (0.2, 0.2, 0.2)
    checkpointing = False

    def __init__(self, version: Version) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 4, 4)
        self.stages = nn.ModuleList()
        for inputs, width in ((4, 8), (8, 16), (16, 32)):
            skipped = nn.Sequential(
                nn.Conv2d(inputs, width, 1, 2, bias=False), FrozenBatchNorm2d(width)
            )
            block = ResidualBasic(inputs, width, 2, skipped, norm_layer=FrozenBatchNorm2d)
            self.stages.append(nn.Sequential(block))
            make_deformable(self.stages[-1], version)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Shape: [N,3,H,W] -> maps [N,C,H/stride,W/stride]."""
        maps = [F.relu(self.stem(images))]
        for stage in self.stages:
            maps.append(stage(maps[-1]))
        return maps[1:]


@BACKBONES.register("small")
def create_small(options: BackboneOptions) -> Backbone:
    """Return a backbone of few channels, of the kind that its name says."""
    if options.variant == "dat":
        return DAT(DATSize(8, (2, 2, 2, 2), (2, 2, 4, 4), (2, 2)), options)
    if options.variant == "dilateformer":
        return DilateFormer(DilateFormerSize(12, (1, 2, 2, 1)), options)
    assert options.dcn != "none"
    return DeformableBlocks(options.dcn)


@contextmanager
def in_float64() -> Iterator[None]:
    """Build and compute in float64 for a while, where rounding hides nothing."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def effective_batch() -> list[tuple[Tensor, dict[str, Tensor]]]:
    """Return the effective batch: images of one size, with very uneven numbers of boxes."""
    torch.manual_seed(1)
    targets = random_targets(BOXES, CLASSES)
    return [
        (torch.randn(3, 32, 32), {**target, "image_id": torch.tensor(i)})
        for i, target in enumerate(targets)
    ]


def micro_batches(share: BatchSplit, *, broken: tuple[int, ...], poisoned: int) -> list[Batch]:
    """Return what the loader of one process gives: an epoch of equal steps."""
    all_images = effective_batch()
    if poisoned >= 0:
        all_images[poisoned][0][0, 5, 5] = math.nan
    own = list(range(IMAGES))[share.rank :: share.world_size]
    batches = []
    for start in range(0, len(own), share.batch_size):
        chosen = own[start : start + share.batch_size]
        good = [all_images[i] for i in chosen if i not in broken]
        bad = [UnreadableImage(i, f"{i}.png", "broken") for i in chosen if i in broken]
        images = pad_images([image for image, _ in good]) if good else None
        batches.append(Batch(images, [target for _, target in good], bad))
    return batches * STEPS


class Steps(TrainLoader):
    """An epoch of batches that are given."""

    def __init__(self, micro_batches: list[Batch], share: BatchSplit) -> None:
        self.accumulation, self._alone = share.accumulation, share.world_size == 1
        self._groups = list(zip(*[iter(micro_batches)] * share.accumulation, strict=True))
        self.steps, self._first = len(self._groups), 0

    def set_epoch(self, epoch: int, first_step: int = 0) -> None:
        """Choose where to begin."""
        self._first = first_step

    def effective_batches(self) -> Iterator[list[Batch]]:
        """Yield the batches of each step as the real loader does."""
        for group in self._groups[self._first :]:
            yield with_images(group, alone=self._alone)


def make_trainer(
    config: Config,
    model: DeformableDETR,
    batches: list[Batch],
    share: BatchSplit,
    world: World,
    log: RunLog,
) -> Trainer:
    """Return what trains on these batches, without data to evaluate on."""
    return assemble_trainer(
        config,
        model,
        Steps(batches, share),
        cast(CocoDetection, None),
        [],
        world=world,
        device=torch.device("cpu"),
        run_log=log,
        folder=CheckpointFolder(Path(config.run.output_dir), keep=1),
        identity={},
    )


def small_trainer(folder: Path, log: RunLog, batches: list[Batch], **options: Any) -> Trainer:
    """Return what trains a small detector in this process, one micro-batch a step."""
    config = Config(
        model=small_config(enc_layers=1, dec_layers=1),
        optim=OptimConfig(**options),
        run=RunConfig(output_dir=str(folder), max_nonfinite=2),
    )
    model = build_model(config.model, num_classes=CLASSES)
    return make_trainer(config, model, batches, BatchSplit(IMAGES), World(), log)


def train_epoch(trainer: Trainer) -> None:
    """Train an epoch without showing a bar."""
    with tqdm(disable=True) as bar:
        trainer.train_epoch(bar)


def run_steps(
    folder: Path,
    world: World,
    accumulation: int,
    *,
    variant: str = "plain",
    model: Mapping[str, Any] = MappingProxyType({}),
    loss: Mapping[str, Any] = MappingProxyType({}),
    recipes: Mapping[str, Any] = MappingProxyType({}),
    broken: tuple[int, ...] = (),
    poisoned: int = -1,
) -> Result:
    """Train two steps; return the gradients of each before the update, and what was logged."""
    small = {"dropout": 0.0, "num_queries": 10, "enc_layers": 1, "dec_layers": 2}
    share = BatchSplit(IMAGES // accumulation // world.size, accumulation, world.rank, world.size)
    config = Config(
        model=small_config(**VARIANTS[variant], **(small | dict(model))),
        loss=LossConfig(**loss),
        optim=OptimConfig(clip_max_norm=0, lr=1e-3, lr_backbone=1e-3, frozen_stages=0),
        run=RunConfig(output_dir=str(folder)),
    )
    torch.manual_seed(0)
    detector = build_model(config.model, num_classes=CLASSES, frozen_stages=0, recipes=recipes)
    perturb(detector)
    before = [p.detach().clone() for p in detector.parameters()]
    gradients: list[dict[str, Tensor]] = []
    batches = micro_batches(share, broken=broken, poisoned=poisoned)
    with RunLog(folder, enabled=world.main) as log:
        trainer = make_trainer(config, detector, batches, share, world, log)
        trainer.optimizer.register_step_pre_hook(
            lambda *_: gradients.append(
                {n: p.grad.clone() for n, p in detector.named_parameters() if p.grad is not None}
            )
        )
        train_epoch(trainer)
    return {
        "gradients": gradients,
        "averages": trainer.steps.averages.means(),
        "changed": any(
            not torch.equal(a, b) for a, b in zip(before, detector.parameters(), strict=True)
        ),
        "skipped": trainer.guards.nonfinite.total,
        "steps": trainer.step,
    }


def run_cases(names: Sequence[str], folder: Path, world: World) -> dict[str, Result]:
    """Run cases in every way that so many processes can share them out."""
    results = {}
    with in_float64():
        for accumulation in SHARES[world.size]:
            for name in names:
                key = f"{name} {accumulation}"
                results[key] = run_steps(folder / key, world, accumulation, **CASES[name])
    return results


def work(rank: int, names: Sequence[str], ports: Mapping[int, int], folder: Path) -> None:
    """Be one of three processes, and then one of two or alone; leave the results in the folder."""
    torch.set_num_threads(1)
    for size, own_rank in ((3, rank), (2, rank) if rank < 2 else (1, 0)):
        os.environ |= {
            "RANK": str(own_rank), "WORLD_SIZE": str(size),
            "MASTER_ADDR": "localhost", "MASTER_PORT": str(ports[size]),
        }  # fmt: skip
        world = init_process_group("cpu")
        try:
            results = run_cases(names, folder / str(size), world)
            torch.save(results, folder / f"{size}_{own_rank}.pth")
        finally:
            destroy_process_group()


def logged(folder: Path) -> list[dict[str, float]]:
    """Return the lines of metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
