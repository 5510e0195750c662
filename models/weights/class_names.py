"""Which class names mean the same: spelling, plural, and other words for COCO's categories."""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

from util.classes import Classes

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
    """Return a name without what makes no difference: case, spaces, `_` and `-`."""
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
    levels: tuple[tuple[Callable[[str], str], bool], ...] = (
        (str, True),
        (_spelled, False),
        (_meaning, False),
    )
    for key, several in levels:
        given = _positions(source, key, ours.values())
        for word, wanted in _positions(target, key, ours.keys()).items():
            found = given.get(word, [])
            if several or len(found) == len(wanted) == 1:
                ours.update(zip(wanted, found, strict=False))
    return [(position, i) for i, position in sorted(ours.items())]


def of_same_meaning(name: str, names: Sequence[str]) -> str:
    """Return the first of `names` that means the same as a name, "" if none does."""
    same = (other for other in names if name and other and _meaning(other) == _meaning(name))
    return next(same, "")


def _positions(
    names: Sequence[str], key: Callable[[str], str], used: Iterable[int]
) -> dict[str, list[int]]:
    """Return the unused positions of the names of each key."""
    positions = defaultdict(list)
    for i in sorted(set(range(len(names))).difference(used)):
        if names[i]:
            positions[key(names[i])].append(i)
    return positions


COCO_CATEGORIES = {
    1: "person",
    2: "bicycle",
    3: "car",
    4: "motorcycle",
    5: "airplane",
    6: "bus",
    7: "train",
    8: "truck",
    9: "boat",
    10: "traffic light",
    11: "fire hydrant",
    13: "stop sign",
    14: "parking meter",
    15: "bench",
    16: "bird",
    17: "cat",
    18: "dog",
    19: "horse",
    20: "sheep",
    21: "cow",
    22: "elephant",
    23: "bear",
    24: "zebra",
    25: "giraffe",
    27: "backpack",
    28: "umbrella",
    31: "handbag",
    32: "tie",
    33: "suitcase",
    34: "frisbee",
    35: "skis",
    36: "snowboard",
    37: "sports ball",
    38: "kite",
    39: "baseball bat",
    40: "baseball glove",
    41: "skateboard",
    42: "surfboard",
    43: "tennis racket",
    44: "bottle",
    46: "wine glass",
    47: "cup",
    48: "fork",
    49: "knife",
    50: "spoon",
    51: "bowl",
    52: "banana",
    53: "apple",
    54: "sandwich",
    55: "orange",
    56: "broccoli",
    57: "carrot",
    58: "hot dog",
    59: "pizza",
    60: "donut",
    61: "cake",
    62: "chair",
    63: "couch",
    64: "potted plant",
    65: "bed",
    67: "dining table",
    70: "toilet",
    72: "tv",
    73: "laptop",
    74: "mouse",
    75: "remote",
    76: "keyboard",
    77: "cell phone",
    78: "microwave",
    79: "oven",
    80: "toaster",
    81: "sink",
    82: "refrigerator",
    84: "book",
    85: "clock",
    86: "vase",
    87: "scissors",
    88: "teddy bear",
    89: "hair drier",
    90: "toothbrush",
}
NUM_COCO_LOGITS = 91


def coco_logit_classes() -> Classes:
    """Return the label space of a head with 91 logits: label = category id, unused ids ""."""
    ids = tuple(range(NUM_COCO_LOGITS))
    return Classes(ids, tuple(COCO_CATEGORIES.get(i, "") for i in ids))
