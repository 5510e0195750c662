"""The options of a training run, with their types, defaults, help and ranges."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from configs.options import Checked, Section, option
from configs.tiles import TrainTileOptions
from util.errors import ConfigError

PrecisionName = Literal["fp32", "tf32", "bf16", "fp16"]


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Checked):
    """The network; a checkpoint loads only where these options agree."""

    backbone: str = option(
        "resnet50",
        "resnet18/34/50/101, dat_tiny/small/base, dilateformer_tiny/small/base or timm/NAME",
    )
    dilation: bool = option(
        False, "dilate the last ResNet stage instead of striding it (DC5)", rare=True
    )
    drop_path: float = option(
        0.0,
        "how often a block of a transformer backbone is left out in training, the deepest one",
        low=0,
        high=0.9,
        rare=True,
    )
    dat_grid: Literal["corrected", "published"] = option(
        "corrected",
        "backbone dat_*: where points without offsets are: at cells, or as in its first release",
        rare=True,
    )
    dat_stride: int = option(
        1,
        "backbone dat_*, encoder_attn dat: cells from point to point of DAT's deformable attention",
        low=1,
        most=32,
        rare=True,
    )
    dcn: Literal["none", "v1", "v2"] = option(
        "none", "deformable convolutions in a ResNet; v2: with modulation (docs/architectures.md)"
    )
    dcn_stages: tuple[Literal[3, 4, 5], ...] = option(
        (3, 4, 5),
        "dcn: stages with them, of 3, 4 and 5, whose strides are 8, 16 and 32",
        rare=True,
    )
    train_backbone_norm: bool = option(
        False, "train the backbone's batch norms (to train from scratch)", rare=True
    )
    position_embedding: Literal["sine", "learned"] = option(
        "sine", "positional encoding", rare=True
    )
    num_feature_levels: Literal[1, 3, 4, 5, 6] = option(
        4, "feature levels: 1 is the last stage, 3 the last three; more adds stride-2 levels"
    )
    neck: str = option(
        "none", "what mixes the feature levels before the encoder: none, fpn or hsfpn", rare=True
    )
    input_norm: Literal["group", "none"] = option(
        "group", "norm after the projections of the backbone's maps; DETR has none", rare=True
    )
    neck_width: int | None = option(
        None,
        "neck hsfpn: channels of the levels that the backbone lacks (default: twice those of "
        "its last map)",
        low=8,
        most=65536,
        rare=True,
    )
    encoder: str = option("deformable", "what turns feature levels into memory", rare=True)
    encoder_attn: str = option(
        "deformable",
        "what encoder layers attend with: deformable, dense (DETR), mswin (windows), "
        "msda (dilated), dat (shared points), or several in turn, as in mswin+deformable; or "
        "enhancer: classes have tokens that learn of the image, too (Grounding DINO)",
    )
    decoder_tokens: bool = option(
        False, "encoder_attn enhancer: decoder layers look at class tokens, too", rare=True
    )
    decoder_attn: Literal["deformable", "dense"] = option(
        "deformable",
        "what decoder layers look at the image with; dense: at all of it, from no "
        "place, as in DETR",
    )
    encoder_updates: Literal["full", "lite", "sparse"] = option(
        "full",
        "tokens that an encoder layer changes: all, or lite: those of coarse levels often "
        "and of fine ones rarely, or sparse: those that the decoder is expected to look at",
    )
    rho: float = option(
        0.3,
        "encoder_updates sparse: part of an image's tokens that layers change",
        above=0,
        high=1,
        rare=True,
    )
    lite_levels: int | None = option(
        None,
        "encoder_updates lite: coarsest levels that every layer changes (default: all but "
        "the finest)",
        low=1,
        rare=True,
    )
    lite_expansion: int = option(
        1,
        "encoder_updates lite: number of layers that change all tokens; a divisor of enc_layers",
        low=1,
        rare=True,
    )
    enc_fusion: Literal["none", "dense", "mlp"] = option(
        "none",
        "what decoder and proposals get of the encoder: its last layer's tokens, or those "
        "of all layers together, through one linear layer (dense) or two (mlp)",
    )
    enc_layers: int = option(6, "encoder layers", low=1, most=100)
    dec_layers: int = option(6, "decoder layers", low=1, most=100)
    dim_feedforward: int = option(
        1024, "hidden width of the feed-forward blocks", low=1, most=65536
    )
    hidden_dim: int = option(256, "width of the transformer", low=8, most=8192)
    dropout: float = option(0.1, "dropout in the transformer", low=0, high=1)
    nheads: int = option(8, "attention heads", low=1, most=1024)
    num_queries: int = option(
        300, "object queries: the maximum number of objects found", low=1, most=100000
    )
    enc_n_points: int = option(
        4, "sampling points per head and level in the encoder", low=1, most=64, rare=True
    )
    dec_n_points: int = option(
        4, "sampling points per head and level in the decoder", low=1, most=64, rare=True
    )
    with_box_refine: bool = option(False, "iterative bounding box refinement (Sec. 4.2)")
    two_stage: bool = option(False, "queries from encoder proposals (Sec. 4.2)")
    mixed_query_selection: bool = option(
        False, "two_stage: proposals give queries their positions, their contents are learned"
    )
    look_forward_twice: bool = option(
        False, "with_box_refine: the loss of a layer's boxes teaches the layer before, too"
    )
    query_position: Literal["fixed", "box", "scaled_box"] = option(
        "fixed",
        "what attention adds to queries: the same in every layer, what each layer "
        "computes from its boxes (DINO), or that times what it computes from the queries",
        rare=True,
    )
    decoder_norm: bool = option(
        False, "normalise what the heads of decoder layers read (DINO)", rare=True
    )
    shared_heads: bool = option(
        False, "with_box_refine: the decoder's layers share their heads (DINO)", rare=True
    )
    class_proposals: bool = option(
        False,
        "two_stage: proposals have classes, and only those that are chosen learn (DINO)",
        rare=True,
    )
    position_temperature: float = option(
        10000.0,
        "position_embedding sine: ratio of its longest to its shortest wave",
        above=1,
        most=1_000_000_000,
        rare=True,
    )
    position_offset: float = option(
        -0.5,
        "position_embedding sine: added to the count of cells; -0.5: their centres, 0: their "
        "far edges (DINO)",
        low=-1,
        high=1,
        rare=True,
    )
    refine_eps: float = option(
        1e-5,
        "with_box_refine: distance from 0 and 1 at which a box's numbers are clamped before "
        "they are refined (DINO: 0.001)",
        above=0,
        high=0.1,
        rare=True,
    )
    relation: Literal["none", "previous", "mds"] = option(
        "none",
        "with_box_refine: attention among queries by how the boxes of the layer before lie "
        "to each other; mds: in the last layer alone",
    )
    scores: Literal["sigmoid", "softmax"] = option(
        "sigmoid",
        "what a score is: a question for each class, or a part of 1, which all classes "
        "and no object share (DETR; cls_loss softmax sets it)",
        rare=True,
    )
    aux_loss: bool = option(
        True,
        "losses after every decoder layer",
        off="losses after the last decoder layer only",
        rare=True,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.two_stage and not self.with_box_refine:
            raise ConfigError("two_stage: needs `with_box_refine`, as in the paper. Add it.")
        for name, needed in (
            ("mixed_query_selection", "two_stage"),
            ("look_forward_twice", "with_box_refine"),
            ("shared_heads", "with_box_refine"),
            ("class_proposals", "two_stage"),
        ):
            if getattr(self, name) and not getattr(self, needed):
                raise ConfigError(f"{name}: has no effect without `{needed}`. Add it.")
        if self.query_position != "fixed" and not self.mixed_query_selection:
            raise ConfigError(
                f"query_position {self.query_position}: needs boxes to begin with, and learned "
                "contents: `two_stage` and `mixed_query_selection`. Add them."
            )
        if self.scores == "softmax" and self.two_stage:
            raise ConfigError(
                "cls_loss softmax: cannot score the proposals of `two_stage`, which have a single "
                "class. Remove one of them."
            )
        self._check_encoder()
        self._check_class_tokens()
        self._check_neck()
        self._check_decoder()
        if self.relation != "none" and (not self.with_box_refine or self.dec_layers == 1):
            raise ConfigError(
                "relation: needs the boxes of an earlier layer. Add `with_box_refine`, and at "
                "least 2 `dec_layers`."
            )
        if self.hidden_dim % self.nheads:
            raise ConfigError(
                f"hidden_dim: must be a multiple of `nheads {self.nheads}`, not {self.hidden_dim}."
            )
        if self.hidden_dim % 8:
            raise ConfigError(
                f"hidden_dim: must be a multiple of 8 (group norm and positional encoding), "
                f"not {self.hidden_dim}."
            )
        self._check_backbone()

    @property
    def coarse_levels(self) -> int:
        """Return `lite_levels` or its default."""
        return self.num_feature_levels - 1 if self.lite_levels is None else self.lite_levels

    def _check_class_tokens(self) -> None:
        if self.encoder_attn != "enhancer":
            if self.decoder_tokens:
                raise ConfigError(
                    "decoder_tokens: has no effect without `encoder_attn enhancer`. Add it."
                )
            return
        for name, usual in (("enc_fusion", "none"), ("scores", "sigmoid")):
            if (value := getattr(self, name)) != usual:
                raise ConfigError(
                    f"encoder_attn: cannot be combined with `{name} {value}`. Remove one of them."
                )
        if self.decoder_tokens and self.decoder_attn == "dense":
            raise ConfigError(
                "decoder_attn dense: cannot be combined with `decoder_tokens`. Remove one of them."
            )

    def _check_decoder(self) -> None:
        if self.decoder_attn == "deformable":
            return
        if self.with_box_refine:
            raise ConfigError(
                "decoder_attn dense: queries have no boxes to begin with, so it cannot be combined "
                "with `with_box_refine` and `two_stage`. Remove them."
            )

    def _check_neck(self) -> None:
        if self.neck_width is None:
            return
        if self.neck != "hsfpn":
            raise ConfigError("neck_width: has no effect without `neck hsfpn`. Add it.")
        if self.neck_width % 8:
            raise ConfigError(f"neck_width: must be a multiple of 8, not {self.neck_width}.")

    def _check_backbone(self) -> None:
        if not self.backbone.startswith("dat"):
            without = "has no effect without `backbone dat_tiny` or the like"
            if self.dat_grid != "corrected":
                raise ConfigError(f"dat_grid: {without}. Leave it out.")
            if self.dat_stride != 1 and "dat" not in self.encoder_attn.split("+"):
                raise ConfigError(f"dat_stride: {without}, or `encoder_attn dat`. Leave it out.")
        if self.dcn != "none" and not self.dcn_stages:
            raise ConfigError("dcn_stages: needs at least one stage, as `dcn_stages 3 4 5`.")
        if self.dilation and self.num_feature_levels != 1:
            raise ConfigError("dilation: DC5 is a single-scale model. Add `num_feature_levels 1`.")

    def _check_encoder(self) -> None:
        for name, usual in (("encoder_updates", "full"), ("enc_fusion", "none")):
            if getattr(self, name) != usual and self.encoder != "deformable":
                raise ConfigError(
                    f"{name}: has no effect without `encoder deformable`; here it is "
                    f"`encoder {self.encoder}`. Remove one of them."
                )
        if self.encoder_attn != "deformable":
            for name, usual in (("encoder", "deformable"), ("encoder_updates", "full")):
                if (value := getattr(self, name)) != usual:
                    raise ConfigError(
                        f"encoder_attn: cannot be combined with `{name} {value}`. "
                        "Remove one of them."
                    )
        if self.encoder_updates == "sparse" and self.decoder_attn == "dense":
            raise ConfigError(
                "encoder_updates sparse: learns from the places that the decoder looks at, and "
                "`decoder_attn dense` looks at all of them. Remove one of them."
            )
        if self.encoder_updates != "lite":
            return
        if self.coarse_levels not in range(1, self.num_feature_levels):
            raise ConfigError(
                "encoder_updates lite: needs a coarse level and a fine one: `lite_levels` must be "
                f"less than `num_feature_levels {self.num_feature_levels}`, which must be at "
                "least 2."
            )
        if self.enc_layers % self.lite_expansion:
            raise ConfigError(
                f"lite_expansion: must be a divisor of `enc_layers {self.enc_layers}`, "
                f"not {self.lite_expansion}."
            )


@dataclass(frozen=True, kw_only=True)
class LossConfig(Checked):
    """Matching costs and loss weights."""

    set_cost_class: float = option(2.0, "matching cost: weight of the class", low=0, rare=True)
    set_cost_bbox: float = option(5.0, "matching cost: weight of the box L1", low=0, rare=True)
    set_cost_giou: float = option(2.0, "matching cost: weight of the GIoU", low=0, rare=True)
    cls_loss: Literal[
        "focal", "vfl", "ia_bce", "mal", "position_supervised", "giou_focal", "softmax"
    ] = option(
        "focal",
        "what teaches the scores: of classes alone (focal; softmax: DETR's, one-stage), "
        "or how well the box fits, too",
    )
    eos_coef: float = option(
        0.1, "cls_loss softmax: weight of queries without an object", above=0, high=1, rare=True
    )
    match_cost: Literal["focal", "position_modulated", "high_order", "probability"] = option(
        "focal",
        "matching cost of the class: focal, with the box's GIoU, late in the training "
        "score times IoU**4 as the whole cost, or the score itself (default with cls_loss softmax)",
    )
    high_order_from: float = option(
        0.75, "match_cost high_order: part of the training before it", low=0, high=1, rare=True
    )
    cls_loss_coef: float | None = option(
        None,
        "weight of the class loss (default: 2 for focal and giou_focal, 6 for "
        "position_supervised, else 1)",
        low=0,
        rare=True,
    )
    bbox_loss_coef: float = option(5.0, "weight of the box L1 loss", low=0, rare=True)
    giou_loss_coef: float = option(2.0, "weight of the GIoU loss", low=0, rare=True)
    focal_alpha: float = option(0.25, "alpha of the focal loss and cost", low=0, high=1, rare=True)
    union_set: bool = option(
        False,
        "boxes of all decoder layers learn the pairs of all of them: each query the object "
        "that most layers give it",
    )
    prime_samples: int = option(
        1,
        "cls_loss ia_bce: queries that learn each object in all layers but the last, the worse "
        "ones less (Align-DETR)",
        low=1,
        most=1000,
    )
    prime_tau: float = option(
        1.5, "prime_samples: the one of rank r counts exp(-r / prime_tau)", above=0, rare=True
    )
    extra_losses: tuple[str, ...] = option(
        (), "more losses, by NAME or NAME=COEFFICIENT", rare=True
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prime_samples > 1 and self.cls_loss != "ia_bce":
            raise ConfigError(
                "prime_samples: weighs what `cls_loss ia_bce` teaches, not "
                f"`cls_loss {self.cls_loss}`. Choose that."
            )
        if self.prime_samples > 1 and self.union_set:
            raise ConfigError(
                "prime_samples: lets several queries learn an object, and `union_set` lets one. "
                "Choose one of them."
            )


@dataclass(frozen=True, kw_only=True)
class VocOptions(Checked):
    """How PASCAL VOC files are read and written."""

    voc_corners: Literal["pixels", "edges", "size"] = option(
        "pixels",
        "VOC boxes: 1-based pixel indices, 0-based edges as some tools write them, or "
        "width and height in xmax and ymax",
        rare=True,
    )


@dataclass(frozen=True, kw_only=True)
class AnnotationOptions(VocOptions):
    """How annotations are read."""

    crowd: Literal["keep", "as_objects"] = option(
        "keep",
        "annotations with `iscrowd` 1: groups, as in COCO, or as_objects, as some tools "
        "flag every mask",
        rare=True,
    )
    ignore_key: Literal["crowd", "drop", "keep"] = option(
        "crowd",
        "annotations with `ignore` 1: like a crowd, drop them, or keep them as objects",
        rare=True,
    )


@dataclass(frozen=True, kw_only=True)
class DataSource(AnnotationOptions):
    """Where the data is, or the folder of all its splits."""

    coco_path: str = option("", "folder with train2017/, val2017/ and annotations/")
    data_path: str = option("", "folder of a data set; for YOLO also data.yaml")
    data_format: str = option(
        "auto", "format of --data_path: coco, voc, yolo or labelme; auto: what the folder holds"
    )
    max_pixels: int | None = option(
        None,
        "pixels of the largest image that is read (default: Pillow's 89478485)",
        low=1,
        rare=True,
    )
    index_cache: bool = option(
        True,
        "cache the index of a large COCO-format file, or of a large folder in VOC's or "
        "YOLO's format, in the user's cache folder",
        off="read annotations again, without an index in the user's cache folder",
        rare=True,
    )


@dataclass(frozen=True, kw_only=True)
class TrainDataConfig(DataSource):
    """Where the training data is."""

    train_images: str = option("", "folder of training images (any COCO-format set)")
    train_annotations: str = option("", "COCO-format JSON file of the training set")
    train_split: str = option(
        "train", "training split of --data_path: a VOC list, a key of data.yaml"
    )


@dataclass(frozen=True, kw_only=True)
class EvalDataConfig(DataSource):
    """Where the validation data is, how its images are prepared, and which detections are kept."""

    val_images: str = option("", "folder of validation images (any COCO-format set)")
    val_annotations: str = option("", "COCO-format JSON file of the validation set")
    val_split: str = option(
        "val", "validation split of --data_path: a VOC list, a key of data.yaml"
    )
    eval_scale: int = option(
        800, "short side in evaluation and prediction, pixels", low=16, most=16384
    )
    max_size: int = option(1333, "maximum long side, pixels", low=16, most=65536)
    num_select: int = option(
        100,
        "detections kept per image, all classes together; newer recipes keep 300. COCO's "
        "numbers count the best 100 per image and class, whatever this is",
        low=1,
        most=100000,
    )
    nms_iou: float | None = option(
        None,
        "NMS IoU threshold; none disables NMS, as in the paper (default: none)",
        above=0,
        high=1,
        unset=1.0,
    )
    num_workers: int = option(
        -1, "data-loading workers per process; -1: one per core, at most 8", low=-1, most=1024
    )


@dataclass(frozen=True, kw_only=True)
class DataConfig(EvalDataConfig, TrainDataConfig):
    """Data of training and evaluation, and augmentation."""

    empty_images: float = option(
        1.0,
        "share of the training images without boxes that is trained on, evenly spaced; 0: none",
        low=0,
        high=1,
    )
    train_scales: tuple[int, ...] = option(
        tuple(range(480, 801, 32)),
        "short sides drawn from in training, pixels (with --augment none: --eval_scale)",
        low=16,
        most=16384,
    )
    one_scale_per_batch: bool = option(
        False, "draw one short side per batch, not per image: less padding"
    )
    augment: Literal["none", "official", "strong", "dense", "lsj"] = option(
        "official",
        "preset of augmentation: none, that of the paper, a strong one with mosaic, "
        "dense mosaics and pasted objects (DEIM), or large-scale jitter; "
        "an augmentation's own option overrides it",
    )
    hflip: float = option(0.5, "probability of a horizontal flip", low=0, high=1)
    random_crop: bool = option(
        True,
        "in half of the images, crop a part and resize it",
        off="never crop a part of an image and resize it",
    )
    crop_scales: tuple[int, ...] = option(
        (400, 500, 600), "short sides before the crop, pixels", low=16, most=16384, rare=True
    )
    crop_size: tuple[int, ...] = option(
        (384, 600), "minimum and maximum side of the crop, pixels", low=16, most=16384, rare=True
    )
    scale_jitter: tuple[float, ...] = option(
        (),
        "minimum and maximum factor on the drawn size; what exceeds that size is cropped",
        above=0,
        rare=True,
    )
    fixed_size: int = option(
        0,
        "crop or pad every training image to a square of this side, pixels, instead of "
        "train_scales; 0: do not",
        low=0,
        most=16384,
        rare=True,
    )
    zoom_out: float = option(
        0.0, "probability of shrinking an image on a larger canvas", low=0, high=1, rare=True
    )
    color_jitter: float = option(
        0.0, "probability of changing the colours", low=0, high=1, rare=True
    )
    mosaic: float = option(
        0.0, "probability of combining four images into one", low=0, high=1, rare=True
    )
    mosaic_affine: tuple[float, ...] = option(
        (),
        "combine four whole images, and move them by up to DEGREES SHIFT MIN MAX: a rotation, "
        "a shift in sides, and factors on the scale, as 10 0.1 0.5 1.5; else each image is cut",
        low=0,
        most=180,
        rare=True,
    )
    mixup: float = option(
        0.0,
        "probability of blending two images, where there is no mosaic",
        low=0,
        high=1,
        rare=True,
    )
    copy_blend: float = option(
        0.0,
        "probability of pasting objects of other images, half transparent, where there is no mixup",
        low=0,
        high=1,
        rare=True,
    )
    close_augment_epochs: int = option(
        10, "final epochs without mosaic, mixup and copy_blend", low=0, rare=True
    )
    augment_phases: tuple[float, ...] = option(
        (),
        "three shares of the epochs, as 0.07 0.57 0.93: only flips and scales before the "
        "first, mosaic and mixup until the second, and only flips and scales from the third; "
        "replaces close_augment_epochs",
        low=0,
        high=1,
        rare=True,
    )
    cache_images: float = option(
        0.0,
        "GB of decoded training images to cache in memory per process",
        low=0,
        alias="cache_pictures",
        rare=True,
    )
    aspect_ratio_grouping: bool = option(
        False, "batch portrait and landscape images separately", rare=True
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("train_scales", "crop_scales"):
            if not getattr(self, name):
                raise ConfigError(f"{name}: needs at least one size.")
        if len(self.crop_size) != 2 or self.crop_size[0] > self.crop_size[1]:
            raise ConfigError(
                f"crop_size: must be two sizes, the smaller first, not {self.crop_size}."
            )
        jitter = self.scale_jitter
        if jitter and (len(jitter) != 2 or jitter[0] > jitter[1]):
            raise ConfigError(
                f"scale_jitter: must be two factors, the smaller first, not {jitter}. Try 0.5 1.5."
            )
        if 0 < self.fixed_size < 16:
            raise ConfigError(f"fixed_size: must be 0 or at least 16, not {self.fixed_size}.")
        affine = self.mosaic_affine
        if affine and (len(affine) != 4 or affine[1] > 1 or not 0 < affine[2] <= affine[3] <= 2):
            raise ConfigError(
                "mosaic_affine: must be degrees, a shift of at most 1, and a minimum and maximum "
                f"factor of at most 2, not {affine}. Try 10 0.1 0.5 1.5."
            )
        shares = self.augment_phases
        if shares and (len(shares) != 3 or list(shares) != sorted(shares)):
            raise ConfigError(
                "augment_phases: must be three shares of the epochs, in ascending order, not "
                f"{shares}. Try 0.07 0.57 0.93."
            )


# The options that say where data is: one of them replaces all that a lower layer gives.
LOCATIONS = (
    "coco_path",
    "train_images",
    "train_annotations",
    "val_images",
    "val_annotations",
    "data_path",
)
# What `augment` sets; an option that is given itself overrides it.
AUGMENTATIONS: Mapping[str, Mapping[str, Any]] = {
    "none": {"hflip": 0.0, "random_crop": False},
    "official": {},
    "strong": {
        "random_crop": False,
        "scale_jitter": (0.5, 1.5),
        "zoom_out": 0.15,
        "color_jitter": 0.5,
        "mosaic": 0.25,
        "mixup": 0.1,
    },
    "dense": {
        "zoom_out": 0.5,
        "color_jitter": 0.5,
        "mosaic": 0.5,
        "mosaic_affine": (10.0, 0.1, 0.5, 1.5),
        "mixup": 0.5,
        "copy_blend": 0.5,
        "augment_phases": (0.07, 0.57, 0.93),
    },
    "lsj": {"random_crop": False, "scale_jitter": (0.1, 2.0), "fixed_size": 1024},
}
AUGMENTED = (
    "hflip",
    "random_crop",
    "scale_jitter",
    "fixed_size",
    "zoom_out",
    "color_jitter",
    "mosaic",
    "mosaic_affine",
    "mixup",
    "copy_blend",
    "augment_phases",
)


@dataclass(frozen=True, kw_only=True)
class OptimConfig(Checked):
    """Optimiser and schedule."""

    lr: float = option(2e-4, "learning rate of the transformer, for a batch of 32", above=0)
    lr_backbone: float = option(2e-5, "learning rate of the backbone; 0 freezes it", low=0)
    lr_linear_proj_mult: float = option(
        0.1, "learning-rate factor of reference_points and sampling_offsets", low=0, rare=True
    )
    lr_dcn_mult: float = option(
        0.1, "factor on lr_backbone of what computes the offsets of dcn", low=0, rare=True
    )
    frozen_stages: int = option(
        2,
        "frozen backbone stages: 0 none, 1 stem, 2 stem and first stage",
        low=0,
        high=2,
        rare=True,
    )
    freeze: Literal["none", "backbone", "encoder", "all_but_heads"] = option(
        "none",
        "part that keeps its loaded weights; encoder: all before the decoder; all_but_heads: the "
        "queries of recipes, too",
    )
    batch_size: int = option(
        2, "maximum number of images a process computes at once", low=1, most=65536
    )
    effective_batch_size: int = option(
        0,
        "images per update, over all processes and micro-batches; 0: batch_size per process",
        low=0,
        most=1000000,
    )
    eval_batch_size: int | None = option(
        None,
        "images per evaluation step (default: batch_size)",
        low=1,
        most=65536,
        unset=0,
        rare=True,
    )
    weight_decay: float = option(1e-4, "AdamW weight decay", low=0)
    norm_weight_decay: float | None = option(
        None,
        "weight decay of norms, biases and tables of relative positions (default: weight_decay)",
        low=0,
        rare=True,
    )
    epochs: int = option(50, "epochs to train", low=1, most=1000000)
    max_hours: float = option(
        0.0,
        "train for this many hours instead of `epochs`: the first steps are timed, and the "
        "schedule is laid over as many as fit, evaluations included; 0: train for epochs",
        low=0,
        most=100000,
    )
    lr_scheduler: Literal["step", "cosine", "flat_cosine"] = option(
        "step", "learning-rate schedule"
    )
    lr_drop: int = option(
        40, "schedule step: the rate is divided by ten after every so many epochs", low=1
    )
    lr_drop_epochs: tuple[int, ...] = option(
        (), "schedule step: epochs of such drops, which replace lr_drop", low=1, rare=True
    )
    lr_flat: float = option(
        0.5,
        "schedule flat_cosine: part of all steps before the rate falls",
        low=0,
        high=1,
        rare=True,
    )
    lr_tail: float = option(
        0.05, "schedule flat_cosine: part of all steps at the final rate", low=0, high=1, rare=True
    )
    lr_final: float = option(
        0.5,
        "schedule flat_cosine: final rate, as a factor on the full one",
        low=0,
        high=1,
        rare=True,
    )
    warmup_steps: int = option(0, "steps of warm-up", low=0)
    warmup_shape: Literal["linear", "quadratic"] = option(
        "linear", "how the rate rises in the warm-up", rare=True
    )
    clip_max_norm: float = option(0.1, "maximum gradient norm; 0 disables clipping", low=0)
    precision: Literal[PrecisionName, "auto"] = option(
        "fp32",
        "arithmetic of the model; losses and boxes stay in float32; auto: bf16 where it is "
        "faster, else fp32",
    )
    ema_decay: float = option(0.0, "EMA decay per step; 0 disables EMA", low=0, high=1)
    ema_tau: float = option(
        0.0,
        "steps over which the EMA decay rises from 0, as in 1 - exp(-step / tau); 0: as in "
        "(1 + step) / (10 + step)",
        low=0,
    )
    activation_checkpointing: tuple[Literal["backbone", "encoder", "decoder"], ...] = option(
        (), "parts that recompute their activations in the backward pass, to save memory"
    )
    compile: bool = option(False, "compile the model (torch.compile)")
    pad_multiple: int = option(
        1,
        "pad batches to a multiple of this many pixels: fewer shapes to compile",
        low=1,
        most=4096,
        rare=True,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lr_flat + self.lr_tail > 1:
            raise ConfigError(
                f"lr_flat {self.lr_flat}: and `lr_tail {self.lr_tail}` must add up to at most 1, "
                "as both are parts of one run. Lower one of them."
            )


@dataclass(frozen=True, kw_only=True)
class ProcessOptions(Checked):
    """Where a command computes."""

    device: str = option("auto", "auto, cpu, cuda, cuda:1, mps, ...")
    gpus: int = option(
        1, "processes on this machine, one per GPU (or on the CPU)", low=1, most=1024
    )
    max_restarts: int = option(
        0, "restarts allowed after a failure (with --gpus)", low=0, rare=True
    )


@dataclass(frozen=True, kw_only=True)
class RunConfig(ProcessOptions):
    """The run itself; of these, only seed and device change what a step computes."""

    output_dir: str = option("", "folder for checkpoints, logs and results")
    seed: int = option(42, "seed of weights, data order and augmentation", low=0)
    deterministic: bool = option(False, "bit-reproducible results (slower on GPU)", rare=True)
    resume: str = option(
        "", "checkpoint of an interrupted run to continue; auto: the newest in --output_dir, if any"
    )
    finetune: str = option(
        "", "weights to start from: our file, an official one, a Hugging Face folder, or hf:NAME"
    )
    backbone_weights: str = option(
        "imagenet", "imagenet (downloaded), none, or a file of backbone weights"
    )
    validate: bool = option(
        True,
        "evaluate on validation data",
        off="train without validation data: no AP and no best.pth, the last epoch counts",
    )
    val_share: float = option(
        1.0,
        "share of the validation images that is evaluated in training, evenly spaced; `eval` "
        "takes all",
        above=0,
        high=1,
        rare=True,
    )
    eval_every: int = option(1, "epochs between evaluations", low=1)
    patience: int = option(
        0, "stop when AP has not risen for this many epochs; 0: train to the end", low=0
    )
    save_every: int = option(
        0, "steps between checkpoints, in addition to one per epoch; 0: none", low=0, rare=True
    )
    keep_checkpoints: int = option(
        2, "checkpoints to keep: last.pth and those before it", low=1, rare=True
    )
    max_nonfinite: int = option(
        10,
        "consecutive steps with a non-finite loss or gradient that end the run",
        low=1,
        rare=True,
    )
    probe: bool = option(
        True,
        "try the largest possible step first and report its memory",
        off="do not try the largest possible step first to report its memory",
        rare=True,
    )
    max_steps: int = option(0, "stop after this many steps; 0 runs all epochs", low=0, rare=True)
    log_to: tuple[str, ...] = option(
        ("tensorboard",),
        "where curves go, in addition to the run's own logs: tensorboard, csv, wandb, mlflow",
    )
    tensorboard: bool = option(
        True,
        "write TensorBoard files, if --log_to says so",
        off="write no TensorBoard files",
        rare=True,
    )
    num_images: int = option(
        8,
        "validation images drawn after each evaluation",
        low=0,
        most=10000,
        alias="num_pictures",
        rare=True,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.patience and not self.validate:
            raise ConfigError(
                f"patience {self.patience}: needs the AP of each epoch, which `no_validate` leaves "
                "out. Drop one of them."
            )

    @property
    def trackers(self) -> tuple[str, ...]:
        """Return where curves go."""
        return tuple(name for name in self.log_to if name != "tensorboard" or self.tensorboard)


@dataclass(frozen=True, kw_only=True)
class Config:
    """All options of a training run; those of its recipes by the recipe's name."""

    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    data: DataConfig = field(default_factory=DataConfig)
    tiles: TrainTileOptions = field(default_factory=TrainTileOptions)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)
    recipes: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        softmax = self.loss.cls_loss == "softmax"
        if softmax != (self.model.scores == "softmax"):
            raise ConfigError(
                f"scores {self.model.scores}: is not what `cls_loss {self.loss.cls_loss}` teaches. "
                "Leave `scores` out."
            )
        if softmax and (self.recipes or self.loss.union_set):
            other = next(iter(self.recipes), "union_set")
            raise ConfigError(
                "cls_loss softmax: DETR's loss knows one query for each object in each layer, and "
                f"`{other}` changes that. Remove one of them."
            )

    def check_effects(self) -> None:
        """Refuse options of a new run that would do nothing; older runs may have them.

        Raises:
            ConfigError: with what to add, or to leave out.
        """
        model, loss = self.model, self.loss
        hybrid = self.recipes.get("hybrid")
        if getattr(hybrid, "hybrid_proposals", False) and not model.two_stage:
            raise ConfigError(
                "hybrid_proposals: has no effect without `two_stage`. Add it, or leave "
                "`hybrid_proposals` out."
            )
        single = model.dec_layers == 1 or not model.aux_loss
        by_anchors = not self.recipes.keys().isdisjoint(("ms", "mr"))  # the encoder's matching
        for name, chosen, needs_layers in (
            ("union_set", loss.union_set, True),
            ("prime_samples", loss.prime_samples > 1, not model.two_stage or by_anchors),
        ):
            if chosen and "mds" in self.recipes:
                raise ConfigError(
                    f"{name}: has no effect with `one_to_many mds`, in which one layer alone "
                    "matches one to one. Remove one of them."
                )
            if chosen and single and needs_layers:
                raise ConfigError(
                    f"{name}: has no effect on the last decoder layer alone. Take at least 2 "
                    "`dec_layers` and drop `no_aux_loss`, or remove it."
                )


SECTIONS: Mapping[str, Section] = {
    "data": DataConfig,
    "model": ModelConfig,
    "optim": OptimConfig,
    "loss": LossConfig,
    "tiles": TrainTileOptions,
    "run": RunConfig,
}
