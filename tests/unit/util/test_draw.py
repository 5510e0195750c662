"""Drawn boxes: where they are, that tags are readable and inside the image."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageChops

from util.draw import draw_boxes, label_colour, side_by_side, text_colour

GREY = (128, 128, 128)
SIZES = [(160, 120), (640, 480), (480, 2000)]


def contrast(a: tuple[int, int, int], b: tuple[int, int, int]) -> float:
    """Return the contrast ratio as WCAG 2 defines it, with the sRGB transfer function."""

    def luminance(colour: tuple[int, int, int]) -> float:
        parts = [c / 255 for c in colour]
        r, g, b = (p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


def changed(before: Image.Image, after: Image.Image) -> tuple[int, int, int, int] | None:
    """Return the box (left, top, right, bottom; the last two exclusive) around all changes."""
    return ImageChops.difference(before, after).getbbox()


@pytest.mark.parametrize("size", SIZES)
def test_outline_lies_on_the_box(size: tuple[int, int]) -> None:
    image = Image.new("RGB", size, GREY)
    drawn = draw_boxes(image, torch.tensor([[20.0, 30.0, 140.0, 100.0]]), [4], [""])
    assert changed(image, drawn) == (20, 30, 141, 101)
    for point in ((20, 30), (140, 100), (20, 65), (80, 30)):
        assert drawn.getpixel(point) == label_colour(4)
    assert drawn.getpixel((80, 65)) == GREY, "the object stays visible"
    assert image.getextrema() == ((128, 128),) * 3, "the image given is not drawn on"


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK"])
def test_any_mode_becomes_rgb_of_the_same_size(mode: str) -> None:
    image = Image.new("RGB", (90, 70), GREY).convert(mode)
    drawn = draw_boxes(image, torch.tensor([[5.0, 5.0, 60.0, 60.0]]), [0], ["x"], [0.5])
    assert (drawn.mode, drawn.size) == ("RGB", (90, 70))


@pytest.mark.long
@given(
    boxes=st.lists(
        st.tuples(*[st.floats(-300, 900, width=32)] * 4)
        | st.tuples(*[st.sampled_from([0.0, 1e9, -1e9, math.nan, math.inf])] * 4),
        max_size=6,
    ),
    size=st.tuples(st.integers(1, 400), st.integers(1, 400)),
    name=st.text(max_size=60),
)
def test_no_box_name_or_size_breaks_it(
    boxes: list[tuple[float, ...]], size: tuple[int, int], name: str
) -> None:
    tensor = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    scores = torch.linspace(0, 1, len(boxes)).tolist()
    drawn = draw_boxes(
        Image.new("RGB", size, GREY), tensor, list(range(len(boxes))), [name] * len(boxes), scores
    )
    assert drawn.size == size


@pytest.mark.parametrize("gap", ["\n", "\r\n", "\x1c", "\x85", "\u2029", "\t"])
def test_line_breaks_in_names_are_drawn_as_spaces(gap: str) -> None:
    image = Image.new("RGB", (200, 100), GREY)
    box = torch.tensor([[20.0, 30.0, 140.0, 90.0]])
    drawn = [draw_boxes(image, box, [1], [f"traffic{between}light"]) for between in (" ", gap)]
    assert changed(*drawn) is None
    side_by_side(image, image, (f"a{gap}b", "c"))


def test_box_outside_the_image_leaves_no_trace() -> None:
    image = Image.new("RGB", (200, 100), GREY)
    outside = torch.tensor([[210.0, 10, 250, 50], [-50, -50, -1, -1], [10, 120, 50, 150]])
    assert changed(image, draw_boxes(image, outside, [0, 1, 2], ["a", "b", "c"])) is None


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("corner", [(0, 0), (1, 0), (0, 1), (1, 1)])
def test_whole_tag_is_inside_at_every_edge(size: tuple[int, int], corner: tuple[int, int]) -> None:
    image = Image.new("RGB", size, GREY)
    x, y = (corner[0] * (size[0] - 12), corner[1] * (size[1] - 12))
    box = torch.tensor([[x, y, x + 11.0, y + 11.0]])
    middle = torch.tensor([[size[0] / 2 - 6, size[1] / 2 - 6, size[0] / 2 + 5, size[1] / 2 + 5]])
    at_edge = tag_pixels(draw_boxes(image, box, [0], ["traffic light"], [0.87]))
    in_middle = tag_pixels(draw_boxes(image, middle, [0], ["traffic light"], [0.87]))
    # The text is cut nowhere: as many of its pixels show as where there is room all round.
    assert at_edge == in_middle > 10


def tag_pixels(image: Image.Image) -> int:
    ink = text_colour(label_colour(0))
    return sum(count for count, colour in image.getcolors(1 << 20) or [] if colour == ink)


def test_tag_grows_with_the_image() -> None:
    heights = []
    for scale in (1, 4):
        image = Image.new("RGB", (640 * scale, 480 * scale), GREY)
        box = torch.tensor([[100.0, 200.0, 400.0, 400.0]]) * scale
        plain = draw_boxes(image, box, [0], [""])
        heights.append(_height(changed(plain, draw_boxes(image, box, [0], ["person"]))))
    assert heights[1] > 3 * heights[0] > 30


def _height(box: tuple[int, int, int, int] | None) -> int:
    assert box is not None
    return box[3] - box[1]


def test_long_name_is_shortened_to_the_image() -> None:
    image = Image.new("RGB", (160, 120), GREY)
    drawn = draw_boxes(image, torch.tensor([[50.0, 50, 90, 90]]), [0], ["w" * 300])
    tag = changed(draw_boxes(image, torch.tensor([[50.0, 50, 90, 90]]), [0], [""]), drawn)
    assert tag is not None
    assert tag[2] - tag[0] <= 160


def test_best_score_stays_readable_under_a_crowd() -> None:
    image = Image.new("RGB", (160, 120), GREY)
    boxes = torch.tensor([[20.0, 20, 130, 100]] * 40)
    colours = [1] * 39 + [0]
    names, scores = ["other"] * 39 + ["winner"], [0.1] * 39 + [0.95]
    crowd = draw_boxes(image, boxes, colours, names, scores)
    alone = draw_boxes(image, boxes[:1], [0], ["winner"], [0.95])
    box = changed(draw_boxes(image, boxes[:1], [0], [""]), alone)
    assert box is not None
    assert crowd.crop(box).tobytes() == alone.crop(box).tobytes()


def test_tags_with_room_do_not_cover_each_other() -> None:
    image = Image.new("RGB", (640, 480), GREY)
    boxes = torch.tensor([[100.0, 100, 300, 300]] * 4)
    drawn = draw_boxes(image, boxes, [0] * 4, ["person"] * 4, [0.9, 0.8, 0.7, 0.6])
    alone = [draw_boxes(image, boxes[:1], [0], ["person"], [s]) for s in (0.9, 0.8, 0.7, 0.6)]
    assert tag_pixels(drawn) == sum(map(tag_pixels, alone))


@given(label=st.integers(0, 5000))
def test_colour_is_stable_and_its_text_readable(label: int) -> None:
    colour = label_colour(label)
    assert colour == label_colour(label)
    assert all(0 <= c <= 255 for c in colour)
    assert contrast(colour, text_colour(colour)) >= 4.5, "WCAG AA"


def test_colours_of_coco_all_differ() -> None:
    assert len({label_colour(label) for label in range(91)}) == 91


def test_images_stand_side_by_side_unchanged() -> None:
    left, right = Image.new("RGB", (100, 80), (255, 0, 0)), Image.new("L", (60, 90), 7)
    joined = side_by_side(left, right, ("prediction", "a title far longer than its image"))
    pixels = {colour: count for count, colour in joined.getcolors(1 << 20) or []}
    assert pixels[(255, 0, 0)] == 100 * 80
    assert pixels[(7, 7, 7)] >= 60 * 90
    assert joined.width >= 160
    assert joined.height > 90


@pytest.mark.parametrize("box", [(39.5, 5.0, 60.0, 20.0), (5.0, 29.5, 20.0, 60.0)])
def test_box_that_starts_in_the_last_pixels_is_drawn(
    box: tuple[float, float, float, float],
) -> None:
    drawn = draw_boxes(Image.new("RGB", (40, 30)), torch.tensor([box]), [0], ["thing"])
    assert drawn.size == (40, 30)
