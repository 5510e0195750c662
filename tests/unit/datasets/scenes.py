"""Images whose objects are rectangles of their label's colour on black: their own oracle."""

import torch

from datasets.dataset import seeded_generator
from datasets.sample import Sample

COLOURS = torch.tensor([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 0], [0, 255, 255]])


def scene(seed: int) -> Sample:
    """Return an image of up to four rectangles of unlike colours, one in each quarter."""
    generator = seeded_generator(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    height, width = draw(90, 260), draw(90, 260)
    image = torch.zeros(height, width, 3, dtype=torch.uint8)
    labels = torch.randperm(len(COLOURS), generator=generator)[: draw(0, 4)]
    boxes = []
    for quarter, label in enumerate(labels):
        left = draw(0, width // 4) + quarter % 2 * (width // 2)
        top = draw(0, height // 4) + quarter // 2 * (height // 2)
        right, bottom = left + draw(4, width // 4), top + draw(4, height // 4)
        image[top:bottom, left:right] = COLOURS[label].to(torch.uint8)
        boxes.append([left, top, right, bottom])
    corners = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    return Sample(image.permute(2, 0, 1), corners, labels, (height, width))


def check_boxes_hold_their_colours(prepared: Sample) -> None:
    """Compare each colour's place with its boxes, a margin of blurred edges apart."""
    _, height, width = prepared.image.shape
    boxes, margin = prepared.boxes, 4.0
    assert (boxes >= 0).all()
    assert (boxes <= torch.tensor([width, height] * 2)).all()
    assert (boxes[:, 2:] > boxes[:, :2]).all()
    assert len(prepared.labels) == len(boxes)
    pixels = prepared.image.permute(1, 2, 0) * 255
    for label, colour in enumerate(COLOURS):
        inside = torch.zeros(height, width, dtype=torch.bool)
        for x0, y0, x1, y1 in boxes[prepared.labels == label].tolist():
            core = pixels[
                int(y0 + margin) : max(0, int(y1 - margin)),
                int(x0 + margin) : max(0, int(x1 - margin)),
            ]
            assert ((core - colour).abs() < 60).all(), "a box covers what is not its object"
            rows = slice(max(0, int(y0 - margin)), int(y1 + margin) + 1)
            inside[rows, max(0, int(x0 - margin)) : int(x1 + margin) + 1] = True
        same = ((pixels - colour).abs() < 60).all(dim=2)
        assert not (same & ~inside).any(), "an object has no box"
