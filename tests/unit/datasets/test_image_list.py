"""Images to predict on: how inputs are found and how they are read."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datasets.dataset import ImageList, find_images
from datasets.eval_loader import eval_loader
from datasets.transforms import EvalTransform
from util.batch import UnreadableImage
from util.errors import DataError

PLAIN = EvalTransform(eval_scale=20, max_size=60, mean=(0.0,) * 3, std=(1.0,) * 3)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with images at two depths and a file that is none."""
    (tmp_path / "deep").mkdir()
    for name in ("b.PNG", "a.jpg", "deep/c.webp"):
        Image.new("RGB", (40, 30)).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("none")
    return tmp_path


def test_folders_files_and_patterns_are_found_once(folder: Path) -> None:
    everything = [folder / name for name in ("a.jpg", "b.PNG", "deep/c.webp")]
    assert find_images([str(folder)]) == everything
    assert find_images([f"{folder}/**/*"]) == everything
    assert find_images([f"{folder}/b*", str(folder)]) == [everything[i] for i in (1, 0, 2)]
    assert find_images([str(folder / "a.jpg")]) == everything[:1]


def test_a_folder_gives_every_image_that_can_be_opened(folder: Path) -> None:
    for name in ("d.jfif", "e.ppm", "._a.jpg"):
        Image.new("RGB", (4, 3)).save(folder / name, "JPEG")
    names = [path.name for path in find_images([str(folder)])]
    assert names == ["a.jpg", "b.PNG", "d.jfif", "c.webp", "e.ppm"]


@pytest.mark.parametrize("text", ["none.jpg", "*.gif", "empty", "no*.txt"])
def test_inputs_without_images_are_refused(folder: Path, text: str) -> None:
    (folder / "empty").mkdir()
    with pytest.raises(DataError, match=r"^`input .*`: (no image|there are no images)"):
        find_images([str(folder), str(folder / text)])


def test_images_are_upright_and_damaged_ones_reported(folder: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = np.zeros((30, 40, 3), dtype=np.uint8)
    pixels[15:, :20] = 255
    Image.fromarray(pixels).save(folder / "turned.jpg", exif=exif, quality=95)
    (folder / "broken.png").write_text("none")
    paths = find_images([str(folder)])
    dataset = ImageList(paths, PLAIN)
    by_name = {path.name: dataset[i] for i, path in enumerate(paths)}
    broken, turned = by_name["broken.png"], by_name["turned.jpg"]
    assert isinstance(broken, UnreadableImage)
    assert not isinstance(turned, UnreadableImage)
    image, target = turned
    assert image.shape == (3, 26, 20)
    assert target["orig_size"].tolist() == [40, 30]
    assert target["boxes"].shape == (0, 4)
    assert target["labels"].shape == (0,)
    assert float(image[0, 2, 2]) == pytest.approx(1, abs=0.05)
    batches = list(eval_loader(dataset, batch_size=4, num_workers=0))
    assert sorted(int(t["image_id"]) for b in batches for t in b.targets) == [0, 1, 3, 4]
    assert all(b.images is None or not b.images.mask.any() for b in batches)
