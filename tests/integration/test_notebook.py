"""The notebook of docs/ runs, on a small detector in place of the demo's."""

import json
import shutil
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import pytest
import torch

from models.weights.load import load_pretrained
from tests.integration.conftest import ROOT


@pytest.mark.long
def test_every_cell_of_the_tour_runs(
    finished_run: Path,
    shapes: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"needs {package}")
    (tmp_path / "runs" / "demo").mkdir(parents=True)
    shutil.copy(finished_run / "last.pth", tmp_path / "runs" / "demo")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "shapes").symlink_to(shapes)
    monkeypatch.chdir(tmp_path)
    matplotlib.use("agg")
    cells = json.loads((ROOT / "docs" / "tour.ipynb").read_text(encoding="utf-8"))["cells"]
    names: dict[str, Any] = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
    printed = capsys.readouterr().out
    assert "query" in printed
    assert len(plt.get_fignums()) == 2
    plt.close("all")
    # `explain` looks where the hook saw the layer look
    assert names["explained"].query == names["q"]
    assert names["difference"] < 1e-3
    steps = (names["folder"] / "metrics.jsonl").read_text().splitlines()
    assert len(steps) == 10
    before, after = (load_pretrained(str(path)).state_dict for path in (
        finished_run / "last.pth", names["folder"] / "last.pth"
    ))  # fmt: skip
    assert before.keys() == after.keys()
    assert not all(before[key].equal(after[key]) for key in before)
    assert "proof in onnxruntime" in printed
    assert Path(names["exported"]).is_file()
    # the hook's points and weights, put together by interpolation, are what the layer gave
    attention, (query, reference, memory, shapes_of_levels) = (
        names["attention"], names["seen"]["inputs"][:4]
    )  # fmt: skip
    with torch.no_grad():
        value = attention.value_proj(memory)
        expected = attention(query, reference, memory, shapes_of_levels)
        heads = value.view(*value.shape[:2], attention.n_heads, -1)
        found = torch.zeros(*query.shape[:2], *heads.shape[2:])
        start = 0
        for level, (height, width) in enumerate(shapes_of_levels):
            part = heads[:, start : start + height * width].permute(0, 2, 3, 1)
            start += height * width
            maps = part.reshape(-1, part.shape[2], height, width)
            grid = 2 * names["locations"][:, :, :, level].permute(0, 2, 1, 3, 4).flatten(0, 1) - 1
            samples = torch.nn.functional.grid_sample(maps, grid, align_corners=False)
            weights = names["weights"][:, :, :, level].permute(0, 2, 1, 3).flatten(0, 1)
            summed = (samples * weights[:, None]).sum(-1)  # [N * heads, D, Q]
            found += summed.view(len(query), attention.n_heads, -1, query.shape[1]).permute(
                0, 3, 1, 2
            )
        torch.testing.assert_close(
            attention.output_proj(found.flatten(2)), expected, rtol=1e-4, atol=1e-5
        )
