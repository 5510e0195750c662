"""What an unknown option may mean: names of the official code and of other programs."""

from collections.abc import Collection, Mapping

from util.errors import nearest_hint

# Ours for each; the first that the command has is named.
_OURS: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(
        ("data", "data_dir", "data_root", "dataset", "dataset_dir", "dataset_path", "root"),
        ("data_path",),
    ),
    "dataset_file": ("data_format",),
    **dict.fromkeys(("early_stopping", "early_stop", "es_patience"), ("patience",)),
    **dict.fromkeys(("wandb", "use_wandb"), ("log_to wandb",)),
    "mlflow": ("log_to mlflow",),
    **dict.fromkeys(("logger", "report_to"), ("log_to",)),
    "dataset_type": ("data_format",),
    **dict.fromkeys(("images", "image_dir", "img_dir", "train_dir"), ("train_images", "input")),
    **dict.fromkeys(("source", "img", "image", "image_path"), ("input", "val_images")),
    **dict.fromkeys(("annotations", "ann_file", "train_json"), ("train_annotations",)),
    **dict.fromkeys(("val_dir", "test_images"), ("val_images",)),
    **dict.fromkeys(("val_json", "gt", "ground_truth"), ("val_annotations",)),
    **dict.fromkeys(("results", "predictions", "dt", "result_file"), ("detections",)),
    **dict.fromkeys(
        ("weights", "model", "model_path", "pretrained", "pretrained_weights", "pretrain",
         "pretrained_model", "load_from", "init_from", "frozen_weights", "ckpt", "ckpt_path",
         "checkpoint_path", "model_name_or_path"),
        ("checkpoint", "finetune"),
    ),
    "checkpoint": ("finetune",),
    "finetune": ("checkpoint",),
    "pretrained_backbone": ("backbone_weights",),
    **dict.fromkeys(("resume_from", "resume_from_checkpoint", "auto_resume"), ("resume",)),
    "resume": ("checkpoint",),
    **dict.fromkeys(
        ("out", "output", "out_dir", "save_dir", "save_path", "work_dir", "workdir", "log_dir",
         "logdir", "project", "run_dir", "exp_dir"),
        ("output_dir",),
    ),
    **dict.fromkeys(("repo_id", "repo_name", "hub_model_id"), ("repo",)),
    "server_name": ("host",),
    "server_port": ("port",),
    **dict.fromkeys(("cfg", "config_file", "cfg_file"), ("config",)),
    **dict.fromkeys(("bs", "batch", "train_batch_size", "per_device_batch_size"), ("batch_size",)),
    **dict.fromkeys(
        ("accumulate", "accumulation_steps", "gradient_accumulation_steps", "grad_accum_steps",
         "accum_iter", "total_batch_size"),
        ("effective_batch_size",),
    ),
    **dict.fromkeys(("learning_rate", "base_lr", "lr0"), ("lr",)),
    **dict.fromkeys(("backbone_lr", "lr_backbone_mult", "lr_encoder"), ("lr_backbone",)),
    **dict.fromkeys(("wd", "decay"), ("weight_decay",)),
    **dict.fromkeys(("num_epochs", "max_epochs", "n_epochs", "num_train_epochs"), ("epochs",)),
    **dict.fromkeys(("max_iter", "iters", "num_steps"), ("max_steps",)),
    **dict.fromkeys(("scheduler", "lr_schedule", "sched"), ("lr_scheduler",)),
    **dict.fromkeys(("milestones", "lr_steps", "lr_drop_list"), ("lr_drop_epochs",)),
    **dict.fromkeys(("warmup", "warmup_iters", "warmup_epochs"), ("warmup_steps",)),
    **dict.fromkeys(
        ("grad_clip", "clip_grad", "clip_norm", "max_norm", "max_grad_norm", "gradient_clip_val"),
        ("clip_max_norm",),
    ),
    **dict.fromkeys(("amp", "use_amp", "mixed_precision"), ("precision",)),
    **{name: (f"precision {name}",) for name in ("fp16", "bf16", "fp32", "tf32")},
    "half": ("precision fp16",),
    **dict.fromkeys(("use_ema", "model_ema"), ("ema_decay", "ema")),
    "ema": ("ema_decay",),
    **dict.fromkeys(
        ("imgsz", "img_size", "image_size", "input_size", "resolution", "min_size", "size"),
        ("eval_scale",),
    ),
    **dict.fromkeys(("max_image_pixels", "pixel_limit"), ("max_pixels",)),
    **dict.fromkeys(("scales", "multi_scale"), ("train_scales",)),
    **dict.fromkeys(
        ("filter_empty_gt", "filter_empty", "remove_empty", "remove_images_without_annotations"),
        ("empty_images 0",),
    ),
    **dict.fromkeys(("workers", "n_workers", "dataloader_num_workers", "j"), ("num_workers",)),
    **dict.fromkeys(("cache", "cache_mode"), ("cache_images",)),
    **dict.fromkeys(
        ("num_gpus", "ngpus", "n_gpus", "gpu", "nproc_per_node", "num_processes"),
        ("gpus", "device"),
    ),
    **dict.fromkeys(("gpu_id", "gpu_ids", "cuda", "use_cuda"), ("device",)),
    **dict.fromkeys(("cpu", "no_cuda"), ("device cpu",)),
    **dict.fromkeys(
        ("conf", "conf_thres", "conf_threshold", "confidence", "threshold", "score_thr",
         "score_thresh", "box_threshold"),
        ("score_threshold",),
    ),
    **dict.fromkeys(("iou", "iou_thres", "nms", "nms_thresh", "nms_threshold"), ("nms_iou",)),
    "max_det": ("max_dets",),
    **dict.fromkeys(("agnostic", "agnostic_nms", "single_cls"), ("class_agnostic",)),
    **dict.fromkeys(("area_rng", "areas"), ("area_ranges",)),
    **dict.fromkeys(("num_query", "queries", "num_object_queries"), ("num_queries",)),
    **dict.fromkeys(("num_heads", "n_heads", "heads"), ("nheads",)),
    **dict.fromkeys(("d_model", "embed_dim"), ("hidden_dim",)),
    **dict.fromkeys(("ffn_dim", "d_ffn", "feedforward_dim"), ("dim_feedforward",)),
    **dict.fromkeys(("encoder_layers", "num_encoder_layers"), ("enc_layers",)),
    **dict.fromkeys(("decoder_layers", "num_decoder_layers"), ("dec_layers",)),
    **dict.fromkeys(("num_levels", "n_levels"), ("num_feature_levels",)),
    **dict.fromkeys(("box_refine", "iterative_refinement"), ("with_box_refine",)),
    **dict.fromkeys(("gradient_checkpointing", "use_checkpoint"), ("activation_checkpointing",)),
    **dict.fromkeys(("freeze_backbone", "frozen"), ("freeze",)),
    **dict.fromkeys(("random_seed", "manual_seed"), ("seed",)),
    **dict.fromkeys(("eval_interval", "val_interval", "eval_freq"), ("eval_every",)),
    **dict.fromkeys(("save_period", "save_freq", "save_interval"), ("save_every",)),
    **dict.fromkeys(("format", "output_format", "to_format"), ("to", "data_format")),
}  # fmt: skip
_CLASSES = "The classes and their number come from the annotations: leave it out."
_LAUNCHER = "Start the processes with `gpus N`, torchrun or srun: they set it in the environment."
_SEGMENTATION = "There are no masks and no panoptic data here, only boxes: leave it out."
_ADAMW = "The optimiser is AdamW: set `lr`, `weight_decay` and `lr_scheduler`."
_BY_LAYER = "Layers are grouped by what they are: set `lr_backbone` and `lr_linear_proj_mult`."
# A sentence for each that has no counterpart.
_ANSWERS: Mapping[str, str] = {
    **dict.fromkeys(
        ("num_classes", "nc", "n_classes", "classes", "class_names", "names", "nb_classes",
         "num_labels"),
        _CLASSES,
    ),
    **dict.fromkeys(
        ("eval", "eval_only", "evaluate", "test", "test_only", "val"),
        "Evaluation is a command of its own: main.py eval --checkpoint FILE.",
    ),
    **dict.fromkeys(("train", "do_train"), "Training is a command: main.py train."),
    **dict.fromkeys(("predict", "inference", "demo"), "Prediction is a command: main.py predict."),
    **dict.fromkeys(
        ("masks", "mask_loss_coef", "dice_loss_coef", "coco_panoptic_path", "panoptic"),
        _SEGMENTATION,
    ),
    **dict.fromkeys(("sgd", "optimizer", "optim", "opt", "momentum", "betas"), _ADAMW),
    **dict.fromkeys(("lr_backbone_names", "lr_linear_proj_names"), _BY_LAYER),
    "position_embedding_scale": "It is always 2 pi, as in the published models: leave it out.",
    "remove_difficult": "Difficult objects of VOC count as crowds: leave it out.",
    "start_epoch": "A run continues where it was saved: `resume auto`.",
    "pre_norm": "The published model normalises after each block: leave it out.",
    **dict.fromkeys(
        ("local_rank", "rank", "world_size", "dist_url", "dist_backend", "nnodes", "node_rank",
         "master_addr", "master_port", "rdzv_endpoint", "launcher", "distributed"),
        _LAUNCHER,
    ),
    **dict.fromkeys(
        ("name", "exp_name", "run_name"), "A run is named by its folder: `output_dir DIR`."
    ),
    **dict.fromkeys(
        ("y", "yes", "exist_ok", "overwrite", "force"),
        "Runs are never overwritten: choose another `output_dir`, or continue with `resume auto`.",
    ),
    **dict.fromkeys(("verbose", "v", "quiet", "q"), "Nothing sets how much is printed."),
    "version": "`main.py doctor` reports versions.",
}  # fmt: skip


def unknown_hint(
    name: str, known: Collection[str], otherwise: str | None = None, elsewhere: str = ""
) -> str:
    """Return a sentence on an unknown option, which may be one of another program.

    `known` are the options there are, with dashes or without, `elsewhere` what to say where none
    of them is meant by another program's name. The sentence has options in backticks.
    """
    plain, ours = name.lstrip("-").replace("-", "_"), {word.lstrip("-") for word in known}
    spelled = next((word for word in sorted(ours) if word.casefold() == plain.casefold()), None)
    if spelled:
        return f"Did you mean `{spelled}`?"
    plain = plain.casefold()
    positive = plain.removeprefix("no_")
    meant = _OURS.get(plain, _OURS.get(positive, ()))
    replacement = next((option for option in meant if option.partition(" ")[0] in ours), None)
    if replacement:
        return f"Here it is `{replacement}`."
    return _ANSWERS.get(positive) or elsewhere or nearest_hint(name, known, otherwise)
