"""Images to predict on: how inputs are found and how they are read."""

import io
import os
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


def test_images_of_kinds_that_are_not_read_are_reported(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "phone").mkdir()
    for name in ("f.HEIC", "g.heic", "h.dng", "deep/i.svg", "._f.HEIC"):
        (folder / "phone" / name).parent.mkdir(exist_ok=True)
        (folder / "phone" / name).write_bytes(b"none")
    with pytest.raises(DataError, match=r"kinds that are not read: 2 \.heic, 1 \.svg, 1 \.dng"):
        find_images([str(folder / "phone")])
    assert len(find_images([str(folder)])) == 3
    assert (
        "skips images of kinds that are not read: 2 .heic, 1 .svg, 1 .dng"
        in capsys.readouterr().out
    )


def test_avif_is_reported_where_pillow_does_not_read_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.images._all_suffixes", frozenset)
    (folder / "new").mkdir()
    (folder / "new" / "a.avif").write_bytes(b"none")
    with pytest.raises(DataError, match=r"kinds that are not read: 1 \.avif"):
        find_images([str(folder / "new")])


def test_copies_that_programs_keep_are_no_images_of_a_folder(folder: Path) -> None:
    for place in (".ipynb_checkpoints", "@eaDir/a.jpg", "deep/__MACOSX", "deep/.thumbnails"):
        (folder / place).mkdir(parents=True)
        Image.new("RGB", (40, 30)).save(folder / place / "copy.jpg")
    names = [path.name for path in find_images([str(folder)])]
    assert names == ["a.jpg", "b.PNG", "c.webp"]
    assert find_images([str(folder / ".ipynb_checkpoints")]), "which is asked for"


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


def test_lists_name_images_from_here_or_from_beside_them(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = b"\xef\xbb\xbfa.jpg\r\n\ndeep/c.webp\n%s/b.PNG\ngone \xff.jpg\na.jpg\n"
    (folder / "list.TXT").write_bytes(lines % bytes(folder))
    expected = [folder / "a.jpg", folder / "deep/c.webp", folder / "b.PNG"]
    gone = os.fsdecode(b"gone \xff.jpg")
    assert find_images([str(folder / "list.TXT")]) == [*expected, Path(gone)]
    monkeypatch.chdir(folder / "deep")
    assert find_images(["../list.TXT"])[1] == Path("../deep/c.webp")
    (folder / "list.txt").write_text("c.webp\n")
    assert find_images(["../list.txt"]) == [Path("c.webp")]


def test_the_standard_input_is_a_list(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"a.jpg\ndeep/c.webp")))
    assert find_images(["-"]) == [Path("a.jpg"), Path("deep/c.webp")]


@pytest.mark.parametrize(
    ("content", "error"), [(b"a.jpg\nb\0.jpg", "line 2 is no name"), (b" \n", "no images there")]
)
def test_lists_without_names_are_refused(folder: Path, content: bytes, error: str) -> None:
    (folder / "list.txt").write_bytes(content)
    with pytest.raises(DataError, match=error):
        find_images([str(folder / "list.txt")])
