"""Images of every format that Pillow reads, nearly sound."""

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from datasets.checks.images import examine_file
from datasets.images import READ_ERRORS, read_header, read_reduced, read_rgb
from datasets.tiles import Tile
from datasets.windows import open_windows
from tests.fuzz.mutations import fuzzed, mutated, only_refused
from tests.fuzz.samples import IMAGES, image_bytes

TIFFS = [
    image_bytes("tiff", mode, compression=compression)
    for mode in ("L", "RGB", "I;16")
    for compression in (None, "tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg")
    if (mode, compression) != ("I;16", "jpeg")
]


@fuzzed
@given(data=st.data())
def test_images(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "x"
    path.write_bytes(data.draw(mutated(IMAGES)))
    with only_refused():
        read_header(path)
    with only_refused(*READ_ERRORS):
        assert read_rgb(path, None).mode == "RGB"
    with only_refused(*READ_ERRORS):
        read_reduced(path, (40, 30), lambda height, width: (height // 2, width // 2))
    with only_refused():
        assert examine_file(path).state in ("sound", "truncated", "unreadable")


@fuzzed
@given(data=st.data())
def test_windows(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "x"
    path.write_bytes(data.draw(mutated([*IMAGES, *TIFFS * 3])))
    with only_refused(*READ_ERRORS), open_windows(path, None) as windows:
        height, width = windows.size
        for left, top in ((0, 0), (max(0, width - 99), max(0, height - 99))):
            tile = Tile(left, top, min(left + 99, width), min(top + 99, height))
            shape = (3, tile.bottom - tile.top, tile.right - tile.left)
            assert windows.read(tile).shape == shape
