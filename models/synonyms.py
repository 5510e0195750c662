"""Which class names mean the same: spelling, plural, and other words for COCO's categories."""

import re
from collections import defaultdict
from collections.abc import Callable, Sequence

# The first is COCO's own name. Words for a part of what it covers are left out, but for people.
_SYNONYMS = (
    ("person", "people", "human", "pedestrian"),
    ("bicycle", "bike", "cycle", "pushbike"),
    ("car", "automobile"),
    ("motorcycle", "motorbike", "motor", "motor bike"),
    ("airplane", "aeroplane", "plane", "aircraft"),
    ("bus", "buses"),
    ("truck", "lorry"),
    ("traffic light", "traffic signal", "stop light"),
    ("fire hydrant", "hydrant"),
    ("cow", "cattle"),
    ("backpack", "rucksack"),
    ("handbag", "purse"),
    ("tie", "necktie"),
    ("frisbee", "flying disc"),
    ("skis", "ski"),
    ("sports ball", "ball"),
    ("cup", "mug"),
    ("knife", "knives"),
    ("donut", "doughnut"),
    ("couch", "sofa"),
    ("potted plant", "pot plant", "house plant"),
    ("tv", "television", "tv monitor", "television set", "tv set"),
    ("laptop", "laptop computer"),
    ("mouse", "mice", "computer mouse"),
    ("remote", "remote control"),
    ("keyboard", "computer keyboard"),
    ("cell phone", "mobile phone", "mobile", "phone", "smartphone", "cellular phone"),
    ("microwave", "microwave oven"),
    ("refrigerator", "fridge"),
    ("teddy bear", "teddy"),
    ("hair drier", "hair dryer", "blow dryer"),
)


def _spelled(name: str) -> str:
    """Return a name without what does not tell names apart: case, spaces, `_` and `-`."""
    return re.sub(r"[\s_-]+", "", name.casefold())


def _singular(word: str) -> str:
    """Return an English word without its plural's ending, roughly: alike for both is enough."""
    if len(word) > 4 and word.endswith(("ies", "ie")):  # necktie too, as neckties may come of it
        return word.removesuffix("s").removesuffix("ie") + "y"
    if word.endswith(("sses", "shes", "ches", "xes")):
        return word[:-2]
    if word.endswith("s") and not word.endswith(("ss", "us", "is")):
        return word[:-1]
    return word


_OWN_WORD = {
    _singular(_spelled(word)): _singular(_spelled(words[0]))
    for words in _SYNONYMS
    for word in words
}


def _meaning(name: str) -> str:
    """Return what names of one meaning have in common."""
    word = _singular(_spelled(name))
    return _OWN_WORD.get(word, word)


def matching_names(source: Sequence[str], target: Sequence[str]) -> list[tuple[int, int]]:
    """Return positions (in `source`, in `target`) of names for the same class, by target.

    Each name is used once at most. Equal names come first (of several, the first with the first),
    then names spelled alike (case, spaces, `_` and `-` do not matter), then singular and plural
    and synonyms of COCO's names. Of what is left, a meaning that several names of a side have is
    matched with none of the other. "" is no name.
    """
    ours: dict[int, int] = {}  # target -> source
    used: set[int] = set()
    levels: tuple[tuple[Callable[[str], str], bool], ...] = (
        (str, True), (_spelled, False), (_meaning, False),
    )  # fmt: skip
    for key, several in levels:
        given = _positions(source, key, used)
        for word, wanted in _positions(target, key, ours).items():
            found = given.get(word, [])
            if several or len(found) == len(wanted) == 1:
                pairs = list(zip(wanted, found, strict=False))
                ours.update(pairs)
                used.update(position for _, position in pairs)
    return [(position, i) for i, position in sorted(ours.items())]


def of_same_meaning(name: str, names: Sequence[str]) -> str:
    """Return the first of `names` that means the same as a name, "" if none does."""
    same = (other for other in names if name and other and _meaning(other) == _meaning(name))
    return next(same, "")


def _positions(
    names: Sequence[str], key: Callable[[str], str], used: set[int] | dict[int, int]
) -> dict[str, list[int]]:
    """Return the unused positions of the names of each key."""
    positions = defaultdict(list)
    for i, name in enumerate(names):
        if name and i not in used:
            positions[key(name)].append(i)
    return positions
