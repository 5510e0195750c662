"""Names, what they stand for, and when their files are imported."""

import sys
from pathlib import Path

import pytest

from util.errors import ConfigError
from util.registry import Registry


def test_an_entry_is_what_was_registered() -> None:
    registry: Registry[type] = Registry("shape", None, {})
    assert registry.register("round")(int) is int
    assert registry["round"] is int
    assert list(registry) == ["round"]


def test_a_name_can_be_registered_once() -> None:
    registry: Registry[type] = Registry("shape", None, {})
    registry.register("round")(int)
    with pytest.raises(ValueError, match="shape 'round' is already registered"):
        registry.register("round")(int)


def test_an_unknown_name_gets_the_nearest() -> None:
    registry: Registry[type] = Registry("shape", None, {"square": "nowhere"})
    registry.register("round")(int)
    with pytest.raises(ConfigError, match=r"shape rond: does not exist. Did you mean 'round'\?"):
        registry["rond"]
    with pytest.raises(ConfigError, match=r"does not exist. Known: round, square\."):
        registry["xyz"]


def test_a_file_is_imported_when_its_name_is_first_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "shapes_to_register"
    package.mkdir()
    (package / "__init__.py").write_text(
        "from util.registry import Registry\n"
        "SHAPES = Registry('shape', __name__, {'square': '.corners', 'oval': '.corners'})\n"
    )
    (package / "corners.py").write_text(
        "from shapes_to_register import SHAPES\nSHAPES.register('square')(4)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    from shapes_to_register import SHAPES  # type: ignore[import-not-found]

    assert list(SHAPES) == ["oval", "square"]
    assert "shapes_to_register.corners" not in sys.modules
    assert SHAPES["square"] == 4
    assert "shapes_to_register.corners" in sys.modules
    with pytest.raises(ConfigError, match=r"shape oval: .*corners\.py registers no such name\."):
        SHAPES["oval"]
