"""`main.py push`: a folder with a model and its card, and its way to the Hugging Face hub."""

import json
import re
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from configs.detection import WEIGHTS
from configs.options import Checked, option
from configs.schema import LOCATIONS
from datasets.images import read_rgb
from engine.data_report import split_counts
from engine.detector import Detector
from engine.evaluation.evaluator import STAT_NAMES
from engine.model_card import Card, Measured
from engine.predictions import with_boxes
from models.weights.folder import DESCRIPTION, read_json, write_folder
from models.weights.hugging_face import save_hugging_face
from models.weights.load import Pretrained, load_pretrained
from models.weights.official import lacking_elsewhere
from util.console import console
from util.errors import ConfigError, UserError
from util.files import make_output_dir, write_atomic
from util.tensor_files import load_safely
from util.version import __version__

_REPO = r"\w[\w.-]*/\w[\w.-]*"
_OPTIONS, _EXAMPLE = "training.yaml", "example.jpg"
# What a push may write, and the next one of another model not; a file that stays would mislead.
_NOT_ALWAYS = ("config.json", "preprocessor_config.json", DESCRIPTION, _OPTIONS, _EXAMPLE)
_LONGEST_SIDE = 1280  # pixels of the example
_OF_DETECTION = ("eval_scale", "max_size", "num_select", "nms_iou", "max_pixels")
# Options of a run that say where things are: paths are nobody's business.
_OF_PLACE = (*LOCATIONS, "output_dir", "resume", "finetune", "device", "gpus")
_SAME = 1e-6  # numbers of one evaluation, as two files have them


@dataclass(frozen=True, kw_only=True)
class PushOptions(Checked):
    """What is pushed, and where to."""

    checkpoint: str = option("", WEIGHTS)
    repo: str = option("", "USER/NAME of the repository on the Hugging Face hub")
    dry_run: bool = option(False, "write the folder, and push nothing")
    output_dir: str = option("", "a new or empty folder for what is pushed (default: a temporary)")
    private: bool = option(
        False, "make a new repository private; into a public one, nothing is pushed"
    )
    input: str = option("", "image that the card shows with boxes, for all to see (default: none)")
    results: str = option(
        "",
        "results.json that eval wrote of these weights, for the card (default: what the "
        "checkpoint knows)",
    )
    license: str = option("", "licence of the weights as the hub names it, as apache-2.0")


SECTIONS = {"push": PushOptions}


def main(options: PushOptions) -> int:
    """Write a folder with a model and its card, and push it to the hub."""
    if not re.fullmatch(_REPO, options.repo):
        raise ConfigError(
            f"repo: must be USER/NAME on the hub, not '{options.repo[:60]}'. Write, for instance, "
            "jane/chess-pieces."
        )
    if options.dry_run and not options.output_dir:
        raise ConfigError("output_dir: is missing. Say where `dry_run` writes the folder.")
    with ExitStack() as stack:
        folder = Path(options.output_dir or stack.enter_context(TemporaryDirectory()))
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ConfigError(f"output_dir {folder}: is not a new or empty folder. Choose another.")
        write(options, folder)
        if options.dry_run:
            console(f"nothing was pushed. Without --dry_run, it goes to {options.repo}.")
        else:
            console(f"pushed: {upload(folder, options.repo, private=options.private)}")
    return 0


def write(options: PushOptions, folder: Path) -> None:
    """Write the weights as transformers loads them, or in our own format, and the card.

    Raises:
        ConfigError: the source is an exported file, or the folder cannot be used.
        UserError: a source, the image or the results cannot be read.
    """
    detector = Detector.load(options.checkpoint, device="cpu")
    network = detector.model  # an exported file has none
    pretrained = load_pretrained(options.checkpoint)
    source = Path(options.checkpoint)
    content = load_safely(source) if pretrained.kind == "ours" and source.is_file() else {}
    measured = measured_of(options, content)
    make_output_dir(folder)
    lacking = lacking_elsewhere(network.state_dict(), pretrained.model_options)
    write_weights(folder, detector, pretrained, as_transformers=not lacking)
    if content:
        write_atomic(folder / _OPTIONS, training_options(content["config"]))
    if options.input:
        write_example(folder / _EXAMPLE, detector, Path(options.input))
    card = Card(
        repo=options.repo,
        classes=detector.classes,
        thresholds=detector.thresholds,
        backbone=str(pretrained.model_options["backbone"]),
        weights=sum(p.numel() for p in network.parameters()),
        image_size=(detector.data.eval_scale, detector.data.max_size),
        lacking=lacking,
        counts=split_counts(source.parent) if content else {},
        measured=measured,
        options=_OPTIONS if content else "",
        image=_EXAMPLE if options.input else "",
        license=options.license,
    )
    write_atomic(folder / "README.md", card.text(), errors="backslashreplace")
    files = ", ".join(sorted(path.name for path in folder.iterdir()))
    console(
        f"written to {folder}: {files}\n"
        + (
            f"in our own format: transformers has no {lacking}"
            if lacking
            else "as DeformableDetrForObjectDetection.from_pretrained of transformers loads it"
        )
    )


def write_weights(
    folder: Path, detector: Detector, pretrained: Pretrained, *, as_transformers: bool
) -> None:
    """Write weights and the files that describe them; both formats have what only we know."""
    data = asdict(detector.data)
    detection = {name: data[name] for name in _OF_DETECTION}
    described: dict[str, Any] = {
        "version": __version__,
        "config": {"data": detection, "tiles": asdict(detector.tiles)},
        "classes": detector.classes.to_json(),
        "thresholds": detector.thresholds,
    }
    if as_transformers:
        save_hugging_face(
            folder,
            detector.model.state_dict(),
            options=pretrained.model_options,
            classes=detector.classes,
            image_mean=detector.mean,
            image_std=detector.std,
            image_size=(detector.data.eval_scale, detector.data.max_size),
        )
        write_atomic(folder / DESCRIPTION, json.dumps(described, indent=2) + "\n")
        return
    described["config"]["model"] = pretrained.model_options
    described["config"]["recipes"] = (pretrained.config or {}).get("recipes", {})
    described["preprocessing"] = {"mean": list(detector.mean), "std": list(detector.std)}
    write_folder(folder, detector.model.state_dict(), {DESCRIPTION: described})


def training_options(config: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the options of a run as YAML for `--config`, but for those that name places."""
    kept = {
        title: {
            name: value
            for name, value in section.items()
            if name not in _OF_PLACE
            and (name != "backbone_weights" or value in ("imagenet", "none"))  # else a file
        }
        for title, section in config.items()
    }
    plain = json.loads(json.dumps(kept))  # lists in place of tuples
    return str(yaml.safe_dump(plain, sort_keys=False, allow_unicode=True))


def write_example(path: Path, detector: Detector, source: Path) -> None:
    """Draw what is found in an image, in a size for a page and without the file's own metadata."""
    boxes = detector.predict(source)
    image = read_rgb(source, None)
    image.info.clear()  # a comment, for instance, would be saved again
    scale = min(1.0, _LONGEST_SIDE / max(image.size))
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    smaller = [replace(box, xyxy=_scaled(box.xyxy, scale)) for box in boxes]
    with_boxes(image.resize(size), smaller, detector.classes).save(path, quality=90)


def _scaled(
    corners: tuple[float, float, float, float], scale: float
) -> tuple[float, float, float, float]:
    x0, y0, x1, y1 = (side * scale for side in corners)
    return x0, y0, x1, y1


def measured_of(options: PushOptions, content: Mapping[str, Any]) -> Measured:
    """Return results of these very weights, as far as some are known.

    A checkpoint has the numbers of its run's best evaluation, which may be of other weights. What
    is in `eval/` beside it is taken where its numbers are these.

    Raises:
        CheckpointError: `results` cannot be read.
    """
    if options.results:
        path = Path(options.results)
        return replace(_measured(read_json(path)), on="the data that it was evaluated on")
    best, epoch = content.get("best") or {}, content.get("epoch")
    if type(epoch) is not int or best.get("epoch") != epoch:
        return Measured()
    found = Measured(f"the validation data of its run, after epoch {epoch + 1}", _known(best))
    path = Path(options.checkpoint).parent / "eval" / "results.json"
    if path.is_file():
        beside = _measured(read_json(path))
        same = found.stats.keys() == beside.stats.keys() and all(
            abs(found.stats[name] - beside.stats[name]) < _SAME for name in found.stats
        )
        found = replace(found, per_class=beside.per_class) if same else found
    return found


def _measured(results: Mapping[str, Any]) -> Measured:
    stats, rows = results.get("stats"), results.get("per_class")
    return Measured(
        stats=_known(stats if isinstance(stats, dict) else {}),
        per_class=[row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else [],
    )


def _known(stats: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of COCO that could be measured."""
    return {
        name: float(stats[name])
        for name in STAT_NAMES
        if isinstance(stats.get(name), (int, float)) and 0 <= stats[name] <= 1
    }


def upload(folder: Path, repo: str, *, private: bool) -> str:
    """Push a folder to the hub, as the user that huggingface_hub knows; return its address.

    What an earlier push wrote and this one does not is deleted there; other files stay.

    Raises:
        ConfigError: it is to be private, and the repository is public.
        UserError: it cannot be reached, or does not take it.
    """
    from huggingface_hub import HfApi  # slow to import

    hub = HfApi()
    try:
        address = hub.create_repo(repo, private=private, exist_ok=True)
        public = private and not hub.model_info(repo).private  # it may have been there before
        if not public:
            hub.upload_folder(
                repo_id=repo,
                folder_path=folder,
                commit_message=f"Push by deformable-detr {__version__}",
                delete_patterns=[name for name in _NOT_ALWAYS if not (folder / name).exists()],
            )
    except Exception as error:  # the client and its transports share no base class
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{repo}: cannot be pushed to the Hugging Face hub ({type(error).__name__}: {reason}). "
            "Log in by `hf auth login` and check the name and the network, or write the folder by "
            "`dry_run` and upload it elsewhere."
        ) from error
    if public:
        raise ConfigError(
            f"private: {repo} is there already and public, and nothing was pushed. Make it private "
            "in its settings, or leave `private` out."
        )
    return str(address)
