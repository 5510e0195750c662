"""What was found, for the terminal."""

from datasets.checks.diagnosis import Diagnosis
from datasets.checks.findings import NAMED, Finding, first_few
from datasets.checks.kinds import GROUPS, KINDS
from datasets.checks.split_report import SplitReport

_CLASSES = 8


def summary(diagnosis: Diagnosis) -> str:
    """Return a line on each split, then each kind of flaw: how many, what, what follows."""
    lines = [_of_split(report) for report in diagnosis.splits]
    for group in GROUPS:
        kinds = [kind for kind in diagnosis.findings if KINDS[kind].group == group]
        if kinds:
            lines += ["", group]
        for kind in kinds:
            lines += _of_kind(kind, diagnosis.findings[kind])
    return "\n".join([*lines, "", verdict(diagnosis)])


def verdict(diagnosis: Diagnosis) -> str:
    """Return whether the data is sound, in a sentence."""
    wrong = {k: len(v) for k, v in diagnosis.findings.items() if not KINDS[k].note}
    notes = len(diagnosis.findings) - len(wrong)
    also = f" Worth knowing: {notes} kind{'s' if notes > 1 else ''}." if notes else ""
    if not wrong:
        return f"Nothing is wrong.{also}"
    kinds = f"{len(wrong)} kind{'s' if len(wrong) > 1 else ''}"
    return f"Wrong: {sum(wrong.values())} in {kinds}.{also}"


def _of_split(report: SplitReport) -> str:
    by_class, names = report.boxes_by_class(), report.unique_class_names()
    shown = [f"{names[i]} {count}" for i, count in by_class.items()]
    more = f", and {len(shown) - _CLASSES} more classes" if len(shown) > _CLASSES else ""
    return (
        f"{report.split}: {len(report.section('images'))} images, "
        f"{len(report.section('annotations'))} annotations ({sum(by_class.values())} usable boxes)"
        f", {len(shown)} classes: {', '.join(shown[:_CLASSES])}{more}"
    )


def _of_kind(name: str, found: list[Finding]) -> list[str]:
    kind = KINDS[name]
    examples = first_few([f"{one.split} {one}" for one in found[:NAMED]], len(found))
    fix = f" --fix: {kind.fix}." if kind.fix else ""
    return [
        f"  {len(found):>6}  {kind.title} ({'note, ' if kind.note else ''}{name}): {kind.meaning}",
        f"          training {kind.training}.{fix}",
        f"          {examples}",
    ]
