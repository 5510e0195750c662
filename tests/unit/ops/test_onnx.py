"""The op in an exported ONNX graph, computed by ONNX's own reference implementation."""

from pathlib import Path

import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from packaging.version import Version
from torch import Tensor

from ops import MSDeformAttn

SHAPES = ((4, 6), (2, 3))
# before 2.8 the new exporter did not say that it was exporting (`torch.onnx.is_in_onnx_export`)
NEW_EXPORTER = Version(torch.__version__) >= Version("2.8")


class Attend(torch.nn.Module):
    """The attention module with its level sizes settled, as an exported detector has them."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = MSDeformAttn(16, n_levels=2, n_heads=2, n_points=2)
        torch.nn.init.normal_(self.attention.sampling_offsets.weight, std=0.2)
        torch.nn.init.normal_(self.attention.attention_weights.weight)

    def forward(self, query: Tensor, reference: Tensor, tokens: Tensor) -> Tensor:
        """Attend on the settled levels."""
        output: Tensor = self.attention(query, reference, tokens, SHAPES)
        return output


@pytest.mark.long
@pytest.mark.parametrize("numbers", [2, 4])
def test_an_exported_graph_has_standard_operators_and_the_same_result(
    numbers: int, tmp_path: Path
) -> None:
    model = Attend().eval()
    inputs = (torch.randn(1, 5, 16), torch.rand(1, 5, 2, numbers), torch.randn(1, 30, 16))
    path = tmp_path / "attend.onnx"
    torch.onnx.export(model, inputs, path, dynamo=NEW_EXPORTER, opset_version=20)
    graph = onnx.load(path).graph
    assert {node.domain for node in graph.node} == {""}
    assert "GridSample" in {node.op_type for node in graph.node}
    named = {i.name: t.numpy() for i, t in zip(graph.input, inputs, strict=True)}
    (found,) = ReferenceEvaluator(str(path)).run(None, named)
    torch.testing.assert_close(torch.from_numpy(found), model(*inputs), rtol=1e-4, atol=1e-5)
