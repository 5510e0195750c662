"""Parts of an image are those of the whole, and of a TIFF file no more than they need is read."""

import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from datasets.images import READ_ERRORS, read_rgb
from datasets.tiles import Tile
from datasets.windows import open_windows

tifffile = pytest.importorskip("tifffile")
pytest.importorskip("imagecodecs")

SHAPES = {"L": (), "RGB": (3,), "RGBA": (4,), "I;16": ()}


def noise(height: int, width: int, mode: str) -> Any:
    """Return smooth pixels: a JPEG of noise would differ by decoders' rounding alone."""
    random = np.random.default_rng(0)
    top = 65535 if mode == "I;16" else 255
    coarse = random.integers(0, top, (height // 8 + 1, width // 8 + 1, *SHAPES[mode]))
    fine = coarse.repeat(8, axis=0).repeat(8, axis=1)[:height, :width]
    return fine.astype(np.uint16 if mode == "I;16" else np.uint8)


def some_tiles(height: int, width: int) -> list[Tile]:
    random = np.random.default_rng(1)
    tiles = [Tile(0, 0, width, height), Tile(width - 1, height - 1, width, height)]
    for _ in range(12):
        left, top = (int(random.integers(0, side - 1)) for side in (width, height))
        right = int(random.integers(left + 1, width + 1))
        tiles.append(Tile(left, top, right, int(random.integers(top + 1, height + 1))))
    return tiles


def assert_same_pixels(path: Path, *, whole: bool, tolerance: int = 0) -> None:
    """Compare windows with Pillow's image."""
    expected = np.asarray(Image.open(path)) if tolerance else np.asarray(read_rgb(path, None))
    expected = expected.astype(np.int64)
    with open_windows(path, None) as windows:
        assert windows.whole == whole
        assert windows.size == expected.shape[:2]
        for tile in some_tiles(*windows.size):
            pixels = windows.read(tile).permute(1, 2, 0).numpy().astype(np.int64)
            part = expected[tile.top : tile.bottom, tile.left : tile.right]
            assert pixels.shape == part.shape
            assert np.abs(pixels - part).max() <= tolerance


@pytest.mark.parametrize("layout", [{"tile": (32, 48)}, {"rowsperstrip": 7}, {}])
@pytest.mark.parametrize("mode", SHAPES)
@pytest.mark.parametrize("compression", [None, "deflate", "lzw"])
def test_parts_of_a_tiff_are_those_of_pillows_image(
    layout: dict[str, Any], mode: str, compression: str | None, tmp_path: Path
) -> None:
    options = dict(layout)
    if mode == "RGBA":
        options["extrasamples"] = ["unassalpha"]
    photometric = "rgb" if mode.startswith("RGB") else "minisblack"
    path = tmp_path / "image.tif"
    tifffile.imwrite(path, noise(101, 130, mode), compression=compression, photometric=photometric,
                     predictor=compression is not None, **options)  # fmt: skip
    assert_same_pixels(path, whole=False)


def test_a_file_of_the_other_byte_order_has_the_same_pixels(tmp_path: Path) -> None:
    path = tmp_path / "image.tif"
    tifffile.imwrite(path, noise(60, 50, "I;16").astype(">u2"), byteorder=">", tile=(16, 16))
    assert_same_pixels(path, whole=False)


@pytest.mark.parametrize("photometric", ["rgb", "ycbcr"])
def test_parts_of_a_tiff_of_jpegs_are_those_of_pillows_image(
    photometric: str, tmp_path: Path
) -> None:
    path = tmp_path / "image.tif"
    tifffile.imwrite(path, noise(101, 130, "RGB"), compression="jpeg", photometric=photometric,
                     tile=(48, 48))  # fmt: skip
    assert_same_pixels(path, whole=False, tolerance=2)


def test_other_files_are_decoded_whole(tmp_path: Path) -> None:
    image = Image.fromarray(noise(60, 50, "RGB"))
    turned = Image.Exif()
    turned[274] = 6
    image.save(tmp_path / "a.png")
    image.save(tmp_path / "b.jpg")
    image.save(tmp_path / "c.tif", exif=turned)
    image.convert("CMYK").save(tmp_path / "d.tif")
    image.quantize(16).save(tmp_path / "e.tif")
    planes = np.moveaxis(noise(60, 50, "RGB"), 2, 0)
    tifffile.imwrite(tmp_path / "f.tif", planes, planarconfig="separate", photometric="rgb")
    for path in sorted(tmp_path.iterdir()):
        assert_same_pixels(path, whole=True)


def test_pixels_in_memory_are_cut(tmp_path: Path) -> None:
    pixels = torch.arange(3 * 20 * 30, dtype=torch.uint8).reshape(3, 20, 30)
    with open_windows(pixels, None) as windows:
        assert windows.size == (20, 30)
        assert windows.read(Tile(4, 5, 9, 12)).equal(pixels[:, 5:12, 4:9])


def test_the_stated_size_decides_what_is_upright_as_for_the_whole_image(tmp_path: Path) -> None:
    turned = Image.Exif()
    turned[274] = 6
    Image.fromarray(noise(60, 50, "RGB")).save(tmp_path / "a.tif", exif=turned)
    for stated in (None, (50, 60), (60, 50)):
        expected = np.asarray(read_rgb(tmp_path / "a.tif", stated))
        with open_windows(tmp_path / "a.tif", stated) as windows:
            whole = windows.read(Tile(0, 0, *windows.size[::-1]))
        assert np.array_equal(whole.permute(1, 2, 0).numpy(), expected)


@pytest.mark.parametrize("layout", [{"tile": (64, 64)}, {"rowsperstrip": 64}])
def test_windows_of_a_large_tiff_take_little_memory(
    layout: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.windows._KEPT", 2**22)
    path, side = tmp_path / "image.tif", 4096
    tifffile.imwrite(path, np.zeros((side, side, 3), np.uint8), compression="deflate", **layout)
    tracemalloc.start()
    with open_windows(path, None) as windows:
        for start in range(0, side - 256, 256):
            windows.read(Tile(start, start, start + 256, start + 256))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert 256 * 256 * 3 < peak < 2**24 < side * side * 3


def test_a_damaged_part_is_an_error_of_reading_where_it_lies(tmp_path: Path) -> None:
    path = tmp_path / "image.tif"
    tifffile.imwrite(path, noise(128, 64, "RGB"), compression="deflate", tile=(64, 64))
    content = path.read_bytes()
    with tifffile.TiffFile(path) as tiff:
        start = tiff.pages[0].dataoffsets[1]
    path.write_bytes(content[:start] + b"\xff" * 50 + content[start + 50 :])
    with open_windows(path, None) as windows:
        windows.read(Tile(0, 0, 64, 64))
        with pytest.raises(READ_ERRORS):
            windows.read(Tile(0, 32, 64, 96))


def test_a_file_that_ends_early_is_an_error_of_reading(tmp_path: Path) -> None:
    path = tmp_path / "image.tif"
    Image.fromarray(noise(128, 64, "RGB")).save(path, compression="tiff_deflate")
    for end in (4, 20, 200, len(path.read_bytes()) - 30):
        (tmp_path / "cut.tif").write_bytes(path.read_bytes()[:end])
        with pytest.raises(READ_ERRORS), open_windows(tmp_path / "cut.tif", None) as windows:
            windows.read(Tile(0, 0, 64, 128))


def test_without_the_package_of_decoders_pillow_reads_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "image.tif"
    tifffile.imwrite(path, noise(60, 50, "RGB"), compression="deflate", tile=(16, 16))
    monkeypatch.setitem(sys.modules, "imagecodecs", None)
    assert_same_pixels(path, whole=True)


@pytest.mark.parametrize(
    ("tag", "compression"),
    [("TileByteCounts", "deflate"), ("TileOffsets", "deflate"), ("TileOffsets", None)],
)
def test_a_number_beyond_the_file_is_an_error_of_reading(
    tag: str, compression: str | None, tmp_path: Path
) -> None:
    path = tmp_path / "image.tif"
    tifffile.imwrite(path, noise(128, 64, "RGB"), compression=compression, tile=(64, 64),
                     bigtiff=True)  # fmt: skip
    overwrite(path, tag, [2**50, 2**50])
    with open_windows(path, None) as windows, pytest.raises(READ_ERRORS):
        windows.read(Tile(0, 0, 64, 64))


def overwrite(path: Path, tag: str, values: list[int]) -> None:
    """Put other numbers into a BigTIFF."""
    with tifffile.TiffFile(path, mode="r+b") as tiff:
        tiff.pages[0].tags[tag].overwrite(values, dtype="Q")


def test_parts_keep_no_more_than_their_pixels_in_memory(tmp_path: Path) -> None:
    path, count = tmp_path / "image.tif", 16
    tifffile.imwrite(path, noise(64 * count, 64, "RGB"), tile=(64, 64), bigtiff=True)
    expected = read_rgb(path, None)
    with path.open("ab") as file:
        file.write(bytes(2**22))
    overwrite(path, "TileByteCounts", [2**22] * count)
    tracemalloc.start()
    with open_windows(path, None) as windows:
        for top in range(0, 64 * count, 64):
            pixels = windows.read(Tile(0, top, 64, top + 64)).permute(1, 2, 0).numpy()
            assert np.array_equal(pixels, np.asarray(expected.crop((0, top, 64, top + 64))))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**22


@pytest.mark.parametrize("kind", ["baseline", "progressive"])
def test_a_jpeg_larger_than_its_part_is_not_decoded(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "image.tif"
    tifffile.imwrite(path, noise(128, 64, "RGB"), compression="jpeg", photometric="ycbcr",
                     tile=(64, 64))  # fmt: skip
    content = bytearray(path.read_bytes())
    at = content.find(b"\xff\xc0", tifffile.TiffFile(path).pages[0].dataoffsets[0])
    content[at + 5 : at + 9] = (3000).to_bytes(2, "big") * 2
    if kind == "progressive":
        content[at + 1] = 0xC2
    path.write_bytes(content)
    tracemalloc.start()
    with open_windows(path, None) as windows:
        assert not windows.whole
        with pytest.raises(READ_ERRORS):
            windows.read(Tile(0, 0, 64, 64))
        windows.read(Tile(0, 64, 64, 128))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**22 < 3000 * 3000 * 3


@pytest.mark.parametrize("compression", ["webp", "png", "jpeg2000", "jpegxl", "lerc"])
def test_parts_that_state_their_own_size_are_left_to_pillow(
    compression: str, tmp_path: Path
) -> None:
    path = tmp_path / "image.tif"
    tifffile.imwrite(path, noise(64, 64, "RGB"), compression=compression, tile=(64, 64))
    try:
        with open_windows(path, None) as windows:
            assert windows.whole
    except READ_ERRORS:  # its libtiff has not every decoder
        with pytest.raises(READ_ERRORS):
            read_rgb(path, None)
