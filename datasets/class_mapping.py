"""Relate the classes of a data set to the labels of a model trained on another one."""

from collections.abc import Collection

from util.classes import Classes
from util.errors import DataError


def map_classes(data: Classes, model: Classes) -> dict[int, int]:
    """Return data category id -> model label.

    Classes are matched by name if the model knows every name of the data, else by id if it knows
    every id under the same name. A category called by its number, or a model without any names,
    contradicts nothing; in a model with names, an unnamed label is not in use.

    Raises:
        DataError: the model does not know some class of the data.
    """
    by_name = {name: label for label, name in enumerate(model.names) if name}
    unique = len(set(data.names)) == len(data.names) and len(by_name) == sum(map(bool, model.names))
    if unique and all(name in by_name for name in data.names):
        return {i: by_name[name] for i, name in zip(data.ids, data.names, strict=True)}
    unknown = [
        name or str(i)
        for i, name in zip(data.ids, data.names, strict=True)
        if i not in model.label_of or not _compatible(name, i, model)
    ]
    if not unknown:
        return {i: model.label_of[i] for i in data.ids}
    shown = ", ".join(f"{name!r:.100}" for name in unknown[:10]) + (
        ", ..." if len(unknown) > 10 else ""
    )
    raise DataError(
        f"classes: the model (in training: the training data) does not know {len(unknown)} of the "
        f"{len(data)} in the data: {shown}. Evaluate on data with its classes, or train on these, "
        "with `finetune` from this model."
    )


def map_used_classes(data: Classes, model: Classes, annotated: Collection[int]) -> dict[int, int]:
    """Return what `map_classes` does, without classes that the model does not know and nobody uses.

    `annotated` are the category ids that annotations have: files often name more.

    Raises:
        DataError: the model does not know an annotated class, or any at all.
    """
    try:
        return map_classes(data, model)
    except DataError:
        kept = [
            (i, name)
            for i, name in zip(data.ids, data.names, strict=True)
            if i in annotated or (name and name in model.names)
        ]
        if not kept:
            raise
        ids, names = zip(*kept, strict=True)
        return map_classes(Classes(ids, names), model)


def _compatible(name: str, category_id: int, model: Classes) -> bool:
    other = model.names[model.label_of[category_id]]
    alike = name == other or str(category_id) in (name, other)
    return alike if other else not any(model.names)
