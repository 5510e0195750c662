"""JPEGs decoded at a fraction of their size: which fraction, and what it looks like."""

import contextlib
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NoReturn

import numpy as np
import pytest
from PIL import Image, ImageFile, UnidentifiedImageError

from datasets.checks.images import examine_file
from datasets.images import (
    READ_ERRORS,
    limit_pixels,
    open_image,
    read_header,
    read_reduced,
    read_rgb,
)


def photograph(width: int, height: int) -> Image.Image:
    """Return an image without detail finer than a decoding at an eighth shows."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, size=(6, 8, 3), dtype=np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize(
    ("size", "wanted", "expected"),
    [
        ((304, 399), (304, 399), (304, 399)),
        ((304, 400), (153, 200), (304, 400)),
        ((304, 400), (152, 200), (152, 200)),
        ((303, 400), (150, 200), (303, 400)),
        ((303, 399), (75, 99), (76, 100)),
        ((304, 400), (10, 13), (38, 50)),
        ((304, 398), (10, 13), (38, 50)),
        ((304, 397), (10, 13), (304, 397)),
        ((304, 400), (10, 400), (304, 400)),
    ],
)
def test_decoding_fraction_is_the_smallest_that_suffices(
    tmp_path: Path, size: tuple[int, int], wanted: tuple[int, int], expected: tuple[int, int]
) -> None:
    path = tmp_path / "a.jpg"
    photograph(size[1], size[0]).save(path, quality=95, subsampling=0)
    image, whole_size = read_reduced(path, size, lambda height, width: wanted)
    assert whole_size == size
    assert (image.height, image.width) == expected
    whole = read_rgb(path, size).resize(image.size, Image.Resampling.BOX)
    difference = np.asarray(image).astype(int) - np.asarray(whole).astype(int)
    assert np.abs(difference).mean() < 2


def test_rotated_images_are_reduced_by_their_upright_size(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    photograph(400, 200).save(tmp_path / "a.jpg", exif=exif, quality=95)
    asked = []

    def wanted(height: int, width: int) -> tuple[int, int]:
        asked.append((height, width))
        return 200, 100

    image, size = read_reduced(tmp_path / "a.jpg", (400, 200), wanted)
    assert (size, asked) == ((400, 200), [(400, 200)])
    assert (image.height, image.width) == (200, 100)
    stored, size = read_reduced(tmp_path / "a.jpg", (200, 400), lambda height, width: (100, 200))
    assert size == (200, 400)
    assert (stored.height, stored.width) == (100, 200)


def test_other_formats_are_decoded_whole(tmp_path: Path) -> None:
    photograph(400, 200).save(tmp_path / "a.png")
    image, size = read_reduced(tmp_path / "a.png", None, lambda height, width: (20, 40))
    assert image.size == (400, 200)
    assert size == (200, 400)


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp"])
def test_invalid_metadata_drops_no_image(tmp_path: Path, suffix: str) -> None:
    """Cameras write what the standard forbids: here a resolution that is no number."""
    exif = Image.Exif()
    exif[0x0112], exif[0x011A] = 6, 72.0
    path = tmp_path / f"a{suffix}"
    photograph(40, 20).save(path, exif=exif)
    raw = path.read_bytes()
    start = next(raw.find(mark) for mark in (b"II*\0", b"MM\0*") if mark in raw)
    order: Literal["little", "big"] = "little" if raw[start : start + 2] == b"II" else "big"
    entry = raw.find((0x011A).to_bytes(2, order) + (5).to_bytes(2, order), start)
    raw = raw[: entry + 2] + (7).to_bytes(2, order) + raw[entry + 4 :]
    if suffix == ".png":
        chunk = raw.find(b"eXIf")
        end = chunk + 4 + int.from_bytes(raw[chunk - 4 : chunk], "big")
        raw = raw[:end] + zlib.crc32(raw[chunk:end]).to_bytes(4, "big") + raw[end + 4 :]
    path.write_bytes(raw)
    assert read_rgb(path, None).size == (20, 40)
    assert read_rgb(path, (40, 20)).size == (20, 40)
    assert read_rgb(path, (20, 40)).size == (40, 20)


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_orientations_that_do_not_exist_are_none(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    photograph(40, 20).save(tmp_path / "a.jpg", exif=exif)
    assert read_header(tmp_path / "a.jpg") == ((20, 40), 1)
    assert read_rgb(tmp_path / "a.jpg", None).size == (40, 20)


@pytest.mark.parametrize(
    ("name", "start", "count"),
    [
        ("a.dds", 80, 4),
        ("a.avif", -300, 200),
        ("a.jpg", 400, 200),
        ("a.png", 60, 40),
        ("a.gif", 0, 6),
    ],
)
def test_damage_is_reported_alike_whatever_pillow_raises(
    tmp_path: Path, name: str, start: int, count: int
) -> None:
    path = tmp_path / name
    if path.suffix not in Image.registered_extensions():
        pytest.skip("this Pillow does not write it")
    photograph(400, 200).save(path)
    raw = bytearray(path.read_bytes())
    start %= len(raw)
    raw[start : start + count] = bytes(count)
    path.write_bytes(raw)
    with pytest.raises(READ_ERRORS):
        read_rgb(path, None)
    read_header(path)


def test_division_by_zero_in_pillow_is_damage(tmp_path: Path) -> None:
    path = tmp_path / "a.avif"
    if path.suffix not in Image.registered_extensions():
        pytest.skip("this Pillow does not write it")
    image = photograph(400, 200)
    image.save(path, save_all=True, append_images=[image])
    raw = bytearray(path.read_bytes())
    raw[raw.find(b"mdhd") + 4] = 0  # the version, so that the time scale is read elsewhere: 0
    path.write_bytes(raw)
    with pytest.raises(OSError, match="damaged image: "):
        read_rgb(path, None)
    found = examine_file(path)
    assert (found.state, found.size) == ("truncated", (200, 400))
    assert "damaged image" in found.error


class Stumbling(ImageFile.ImageFile):
    """A reader that takes damage for a mistake in the program, at the header or the pixels."""

    format = "STUMBLING"

    def _open(self) -> None:
        assert self.fp is not None
        if self.fp.read(5).endswith(b"0"):
            raise AssertionError
        self._size, self._mode = (4, 3), "RGB"

    def load(self) -> NoReturn:
        """Stumble before anything is decoded."""
        raise AssertionError


@pytest.fixture
def stumbling() -> Iterator[None]:
    Image.preinit()
    Image.register_open(Stumbling.format, Stumbling, lambda prefix: prefix.startswith(b"STUM"))
    yield
    Image.ID.remove(Stumbling.format)
    del Image.OPEN[Stumbling.format]


@pytest.mark.usefixtures("stumbling")
@pytest.mark.parametrize(("data", "size"), [(b"STUM0", None), (b"STUM1", (3, 4))])
def test_assertions_of_pillow_are_damage(
    tmp_path: Path, data: bytes, size: tuple[int, int] | None
) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(data)
    assert read_header(path) == (size and (size, 1))
    with pytest.raises(OSError, match="damaged image: AssertionError"):
        read_rgb(path, None)
    assert examine_file(path).state == ("truncated" if size else "unreadable")


def test_what_stands_for_an_image_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(
        UnidentifiedImageError, match=r"a\.png' is a Git LFS pointer\. Run `git lfs"
    ):
        read_rgb(path, None)
    assert examine_file(path).error.startswith("is a Git LFS pointer. Run `git lfs pull`")
    path.write_bytes(b"PK\x03\x04none")
    assert examine_file(path).error == "is packed (ZIP). Unpack it"
    path.write_bytes(b"\xef\xbb\xbf" + b"\n" * 80 + b"<!DOCTYPE html>")
    with pytest.raises(UnidentifiedImageError, match=r"a\.png' is a web page"):
        read_rgb(path, None)
    path.write_text("none")
    with pytest.raises(UnidentifiedImageError, match=r"cannot identify image file '.*a\.png'"):
        read_rgb(path, None)
    assert examine_file(path).error == "not an image of a known format"


@pytest.mark.parametrize("mistake", [TypeError, AttributeError, KeyError, ZeroDivisionError])
def test_bugs_are_not_taken_for_damaged_images(tmp_path: Path, mistake: type[Exception]) -> None:
    """Otherwise every image would be left out, and training would continue with none."""
    path = tmp_path / "a.jpg"
    photograph(40, 20).save(path)

    def decoded_size(height: int, width: int) -> tuple[int, int]:
        raise mistake("ours")

    with pytest.raises(mistake, match="ours"):
        read_reduced(path, None, decoded_size)
    with pytest.raises(mistake, match="ours"), open_image(path):
        raise mistake("ours")


def test_decompression_bombs_are_refused_before_they_are_decoded(tmp_path: Path) -> None:
    """Pillow only warns up to twice its limit; the file here is 12 kB and would be 90 MB."""
    path = tmp_path / "bomb.png"
    Image.new("1", (9500, 9500)).save(path)
    assert read_header(path) is None
    with (
        pytest.warns(Image.DecompressionBombWarning),
        pytest.raises(
            READ_ERRORS, match="9500x9500 pixels are more than the 89478485 of `max_pixels`"
        ),
    ):
        read_rgb(path, None)


@pytest.mark.parametrize(
    ("limit", "message"),
    [
        (299, "20x15 pixels are more than the 299 of `max"),
        (100, r"300 pixels\): over the 100 of `max"),
    ],
)
def test_the_limit_of_pixels_can_be_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int, message: str
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)  # put back afterwards
    path = tmp_path / "a.png"
    Image.new("RGB", (20, 15)).save(path)
    limit_pixels(limit)
    with (
        contextlib.nullcontext() if limit == 100 else pytest.warns(Image.DecompressionBombWarning),
        pytest.raises(Image.DecompressionBombError, match=message),
    ):
        read_rgb(path, None)
    limit_pixels(300)
    assert read_rgb(path, None).size == (20, 15)
    limit_pixels(None)
    assert Image.MAX_IMAGE_PIXELS == 300
