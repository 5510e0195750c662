"""Images of every format that Pillow reads, nearly sound."""

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from datasets.checks.images import examine_file
from datasets.images import READ_ERRORS, read_header, read_reduced, read_rgb
from tests.fuzz.mutations import fuzzed, mutated, only_refused
from tests.fuzz.samples import IMAGES


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
