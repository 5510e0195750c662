"""The preview holds the loader's own pixels, and boxes where the targets put them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from configs.load import Values, read_options
from datasets.shapes import generate_shapes
from engine.commands.preview import PreviewOptions, main, to_image
from util.errors import ConfigError

TINY = str(Path(__file__).parents[2] / "integration" / "tiny.yaml")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def test_normalisation_is_undone_to_the_step() -> None:
    pixels = torch.arange(256, dtype=torch.uint8).repeat(3, 4, 1)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    image = (pixels.float() / 255 - mean) / std
    back = np.asarray(to_image(image, MEAN, STD))
    np.testing.assert_array_equal(back.transpose(2, 0, 1), pixels.numpy())


def test_images_of_an_epoch_are_written_with_an_overview(tmp_path: Path) -> None:
    generate_shapes(tmp_path / "data", num_train=5, num_val=1, seed=0)
    plain = {"augment": "none", "coco_path": str(tmp_path / "data"), "eval_scale": 128}
    given: Values = {
        "data": {**plain, "max_size": 400},
        "optim": {"batch_size": 1},
        "run": {"output_dir": str(tmp_path)},
    }
    config = read_options(TINY, given).config()
    assert main(config, PreviewOptions(count=4, epoch=3)) == 0
    written = sorted((tmp_path / "preview").glob("epoch3_*.png"))
    assert len(written) == 4
    assert (tmp_path / "preview" / "epoch3.png").exists()
    for path in written:
        image_id = int(path.stem.rsplit("_", 1)[1])
        source = Image.open(tmp_path / "data" / "train2017" / f"{image_id:06d}.jpg")
        seen = np.asarray(Image.open(path)).astype(int)
        resized = source.resize(seen.shape[1::-1], Image.Resampling.BILINEAR)
        apart = np.abs(seen - np.asarray(resized).astype(int)).max(axis=2)
        assert (apart <= 1).mean() > 0.5  # all but boxes and tags
        assert (apart > 60).any()


def test_folder_is_asked_for() -> None:
    with pytest.raises(ConfigError, match="output_dir: is missing"):
        main(read_options(TINY, {}).config(), PreviewOptions())
