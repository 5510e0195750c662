"""Which images and categories of the data other programs mean in their detections.

Some name images by the stem of the file instead of the id, or number them in their own way beside
the file's name, and count categories from 0 where the data count from 1. A wrong guess would be a
wrong AP: images are found by what fits all of them, and category ids that seem to be others are
refused until an option says how to read them.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path, PureWindowsPath
from typing import Literal

import numpy as np

from engine.evaluation.matching import Bools, Detections, Floats, Ints, Truth, overlaps
from util.errors import DataError

Key = int | str
CategoryIds = Literal["auto", "as_is", "from_0", "from_1", "plus_1", "minus_1"]
_WORDS = {
    "from_0": "positions of the data's categories, counted from 0",
    "from_1": "positions of the data's categories, counted from 1",
    "plus_1": "one less than the data's",
    "minus_1": "one more than the data's",
}
_MIN_IOU = 0.5
_MAX_RIGHT, _MIN_RIGHT = 0.1, 0.8  # shares of boxes on objects, as the ids are and as they may be
_MAX_COMPARED = 100_000  # the best of the detections


def find_images(
    keys: Sequence[Key], file_names: Sequence[str], truth: Truth, path: Path
) -> tuple[Ints, list[str]]:
    """Return the position of each named image in the data, -1 where there is none, and notices.

    `file_names` come with them, "" where there is none.

    Raises:
        DataError: most of the named images are not in the data.
    """
    names_tell = _names_tell(keys, file_names, truth)
    keys = file_names if names_tell else keys
    distinct = list(dict.fromkeys(keys))
    # the stem "12" is no id
    by_id = {} if names_tell else _by_id(distinct, truth)
    by_name = {} if len(by_id) == len(distinct) else _by_name(distinct, truth)
    found, notices = by_id, []
    words = any(_whole(key) is None for key in distinct)  # then numbers are names, too
    if by_name and len(by_name) + words > len(by_id):
        found = by_name
        notices.append(
            f"images are named by their files, not by their ids: {len(found)} of {len(distinct)} "
            f"names found, such as {next(iter(found))!r:.60}"
        )
    unknown = [key for key in distinct if key not in found]
    if 2 * len(unknown) > len(distinct):
        raise DataError(
            f"{path}: {len(unknown)} of {len(distinct)} image ids are not in the data, such as "
            f"{unknown[0]!r:.60}. Use the annotations of the images that the detections were made "
            "on."
        )
    positions = np.array([found.get(key, -1) for key in keys], dtype=np.int64)
    if unknown:
        notices.append(
            f"{int((positions < 0).sum())} of {len(keys)} detections skipped: {len(unknown)} image "
            f"ids are not in the data, such as {unknown[0]!r:.60}"
        )
    return positions, notices


def _names_tell(keys: Sequence[Key], file_names: Sequence[str], truth: Truth) -> bool:
    """Return whether the names of files count: the ids lead to other images, or to fewer.

    A number that fits may be another image's, as where images are counted from 0; a name hardly.
    """
    if not all(file_names):
        return False
    by_id, by_name = _by_id(dict.fromkeys(keys), truth), _by_name(dict.fromkeys(file_names), truth)
    pairs = dict.fromkeys(zip(keys, file_names, strict=True))
    if any(k in by_id and n in by_name and by_id[k] != by_name[n] for k, n in pairs):
        return True
    return len(set(by_name.values())) > len(set(by_id.values()))


def find_categories(
    keys: Sequence[Key],
    class_names: Sequence[str],
    truth: Truth,
    path: Path,
    *,
    image: Ints,
    box: Floats,
    score: Floats,
    use: Bools,
    reading: CategoryIds,
) -> tuple[Ints, list[str]]:
    """Return the position of each category in the data, -1 where there is none, and notices.

    "auto" takes ids as they are, unless `class_names`, "" where there are none, say another. `use`
    says of which detections the image is known.

    Raises:
        DataError: with "auto", the boxes lie on objects whose ids show that others are meant.
    """
    ids = truth.category_ids.tolist()
    texts = {truth.category_texts[n]: k for k, n in enumerate(ids) if n in truth.category_texts}
    names = {name: k for k, name in enumerate(truth.class_names)} | texts
    distinct = list(dict.fromkeys(keys))
    numbers = {
        key: number for key in distinct if key not in texts and (number := _whole(key)) is not None
    }
    chosen = _readings(truth)["as_is" if reading == "auto" else reading]
    found = {key: chosen(number) for key, number in numbers.items()}
    found |= {key: names.get(str(key), -1) for key in distinct if key not in numbers}
    notices, what = [], "ids"
    if reading == "auto" and (wrong := _named_otherwise(keys, class_names, found, truth)):
        notices.append(f"categories are taken by their names, not by their ids: {wrong}")
        keys, numbers, what = class_names, {}, "names"
        distinct = list(dict.fromkeys(keys))
        found = {key: names.get(str(key), -1) for key in distinct}
    positions = np.array([found[key] for key in keys], dtype=np.int64)
    if reading == "auto" and numbers:
        boxes = Detections(image, np.zeros_like(image), box, score)
        raw = np.array([numbers.get(key, -1) for key in keys], dtype=np.int64)
        usable = use & np.array([key in numbers for key in keys], dtype=np.bool_)
        _refuse_others(raw[usable], boxes.select(usable), truth, path)
    if (positions >= 0).all():
        return positions, notices
    unknown = [key for key in sorted(distinct, key=str) if found[key] < 0]
    notices.append(
        f"{int((positions < 0).sum())} of {len(keys)} detections skipped: their categories ({what} "
        f"{', '.join(f'{key!s:.40}' for key in unknown[:5])}) are not in the data"
    )
    return positions, notices


def _named_otherwise(
    keys: Sequence[Key], class_names: Sequence[str], found: Mapping[Key, int], truth: Truth
) -> str:
    """Return an id that means another category than the name beside it, "" if none does."""
    known = {name: k for k, name in enumerate(truth.class_names)}
    if not all(class_names) or len(known) < len(truth.class_names):
        return ""
    for key, name in dict.fromkeys(zip(keys, class_names, strict=True)):
        if name in known and found[key] != known[name]:
            return f"{key!s:.40} is not {name!r:.60} in the data"
    return ""


def _by_id(keys: Iterable[Key], truth: Truth) -> dict[Key, int]:
    positions = {number: i for i, number in enumerate(truth.image_ids.tolist())}
    # ids that the data has as text, in which "0012" is not 12
    texts: dict[Key, int] = {text: number for number, text in truth.image_texts.items()}
    numbers = {key: texts[key] if key in texts else _whole(key) for key in keys}
    return {key: positions[n] for key, n in numbers.items() if n is not None and n in positions}


def _by_name(keys: Iterable[Key], truth: Truth) -> dict[Key, int]:
    """Find images by file name, by its last part, by its stem, or by the number that is its stem.

    Of a name with folders that the data lack, the last part counts. What several images are called
    names none of them.
    """
    named: tuple[Mapping[Key, list[int]], ...] = tuple(defaultdict(list) for _ in range(3))
    for position, name in enumerate(truth.file_names):
        file = PureWindowsPath(name)  # it splits at both slashes
        stem = int(file.stem) if file.stem.isdecimal() and len(file.stem) < 19 else file.stem
        for level, key in zip(named, (name, file.name, stem), strict=True):
            level[key].append(position)
    found: dict[Key, int] = {}
    for key in keys:
        number = _whole(key) if isinstance(key, str) else key
        ways = (
            named[0].get(key),
            named[1].get(key),
            named[2].get(key if number is None else number),
            named[1].get(PureWindowsPath(key).name) if isinstance(key, str) else None,
        )
        matches = next((way for way in ways if way), [])
        if len(matches) == 1:
            found[key] = matches[0]
    return found


def _whole(key: Key) -> int | None:
    """Return a number that may be written as text."""
    if isinstance(key, int):
        return key
    text = key.strip().removesuffix(".0")
    return int(text) if text.removeprefix("-").isdecimal() and len(text) < 19 else None


def _readings(truth: Truth) -> dict[str, Callable[[int], int]]:
    """Return the ways to read a category id: each gives a position in the data or -1."""
    ids = {number: k for k, number in enumerate(truth.category_ids.tolist())}
    count = len(ids)
    return {
        "as_is": lambda number: ids.get(number, -1),
        "from_0": lambda number: number if 0 <= number < count else -1,
        "from_1": lambda number: number - 1 if 1 <= number <= count else -1,
        "plus_1": lambda number: ids.get(number + 1, -1),
        "minus_1": lambda number: ids.get(number - 1, -1),
    }


def _refuse_others(raw: Ints, boxes: Detections, truth: Truth, path: Path) -> None:
    """Raise DataError if the classes of the objects that boxes lie on show other category ids."""
    best = np.argsort(-boxes.score, kind="stable")[:_MAX_COMPARED]
    row, gt, iou = overlaps(truth, boxes.select(best), _MIN_IOU, any_category=True)
    order = np.lexsort((iou, row))
    last = order[np.append(np.diff(row[order]) != 0, True)[: len(order)]]  # the best of each box
    number, category = raw[best][row[last]], truth.category[gt[last]]
    if not len(number):
        return
    distinct, which = np.unique(number, return_inverse=True)
    right = {
        name: float((np.array([read(n) for n in distinct.tolist()])[which] == category).mean())
        for name, read in _readings(truth).items()
    }
    other = max((name for name in right if name != "as_is"), key=lambda name: right[name])
    one_class = len(np.unique(category)) == 1 and np.isin(distinct, truth.category_ids).all()
    if right["as_is"] > _MAX_RIGHT or right[other] < _MIN_RIGHT or one_class:
        return
    raise DataError(
        f"{path}: the category ids seem to be {_WORDS[other]}: of {len(number)} boxes on objects, "
        f"{right['as_is']:.0%} have the object's class as the ids are, and {right[other]:.0%} when "
        f"read that way. Give `category_ids {other}`, or `category_ids as_is` to take them as "
        "they are."
    )
