"""Every option of the program, with its type, default, help and range."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from configs.augmentations import AUGMENTATIONS, AUGMENTED
from configs.options import Values, check_values, file_or_preset, load_file, merge, option
from util.errors import ConfigError


class _Checked:
    """Check declared choices and bounds when an instance is made."""

    def __post_init__(self) -> None:
        check_values(self)


@dataclass(frozen=True, kw_only=True)
class ModelConfig(_Checked):
    """What a checkpoint must agree on to load."""

    backbone: str = option("resnet50", "resnet18/34/50/101 (torchvision) or timm/NAME")
    dilation: bool = option(False, "replace stride by dilation in the last ResNet stage (DC5)")
    train_backbone_norm: bool = option(
        False, "train the backbone's batch norms instead of freezing them (training from scratch)"
    )
    neck: str = option("none", "what mixes the feature levels before the encoder")
    encoder: str = option("deformable", "encoder")
    position_embedding: str = option("sine", "positional encoding", choices=("sine", "learned"))
    num_feature_levels: int = option(
        4, "feature levels; 1 is the last stage alone, 3 the last three, more adds stride-2 levels",
        choices=(1, 3, 4, 5, 6),
    )  # fmt: skip
    enc_layers: int = option(6, "encoder layers", low=1)
    dec_layers: int = option(6, "decoder layers", low=1)
    dim_feedforward: int = option(1024, "hidden width of the feed-forward blocks", low=1)
    hidden_dim: int = option(256, "width of the transformer", low=8)
    dropout: float = option(0.1, "dropout in the transformer", low=0, high=1)
    nheads: int = option(8, "attention heads", low=1)
    num_queries: int = option(300, "object queries: the most objects found in an image", low=1)
    enc_n_points: int = option(4, "sampling points per head and level in the encoder", low=1)
    dec_n_points: int = option(4, "sampling points per head and level in the decoder", low=1)
    with_box_refine: bool = option(False, "iterative bounding box refinement (Sec. 4.2)")
    two_stage: bool = option(False, "queries from encoder proposals (Sec. 4.2)")
    aux_loss: bool = option(True, "losses on every decoder layer")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.two_stage and not self.with_box_refine:
            raise ConfigError(
                "--two_stage: needs --with_box_refine, as in the paper. Add --with_box_refine."
            )
        if self.hidden_dim % self.nheads:
            raise ConfigError(
                f"--hidden_dim: expected a multiple of --nheads {self.nheads}, "
                f"got {self.hidden_dim}."
            )
        if self.hidden_dim % 8:
            raise ConfigError(
                f"--hidden_dim: expected a multiple of 8 (group norm and encoding), "
                f"got {self.hidden_dim}."
            )
        if self.dilation and self.num_feature_levels != 1:
            raise ConfigError(
                "--dilation: DC5 is a single-scale model. Add --num_feature_levels 1."
            )


@dataclass(frozen=True, kw_only=True)
class LossConfig(_Checked):
    """Matching costs and loss weights."""

    set_cost_class: float = option(2.0, "weight of the class in the matching cost", low=0)
    set_cost_bbox: float = option(5.0, "weight of the box L1 distance in the cost", low=0)
    set_cost_giou: float = option(2.0, "weight of the GIoU in the cost", low=0)
    cls_loss_coef: float = option(2.0, "weight of the focal loss", low=0)
    bbox_loss_coef: float = option(5.0, "weight of the box L1 loss", low=0)
    giou_loss_coef: float = option(2.0, "weight of the GIoU loss", low=0)
    focal_alpha: float = option(0.25, "alpha of the focal loss and cost", low=0, high=1)
    extra_losses: tuple[str, ...] = option(
        (), "further registered losses, as NAME or NAME=COEFFICIENT"
    )


@dataclass(frozen=True, kw_only=True)
class EvalDataConfig(_Checked):
    """Where validation data lies, how its images are prepared and detections are chosen."""

    coco_path: str = option("", "folder with train2017/, val2017/ and annotations/")
    val_images: str = option("", "folder of validation images (any COCO-format set)")
    val_annotations: str = option("", "COCO-format JSON of the validation set")
    data_format: str = option(
        "coco", "layout of --data_path: COCO's, PASCAL VOC's or YOLO's",
        choices=("coco", "voc", "yolo"),
    )  # fmt: skip
    data_path: str = option("", "folder of a data set in --data_format; for yolo also data.yaml")
    val_split: str = option(
        "val", "validation split of --data_path: a VOC list, a key of data.yaml"
    )
    voc_corners: str = option(
        "pixels", "VOC boxes: pixels counted from 1, or edges from 0 as some tools write",
        choices=("pixels", "edges"),
    )  # fmt: skip
    index_cache: bool = option(
        True, "keep the index of a large COCO-format file in the user's cache folder"
    )
    eval_scale: int = option(800, "short side in evaluation and prediction, pixels", low=16)
    max_size: int = option(1333, "longest long side, pixels", low=16)
    nms_iou: float = option(
        1.0, "of two boxes of a class that overlap more, keep the better; 1: keep all, as "
        "officially", above=0, high=1,
    )  # fmt: skip
    num_workers: int = option(
        -1, "loader processes; -1: one a core, shared among the run's processes, 8 at most", low=-1
    )


@dataclass(frozen=True, kw_only=True)
class DataConfig(EvalDataConfig):
    """Training data and its augmentation besides."""

    train_images: str = option("", "folder of training images (any COCO-format set)")
    train_annotations: str = option("", "COCO-format JSON of the training set")
    train_split: str = option("train", "training split of --data_path")
    train_scales: tuple[int, ...] = option(
        tuple(range(480, 801, 32)),
        "short sides to draw from in training, pixels (--augment none: eval_scale)", low=16,
    )  # fmt: skip
    one_scale_per_batch: bool = option(
        False, "draw the short side for a batch, not for each image: less padding"
    )
    augment: str = option(
        "official", "recipe of the options from hflip to close_augment_epochs; each may be given "
        "besides. none: images at eval_scale, strong: all but random_crop",
        choices=("none", "official", "strong"),
    )  # fmt: skip
    hflip: float = option(0.5, "probability of a horizontal flip", low=0, high=1)
    random_crop: bool = option(True, "half of the time: resize, crop, resize")
    crop_scales: tuple[int, ...] = option((400, 500, 600), "short sides before the crop", low=16)
    crop_size: tuple[int, ...] = option((384, 600), "least and greatest side of the crop", low=16)
    scale_jitter: tuple[float, ...] = option(
        (), "least and greatest factor on the drawn size; what is more than that is cut", above=0
    )
    zoom_out: float = option(0.0, "probability of an image made small on a canvas", low=0, high=1)
    color_jitter: float = option(0.0, "probability of changed colours", low=0, high=1)
    mosaic: float = option(0.0, "probability of an image made of four", low=0, high=1)
    mixup: float = option(0.0, "probability of two images blended, if no mosaic", low=0, high=1)
    close_augment_epochs: int = option(10, "last epochs, without mosaic and mixup", low=0)
    cache_images: float = option(
        0.0,
        "GB of memory a process may keep decoded training images in",
        low=0,
        alias="--cache_pictures",
    )
    aspect_ratio_grouping: bool = option(False, "batch portrait and landscape images apart")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.train_scales or not self.crop_scales:
            raise ConfigError("--train_scales and --crop_scales: expected at least one size.")
        if len(self.crop_size) != 2 or self.crop_size[0] > self.crop_size[1]:
            raise ConfigError(
                f"--crop_size: expected two sizes, least first, got {self.crop_size}."
            )
        jitter = self.scale_jitter
        if jitter and (len(jitter) != 2 or jitter[0] > jitter[1]):
            raise ConfigError(
                f"--scale_jitter: expected two factors, least first, got {jitter}. Try 0.5 1.5."
            )


@dataclass(frozen=True, kw_only=True)
class OptimConfig(_Checked):
    """Optimiser and schedule."""

    lr: float = option(2e-4, "learning rate of the transformer, for a batch of 32", above=0)
    lr_backbone: float = option(2e-5, "learning rate of the backbone; 0 freezes it", low=0)
    lr_linear_proj_mult: float = option(
        0.1, "factor on lr for reference_points and sampling_offsets", low=0
    )
    frozen_stages: int = option(
        2, "backbone stages kept fixed: 0 none, 1 stem, 2 stem and first stage", low=0, high=2
    )
    freeze: str = option(
        "none", "what keeps the weights that were loaded; encoder: all before the decoder",
        choices=("none", "backbone", "encoder", "all_but_heads"),
    )  # fmt: skip
    batch_size: int = option(2, "images that a process takes at once, at most", low=1)
    effective_batch_size: int = option(
        0, "images of one update, over all processes and micro-batches; 0: batch_size each",
        low=0,
    )  # fmt: skip
    eval_batch_size: int = option(0, "images per evaluation step; 0 means batch_size", low=0)
    weight_decay: float = option(1e-4, "AdamW weight decay", low=0)
    epochs: int = option(50, "epochs to train", low=1)
    lr_scheduler: str = option("step", "learning-rate schedule", choices=("step", "cosine"))
    lr_drop: int = option(40, "step: epoch after which the rate falls to a tenth", low=1)
    lr_drop_epochs: tuple[int, ...] = option(
        (), "step: several such epochs; replaces lr_drop", low=1
    )
    warmup_steps: int = option(0, "steps of linear warm-up", low=0)
    clip_max_norm: float = option(0.1, "largest gradient norm; 0 does not clip", low=0)
    precision: str = option(
        "fp32", "of the model's arithmetic; losses and boxes stay in float32",
        choices=("fp32", "tf32", "bf16", "fp16"),
    )  # fmt: skip
    ema_decay: float = option(
        0.0, "decay a step of averaged weights, which are evaluated too; 0: none", low=0, high=1
    )
    activation_checkpointing: tuple[str, ...] = option(
        (), "parts computed twice to save memory", choices=("backbone", "encoder", "decoder")
    )
    compile: bool = option(False, "compile the model (torch.compile)")
    pad_multiple: int = option(
        1, "pad batches to a multiple of so many pixels: few shapes to compile", low=1
    )


@dataclass(frozen=True, kw_only=True)
class RunConfig(_Checked):
    """The run itself: nothing here changes what a step computes, but for seed and device."""

    output_dir: str = option("", "folder for checkpoints, logs and results")
    device: str = option("auto", "auto, cpu, cuda, cuda:1, mps, ...")
    seed: int = option(42, "seed of weights, order and augmentation", low=0)
    deterministic: bool = option(False, "the same bits on every run, also on a GPU; slower")
    gpus: int = option(1, "processes on this machine, one a GPU (or on the CPU)", low=1)
    max_restarts: int = option(0, "with --gpus: start again so often after a failure", low=0)
    resume: str = option(
        "", "checkpoint of an interrupted run to continue; auto: the newest in --output_dir, if any"
    )
    finetune: str = option("", "weights to start from: our or official file, HF folder, hf:NAME")
    backbone_weights: str = option(
        "imagenet", "imagenet (downloaded), none, or a file of backbone weights"
    )
    eval_every: int = option(1, "epochs between evaluations", low=1)
    save_every: int = option(0, "steps between checkpoints besides each epoch's; 0: none", low=0)
    keep_checkpoints: int = option(2, "checkpoints to keep: last.pth and those before it", low=1)
    max_nonfinite: int = option(
        10, "skipped steps in a row, of loss or gradients not finite, that end the run", low=1
    )
    probe: bool = option(True, "try the largest possible step first and print its memory")
    max_steps: int = option(0, "stop after so many steps; 0 runs all epochs", low=0)
    tensorboard: bool = option(True, "write TensorBoard files")
    num_images: int = option(
        8, "validation images drawn after each evaluation", low=0, alias="--num_pictures"
    )


@dataclass(frozen=True, kw_only=True)
class Config:
    """All sections of a training run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)


@dataclass(frozen=True, kw_only=True)
class EvalConfig(_Checked):
    """What `eval` needs besides the data; everything else is in the checkpoint."""

    checkpoint: str = option("", "our or official file, Hugging Face folder, or hf:NAME")
    output_dir: str = option("", "folder for eval/; default: that of the checkpoint")
    device: str = option("auto", "auto, cpu, cuda, cuda:1, mps, ...")
    batch_size: int = option(0, "images per step; 0 means that of the run, else 1", low=0)
    gpus: int = option(1, "processes on this machine, one a GPU (or on the CPU)", low=1)
    precision: str = option(
        "fp32", "of the model's arithmetic", choices=("fp32", "tf32", "bf16", "fp16")
    )
    ema: bool = option(True, "use a checkpoint's averaged weights, where it has them")
    detections: str = option("", "evaluate this COCO results file in place of a checkpoint")
    evaluator: str = option(
        "fast", "of COCO's numbers; the same to the last digit", choices=("fast", "pycocotools")
    )
    max_dets: int = option(
        0, "detections of an image and class that count besides COCO's 100, from 101 on; 0: as "
        "many as an image has boxes of a class", low=0,
    )  # fmt: skip
    analysis: bool = option(True, "write eval/analysis.json and eval/report.html")

    def __post_init__(self) -> None:
        super().__post_init__()
        if 0 < self.max_dets <= 100:
            raise ConfigError(
                f"--max_dets: expected 0 or more than COCO's 100, which always count, got "
                f"{self.max_dets}. Give more, or leave it out."
            )


@dataclass(frozen=True, kw_only=True)
class PreviewConfig(_Checked):
    """What `preview` shows of a training run; everything else is the run's."""

    count: int = option(16, "images", low=1)
    epoch: int = option(0, "epoch whose images they are, from 0", low=0)


@dataclass(frozen=True, kw_only=True)
class CheckConfig(_Checked):
    """What `check` does besides looking at a training run's data."""

    fix: str = option("", "new .json file: a corrected COCO-format copy; with .changes.json beside")
    splits: tuple[str, ...] = option(
        (), "splits to check; default: those that are given", choices=("train", "val")
    )


@dataclass(frozen=True, kw_only=True)
class PredictConfig(_Checked):
    """What `predict` needs."""

    checkpoint: str = option("", "our or official file, Hugging Face folder, or hf:NAME")
    input: tuple[str, ...] = option((), "images, folders or globs")
    output_dir: str = option("", "folder for images and predictions.json")
    device: str = option("auto", "auto, cpu, cuda, cuda:1, mps, ...")
    batch_size: int = option(1, "images per step", low=1)
    score_threshold: float = option(
        0.3, "least score drawn; not given: each class's best as the checkpoint has it, if it has",
        low=0, high=1,
    )  # fmt: skip
    eval_scale: int = option(0, "short side, pixels; 0 means that of the checkpoint", low=0)
    max_size: int = option(0, "longest long side, pixels; 0 means that of the checkpoint", low=0)
    nms_iou: float = option(
        0, "greatest overlap of boxes of a class; 0 means that of the checkpoint", low=0, high=1
    )
    num_workers: int = option(
        -1, "loader processes; -1: one a core, shared among the run's processes, 8 at most", low=-1
    )


@dataclass(frozen=True, kw_only=True)
class ConvertConfig(_Checked):
    """What `convert` reads and writes."""

    data_format: str = option(
        "coco", "format of --data_path", choices=("coco", "voc", "yolo"), alias="--from"
    )
    to: str = option("coco", "format to write", choices=("coco", "voc", "yolo"))
    data_path: str = option(
        "", "folder of the data set; for yolo also data.yaml, for coco a JSON file with --images"
    )
    images: str = option("", "folder of the images of a COCO-format JSON file")
    splits: tuple[str, ...] = option(("train", "val"), "splits to write")
    voc_corners: str = option(
        "pixels", "VOC boxes: pixels counted from 1, or edges from 0 as some tools write",
        choices=("pixels", "edges"),
    )  # fmt: skip
    output_dir: str = option("", "a new or empty folder")
    copy_images: bool = option(
        False, "copy the images instead of linking to them", alias="--copy_pictures"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.images and len(self.splits) != 1:
            raise ConfigError("--images: expected one split with it, as in --splits train.")


SECTIONS: Mapping[str, type[Any]] = {
    "model": ModelConfig, "loss": LossConfig, "data": DataConfig,
    "optim": OptimConfig, "run": RunConfig,
}  # fmt: skip


def build_config(values: Mapping[str, Mapping[str, Any]]) -> Config:
    """Make the frozen sections from values by section; `augment` gives those it sets.

    Raises:
        ConfigError: a value is out of range, or two options contradict each other.
    """
    data = values.get("data", {})
    recipe = AUGMENTATIONS.get(data.get("augment", "official"), {})
    values = {**values, "data": {**recipe, **data}}
    return Config(**{name: cls(**values.get(name, {})) for name, cls in SECTIONS.items()})


_PRESETS = Path(__file__).parent
_LOCATIONS = ("coco_path", "train_images", "train_annotations", "val_images", "val_annotations",
              "data_path")  # fmt: skip


def merge_options(base: Values, given: Values) -> Values:
    """Put options on top of others.

    A data location replaces every location below it, and a recipe of augmentation its parts.
    """
    above = given.get("data", {})
    replaced = set(_LOCATIONS) if any(name in above for name in _LOCATIONS) else set()
    if "augment" in above:
        replaced.update(AUGMENTED)
    if replaced:
        data = {k: v for k, v in base.get("data", {}).items() if k not in replaced}
        base = {**base, "data": data}
    return merge(base, given)


def load_layers(file: str | None, given: Values) -> Values:
    """Return the options of a preset or file with those of the command line on top.

    Raises:
        ConfigError: see `configs.options.load_file`.
    """
    if not file:
        return given
    values = load_file(file_or_preset(Path(), file, _PRESETS), SECTIONS, _PRESETS)
    return merge_options(values, given)
