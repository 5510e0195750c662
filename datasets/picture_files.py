"""Which files are taken for pictures where a folder is searched."""

from pathlib import Path

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")


def is_picture(path: Path) -> bool:
    """Tell whether a file's name says that it is a picture."""
    return path.suffix.lower() in SUFFIXES and path.is_file()
