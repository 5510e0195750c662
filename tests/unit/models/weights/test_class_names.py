"""Class names that mean the same: spelling, plural, COCO's synonyms, and clashes of them."""

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.weights.class_names import COCO_CATEGORIES, matching_names

COCO = list(COCO_CATEGORIES.values())
VOC = {
    "aeroplane": "airplane", "bicycle": "bicycle", "bird": "bird", "boat": "boat",
    "bottle": "bottle", "bus": "bus", "car": "car", "cat": "cat", "chair": "chair", "cow": "cow",
    "diningtable": "dining table", "dog": "dog", "horse": "horse", "motorbike": "motorcycle",
    "person": "person", "pottedplant": "potted plant", "sheep": "sheep", "sofa": "couch",
    "train": "train", "tvmonitor": "tv",
}  # fmt: skip


def found(source: list[str], target: list[str]) -> dict[str, str]:
    return {target[ours]: source[theirs] for theirs, ours in matching_names(source, target)}


def test_every_class_of_voc_is_one_of_coco() -> None:
    assert found(COCO, list(VOC)) == VOC


@pytest.mark.parametrize(
    ("name", "coco"),
    [
        ("Pedestrians", "person"),
        ("PEOPLE", "person"),
        ("humans", "person"),
        ("motor-bikes", "motorcycle"),
        ("Traffic_Lights", "traffic light"),
        ("TrafficLight", "traffic light"),
        ("Wine glasses", "wine glass"),
        ("buses", "bus"),
        ("knives", "knife"),
        ("toothbrushes", "toothbrush"),
        ("sandwiches", "sandwich"),
        ("horses", "horse"),
        ("mobile phone", "cell phone"),
        ("cellphones", "cell phone"),
        ("televisions", "tv"),
        ("SOFAS", "couch"),
        ("ski", "skis"),
        ("hair-dryer", "hair drier"),
        ("Fridge", "refrigerator"),
        ("hotdog", "hot dog"),
        ("neckties", "tie"),
        ("ties", "tie"),
    ],
)
def test_other_spellings_and_words(name: str, coco: str) -> None:
    assert found(COCO, [name]) == {name: coco}
    assert found([name], COCO) == {coco: name}


@pytest.mark.parametrize("name", ["RBC", "cart", "business", "dogma", "plant", "", "glass", "men"])
def test_other_classes_match_nothing(name: str) -> None:
    assert found(COCO, [name]) == {}


def test_no_two_classes_of_coco_mean_the_same() -> None:
    assert found(COCO, list(reversed(COCO))) == {name: name for name in COCO}
    for name in COCO:
        assert found([other for other in COCO if other != name], [name]) == {}


def test_exact_names_win_and_a_clash_of_synonyms_matches_nothing() -> None:
    assert found(COCO, ["pedestrian", "person"]) == {"person": "person"}
    assert found(COCO, ["Person", "people"]) == {"Person": "person"}
    assert found(COCO, ["people", "pedestrian", "dog"]) == {"dog": "dog"}
    assert found(["sofa", "couch"], ["Couch", "settee"]) == {"Couch": "couch"}
    assert found(["sofa", "couch"], ["sofas"]) == {}
    assert found(["TV", "tv"], ["tv", "TV"]) == {"tv": "tv", "TV": "TV"}


def test_duplicate_names_are_matched_in_order() -> None:
    assert matching_names(["cat", "dog", "cat"], ["cat", "cat", "cat"]) == [(0, 0), (2, 1)]
    assert matching_names(["", "cat"], ["cat", ""]) == [(1, 0)]


NAMES = st.lists(
    st.sampled_from([*COCO[:6], "People", "PERSON", "bikes", "motor_bike", "Plane", "", "RBC"])
)


@given(NAMES, NAMES, st.randoms())
def test_no_name_is_used_twice_and_order_changes_no_match(
    source: list[str], target: list[str], random: Random
) -> None:
    pairs = matching_names(source, target)
    for side in zip(*pairs, strict=True):
        assert len(set(side)) == len(side)
    assert all(source[theirs] and target[ours] for theirs, ours in pairs)
    shuffled = random.sample(target, len(target))
    names = sorted((source[theirs], target[ours]) for theirs, ours in pairs)
    again = sorted((source[a], shuffled[b]) for a, b in matching_names(source, shuffled))
    assert again == names
