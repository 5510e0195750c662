"""Measure how many changed copies `check` finds, and what it calls alike among real images.

    python -m tests.benchmarks.alike FOLDER ... [--many N]

Each image of the folders is changed in several ways, and each changed version is searched for among
the unchanged images: recall is the share whose own original is found. Pairs among the unchanged
images are counted by folder. `--many N` times the search among N generated images, of which every
hundredth is a changed copy.
"""

import argparse
import io
import resource
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageOps
from scipy.ndimage import gaussian_filter

from datasets.checks.alike import find_alike
from datasets.images import SMALL_SIDE, is_image, small_grey

Small = NDArray[np.uint8]


def cropped(image: Image.Image, share: float) -> Image.Image:
    """Return an image without a share of each side at both ends."""
    x, y = round(image.width * share), round(image.height * share)
    return image.crop((x, y, image.width - x, image.height - y))


def coded(image: Image.Image, quality: int) -> Image.Image:
    """Return an image as JPEG leaves it."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file).convert("RGB")


CHANGES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "half the size": lambda im: im.resize((im.width // 2, im.height // 2)),
    "a fifth of the size": lambda im: im.resize((im.width // 5, im.height // 5)),
    "416 x 416": lambda im: im.resize((416, 416)),
    "JPEG quality 40": lambda im: coded(im, 40),
    "mirrored": ImageOps.mirror,
    "brightness x 1.25": lambda im: ImageEnhance.Brightness(im).enhance(1.25),
    "brightness x 0.75": lambda im: ImageEnhance.Brightness(im).enhance(0.75),
    "grey": lambda im: im.convert("L").convert("RGB"),
    "half, mirrored, quality 40": lambda im: coded(
        ImageOps.mirror(im.resize((im.width // 2, im.height // 2))), 40
    ),
    "2 % cropped": lambda im: cropped(im, 0.02),
    "5 % cropped": lambda im: cropped(im, 0.05),
}


def main() -> None:
    """Print recall for each change, then pairs among the images as they are."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("folders", nargs="*", type=Path)
    parser.add_argument("--many", type=int, default=0)
    options = parser.parse_args()
    if options.folders:
        measure(options.folders)
    if options.many:
        time_many(options.many)


def measure(folders: list[Path]) -> None:
    """Print what is found in the images of folders."""
    files = [(folder, p) for folder in folders for p in sorted(folder.rglob("*")) if is_image(p)]
    changed: dict[str, list[bytes]] = {name: [] for name in CHANGES}
    originals = []
    for _, path in files:
        with Image.open(path) as opened:
            image = opened.convert("RGB")
        originals.append(small_grey(image, 1))
        for name, change in CHANGES.items():
            changed[name].append(small_grey(change(image), 1))
    print(f"{len(files)} images")
    for name, versions in changed.items():
        pairs = list(find_alike(stacked([*originals, *versions])))
        own = {p.first: p for p in pairs if p.second == p.first + len(files)}
        copies = sum(pair.is_copy for pair in own.values())
        print(f"{name}: {len(own) / len(files):.1%} found, {copies / len(files):.1%} as copies")
    within: Counter[str] = Counter()
    alike: dict[tuple[int, int], float] = {}
    for pair in find_alike(stacked(originals)):
        key = (pair.first, pair.second)
        if key not in alike:
            one, other = (files[i][0].name for i in key)
            kind = "copies" if pair.is_copy else "alike"
            within[f"{one} {other} {kind}"] += 1
        alike[key] = pair.likeness
    print("pairs among the images as they are:", dict(within))
    for (first, second), likeness in sorted(alike.items(), key=lambda item: -item[1])[:8]:
        print(f"  {likeness:.3f} {files[first][1].name} {files[second][1].name}")


def time_many(number: int) -> None:
    """Print the time and memory of a search among generated images."""
    rng = np.random.default_rng(0)
    small = np.empty((number, SMALL_SIDE, SMALL_SIDE), dtype=np.uint8)
    for i in range(number):
        if i % 100 == 99:
            noisy = small[i - 50].astype(np.float32) + rng.normal(0, 2, small.shape[1:])
            small[i] = noisy.clip(0, 255)[:, :: rng.choice((-1, 1))]
        else:
            smooth = gaussian_filter(rng.normal(size=small.shape[1:]), rng.uniform(2, 6))
            small[i] = 128 + 45 * (smooth - smooth.mean()) / smooth.std()
    start = time.perf_counter()
    found = {pair.second for pair in find_alike(small) if pair.first == pair.second - 50}
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(
        f"{number} images: {time.perf_counter() - start:.1f} s, {memory:.2f} GB at most, "
        f"{len(found)} of {number // 100} copies found"
    )


def stacked(versions: list[bytes]) -> Small:
    """Return small versions [N,S,S]."""
    return np.frombuffer(b"".join(versions), dtype=np.uint8).reshape(-1, SMALL_SIDE, SMALL_SIDE)


if __name__ == "__main__":
    main()
