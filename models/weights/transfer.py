"""Weights into a model: all of them, strictly, or for fine-tuning as far as they fit."""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.weights.class_names import matching_names, of_same_meaning
from models.weights.official import count_layers, official_options
from util.classes import Classes
from util.console import short_name
from util.errors import CheckpointError

_HEAD = re.compile(r"(transformer\.decoder\.)?(class|bbox)_embed\.(\d+)\.(.+)")
_WHOLE = re.compile(r".*\.(no_object\.\w+|scale)")  # in a class head, not a row per class
_QUERIES = "query_embed.weight"
_LABELS = "recipes.denoising.label_enc.weight"  # a row for each class, one for none
_TOKENS = "transformer.encoder.class_tokens.weight"  # a row for each class
_COUNTER = "num_batches_tracked"  # of batch norms; frozen ones have none
BACKBONE = "backbone.0."
RECIPES = "recipes."  # what only helps training
_RANKING_ROW = [(0, 0)]  # of the encoder's class head
_MIN_COPIED = 1 / 3
_QUERY_NOISE = 0.1


def load_strict(model: nn.Module, state_dict: Mapping[str, Tensor], source: str) -> None:
    """Load every tensor; names and shapes must agree exactly, those of recipes too.

    Raises:
        CheckpointError: some do not; the first few are named.
    """
    own = model.state_dict()
    target, given = _without_counters(own), _without_counters(state_dict)
    wrong = [f"'{name}' is missing" for name in target if name not in given]
    wrong += [f"'{name}' is not in the model" for name in given if name not in target]
    wrong += [
        f"'{name}' is {tuple(state_dict[name].shape)}, the model's {tuple(tensor.shape)}"
        for name, tensor in own.items()
        if name in state_dict and state_dict[name].shape != tensor.shape
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise CheckpointError(
            f"{source}: does not fit this model: {', '.join(wrong[:3])}{more}. "
            "Build the model with the checkpoint's options, or start from it with `finetune`."
        )
    model.load_state_dict(dict(state_dict), strict=False)


def _without_counters(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if not name.endswith(_COUNTER)}


@dataclass
class TransferReport:
    """What became of every tensor of a checkpoint and of a model.

    `copied`: names copied whole. `by_name`: class-head tensors filled row by row.
    `reinitialised`: names of the model that keep fresh weights -> why. `ignored`: names of the
    checkpoint without use -> why. `adapted`: tensors changed to fit -> how. `renamed`: classes
    of the model -> what the checkpoint calls them, where more than upper and lower case differs.
    `contested`: fresh classes -> the class of the checkpoint that they and another could be.
    `nameless`: the checkpoint does not say what its classes are called.
    """

    copied: list[str] = field(default_factory=list)
    by_name: list[str] = field(default_factory=list)
    adapted: dict[str, str] = field(default_factory=dict)
    reinitialised: dict[str, str] = field(default_factory=dict)
    ignored: dict[str, str] = field(default_factory=dict)
    matched_classes: tuple[str, ...] = ()
    fresh_classes: tuple[str, ...] = ()
    renamed: dict[str, str] = field(default_factory=dict)
    contested: dict[str, str] = field(default_factory=dict)
    nameless: bool = False

    def table(self) -> str:
        """Return a few lines: counts, and modules with what happened to them."""
        known = len(self.matched_classes)
        by_name = f"{known} of {known + len(self.fresh_classes)} classes known"
        if self.nameless:
            by_name += ", as the checkpoint names no classes"
        if self.renamed:
            renamed = _some(f"{ours} from {theirs}" for ours, theirs in self.renamed.items())
            by_name += f" ({renamed})"
        if self.fresh_classes:
            remarks = {
                name: f" (not the only one for {other})" for name, other in self.contested.items()
            }
            fresh_classes = _some(name + remarks.get(name, "") for name in self.fresh_classes)
            by_name += f", fresh: {fresh_classes}"
        fresh = self.reinitialised
        of_model = {*self.copied, *self.by_name, *self.adapted, *fresh}
        lines = [
            ("copied", len(self.copied), ""),
            ("rows by class name", len(self.by_name), by_name),
            ("adapted", len(self.adapted), _groups(self.adapted, of_model - self.adapted.keys())),
            ("re-initialised", len(fresh), _groups(fresh, of_model - fresh.keys())),
            ("ignored", len(self.ignored), _groups(self.ignored, of_model)),
        ]
        return "\n".join(
            f"{what:<18} {count:>4} tensors  {details}".rstrip() for what, count, details in lines
        )


def transfer(
    model: nn.Module,
    state_dict: Mapping[str, Tensor],
    *,
    source_classes: Classes,
    target_classes: Classes,
    backbone: bool = True,
    proposal_scores: Literal["objects", "classes", "either"] = "objects",
) -> TransferReport:
    """Start `model` from the weights of another training, as far as they fit.

    Tensors of equal name and shape are copied. Rows of class heads, class tokens and embedded
    labels follow the class name, see `class_names.matching_names`, so labels may have another order
    or number. A two-stage model ranks proposals by row 0 of the encoder's class head: that row is
    kept. Where `proposal_scores` are of classes, in checkpoint and model, rows follow names there,
    too; where they are of objects in one and of classes in the other, "either", that head stays
    fresh. Missing queries are noisy copies of the first ones (equal queries would never part); of
    too many, those stay whose reference points lie farthest apart. Everything else keeps its fresh
    weights and is reported. Without `backbone`, that of `model`, which is another one, stays as it
    is and is left out.

    Raises:
        CheckpointError: of the parameters behind the backbone, less than a third could be copied.
    """
    pairs = matching_names(source_classes.names, target_classes.names)
    report = _report_on_classes(source_classes.names, target_classes.names, pairs)
    source, target = _without_counters(state_dict), _without_counters(model.state_dict())
    if not backbone:
        source, target = _without_backbone(source), _without_backbone(target)
    origin, proposals = _origins(source, target), _proposal_index(target)
    used = set(origin.values())
    with torch.no_grad():
        for name, tensor in target.items():
            if name not in origin:
                report.reinitialised[name] = "not in the checkpoint"
            elif name == _QUERIES:
                _fill_queries(tensor, source, report)
            elif (head := _HEAD.fullmatch(name)) and head[2] == "class" and not _WHOLE.match(name):
                ranks = int(head[3]) == proposals
                if ranks and proposal_scores == "either":
                    report.reinitialised[name] = "class_proposals differs"
                    continue
                rows = _RANKING_ROW if ranks and proposal_scores == "objects" else pairs
                _fill(name, tensor, source[origin[name]], rows, report)
            elif name in (_LABELS, _TOKENS) or _has_row_per_class(name, tensor):
                _fill(name, tensor, source[origin[name]], pairs, report)
            else:
                _fill(name, tensor, source[origin[name]], None, report)
    filled_names = [*report.copied, *report.by_name, *report.adapted]
    filled = {target[name].data_ptr() for name in filled_names}
    # layers may share a head: a tensor that is filled under one name is not fresh under another
    for name in list(report.reinitialised):
        if target[name].data_ptr() in filled:
            del report.reinitialised[name]
            report.copied.append(name)
    report.ignored.update({name: "not in the model" for name in source if name not in used})
    _check_enough(filled, source, target)
    return report


def _has_row_per_class(name: str, tensor: Tensor) -> bool:
    """Return whether a recipe's tensor has a row for each class; a single row is for objects."""
    by_class = ".class_embed." in name or (".encoder_heads.score." in name and len(tensor) > 1)
    return name.startswith(RECIPES) and by_class


def _without_backbone(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(BACKBONE)}


def _report_on_classes(
    theirs: Sequence[str], ours: Sequence[str], pairs: list[tuple[int, int]]
) -> TransferReport:
    """Return a report that says which classes are known; pairs are positions (theirs, ours)."""
    matched = {label for _, label in pairs}
    fresh = tuple(name for label, name in enumerate(ours) if label not in matched)
    names = [(theirs[their_label], ours[our_label]) for their_label, our_label in pairs]
    taken_by_another = {name: of_same_meaning(name, theirs) for name in fresh}
    return TransferReport(
        matched_classes=tuple(ours[label] for label in sorted(matched)),
        fresh_classes=fresh,
        renamed={our: their for their, our in names if our.casefold() != their.casefold()},
        contested={name: other for name, other in taken_by_another.items() if other},
        nameless=not any(theirs),
    )


def _proposal_index(state_dict: Mapping[str, Tensor]) -> int | None:
    """Return the number of the encoder's head in a two-stage model."""
    if "transformer.enc_output.weight" not in state_dict:
        return None
    return count_layers(state_dict, "transformer.decoder.layers")


def _origins(source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the source name for every target name that has one.

    Heads are found under any of their aliases; the encoder's comes after the decoder's, so its
    number follows the number of layers, and it never serves as a decoder's head.
    """
    source_proposals, target_proposals = _proposal_index(source), _proposal_index(target)
    origins = {}
    for name in target:
        candidates = [name]
        if head := _HEAD.fullmatch(name):
            prefix, kind, index, tail = head.groups(default="")
            ranks_proposals = int(index) == target_proposals
            number = source_proposals if ranks_proposals else int(index)
            if number is None or (number == source_proposals and not ranks_proposals):
                continue
            aliases = (prefix, "", "transformer.decoder.")
            candidates = [f"{alias}{kind}_embed.{number}.{tail}" for alias in aliases]
        found = next((candidate for candidate in candidates if candidate in source), None)
        if found is not None:
            origins[name] = found
    return origins


def _fill(
    name: str,
    tensor: Tensor,
    given: Tensor,
    rows: list[tuple[int, int]] | None,
    report: TransferReport,
) -> None:
    """Copy the rows given as (in the checkpoint, in the model), the whole tensor for None."""
    if rows == []:
        report.reinitialised[name] = "no class of a known name"
    # a single row for objects of any class has none for a class
    elif rows and tensor.shape[1:] == given.shape[1:] and max(rows)[0] < len(given):
        for theirs, ours in rows:
            tensor[ours].copy_(given[theirs])
        if rows is _RANKING_ROW:
            report.adapted[name] = "row 0, which ranks proposals"
        else:
            report.by_name.append(name)
    elif rows is None and tensor.shape == given.shape:
        tensor.copy_(given)
        report.copied.append(name)
    else:
        report.reinitialised[name] = f"shape {tuple(tensor.shape)}, checkpoint {tuple(given.shape)}"


def _fill_queries(tensor: Tensor, source: Mapping[str, Tensor], report: TransferReport) -> None:
    given = source[_QUERIES]
    if tensor.shape[1:] != given.shape[1:] or len(tensor) == len(given):
        _fill(_QUERIES, tensor, given, None, report)
        return
    count = len(given)
    report.adapted[_QUERIES] = f"{count} queries to {len(tensor)}"
    if len(tensor) < count and "transformer.reference_points.weight" not in source:
        tensor.copy_(given[: len(tensor)])  # contents alone: proposals say where to look
        return
    if len(tensor) < count:
        # where each query looks first, in fractions of the image
        weight = source["transformer.reference_points.weight"]
        bias = source["transformer.reference_points.bias"]
        position, _ = given.chunk(2, dim=1)
        points = F.linear(position.float(), weight.float(), bias.float()).sigmoid()
        tensor.copy_(given[_farthest_apart(points, len(tensor))])
        return
    tensor.copy_(given[torch.arange(len(tensor), device=given.device) % count])
    extra = tensor[count:]
    extra += torch.randn_like(extra) * (_QUERY_NOISE * float(given.float().std()))


def _farthest_apart(points: Tensor, count: int) -> Tensor:
    """Return, in order, which points to keep so that they cover the image most evenly.

    Beginning in the middle, each is the one farthest from those before. Shape: [Q,2] -> [count].
    """
    chosen = [int((points - 0.5).norm(dim=1).argmin())]
    distance = (points - points[chosen[0]]).norm(dim=1)
    while len(chosen) < count:
        distance[chosen[-1]] = -1.0  # points may coincide, but none is taken twice
        chosen.append(int(distance.argmax()))
        distance = distance.minimum((points - points[chosen[-1]]).norm(dim=1))
    return torch.tensor(sorted(chosen), device=points.device)


def _check_enough(
    filled: set[int], source: Mapping[str, Tensor], target: Mapping[str, Tensor]
) -> None:
    """Raise CheckpointError if too little of the model is in the tensors at these addresses."""
    sizes = {
        tensor.data_ptr(): tensor.numel()
        for name, tensor in target.items()
        if not name.startswith((BACKBONE, RECIPES))
    }
    share = sum(sizes.get(pointer, 0) for pointer in filled) / max(sum(sizes.values()), 1)
    if share >= _MIN_COPIED:
        return
    ours, theirs = official_options(target, None, "model"), {}
    if "transformer.level_embed" in source:
        theirs = official_options(source, None, "checkpoint")
    differing = [
        f"`{name}`: checkpoint {value}, run {ours.get(name, 'other')}"
        for name, value in theirs.items()
        if value != ours.get(name)
    ]
    raise CheckpointError(
        f"`finetune`: apart from the backbone, only {share:.0%} of the weights fit "
        f"({'; '.join(differing) or 'other tensors'}). "
        "Set the model options to the checkpoint's."
    )


def _some(names: Iterable[str], limit: int = 5) -> str:
    listed = list(names)
    shown = ", ".join(short_name(name) or "(unnamed)" for name in listed[:limit])
    return f"{shown}, ... ({len(listed)})" if len(listed) > limit else shown


def _groups(entries: Mapping[str, str], others: Iterable[str]) -> str:
    """Join entries by what became of them; a module in which that differs is listed in parts.

    `others` are the names to which something else happened.
    """
    reasons: dict[str, set[str]] = defaultdict(set)  # by module and by tensor
    for name, why in [*entries.items(), *((name, "") for name in others)]:
        for module in _modules_of(name):
            reasons[module].add(why)
    members: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name, why in entries.items():
        whole = next((module for module in _modules_of(name) if len(reasons[module]) == 1), name)
        of_any_number = re.sub(r"\.\d+(?=\.)", ".*", whole)  # the same module of every layer
        members[why, of_any_number].append(name)
    by_reason: dict[str, list[str]] = defaultdict(list)
    for (why, module), names in members.items():
        by_reason[why].append(names[0] if len(names) == 1 else module)
    return "; ".join(f"{_some(modules)} ({why})" for why, modules in by_reason.items())


def _modules_of(name: str) -> list[str]:
    """Return the modules that a tensor is in, from the outermost, and the tensor itself."""
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
