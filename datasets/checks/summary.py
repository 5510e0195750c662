"""What was found, for the terminal."""

from datasets.checks.diagnosis import Diagnosis, boxes_by_class, names_by_class
from datasets.checks.findings import NAMED, first_few
from datasets.checks.kinds import GROUPS, KINDS
from datasets.checks.ledger import Ledger, Offender

_CLASSES = 8


def summary(diagnosis: Diagnosis) -> str:
    """Return a line on each split, then each kind of flaw: how many, what, what follows."""
    lines = [line for ledger in diagnosis.ledgers for line in _of_split(ledger)]
    for group in GROUPS:
        kinds = [kind for kind in diagnosis.offenders if KINDS[kind].group == group]
        if kinds:
            lines += ["", group]
        for kind in kinds:
            lines += _of_kind(kind, diagnosis.offenders[kind])
    return "\n".join([*lines, "", verdict(diagnosis)])


def verdict(diagnosis: Diagnosis) -> str:
    """Return whether the data is sound, in a sentence."""
    wrong = {k: len(v) for k, v in diagnosis.offenders.items() if not KINDS[k].note}
    notes = len(diagnosis.offenders) - len(wrong)
    also = f" Worth knowing: {notes} kind{'s' if notes > 1 else ''}." if notes else ""
    if not wrong:
        return f"Nothing is wrong.{also}"
    kinds = f"{len(wrong)} kind{'s' if len(wrong) > 1 else ''}"
    return f"Wrong: {sum(wrong.values())} in {kinds}.{also}"


def _of_split(ledger: Ledger) -> list[str]:
    by_class, names = boxes_by_class(ledger), names_by_class(ledger)
    shown = [f"{names[i]} {count}" for i, count in by_class.items()]
    more = f", and {len(shown) - _CLASSES} classes more" if len(shown) > _CLASSES else ""
    return [
        f"{ledger.split}: {len(ledger.section('images'))} images, "
        f"{len(ledger.section('annotations'))} annotations ({sum(by_class.values())} usable boxes)"
        f", {len(shown)} classes: {', '.join(shown[:_CLASSES])}{more}",
    ]


def _of_kind(kind: str, found: list[Offender]) -> list[str]:
    told = KINDS[kind]
    note = "note, " if told.note else ""
    examples = first_few([_example(offender) for offender in found[:NAMED]], len(found))
    fix = f" --fix: {told.fix}." if told.fix else ""
    return [
        f"  {len(found):>6}  {told.title} ({note}{kind}): {told.meaning}",
        f"          training {told.training}.{fix}",
        f"          {examples}",
    ]


def _example(offender: Offender) -> str:
    number = "" if offender.annotation_id is None else f" annotation {offender.annotation_id}"
    detail = f" {offender.detail}" if offender.detail else ""
    return f"{offender.split} {offender.place!r:.80}{number}{detail:.80}"
