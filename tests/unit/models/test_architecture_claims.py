"""What docs/architectures.md claims of the architectures, counted and compared."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from torchvision.ops import deform_conv2d

from models.decoder import DeformableDecoderLayer
from models.encoders import ENCODERS, EncoderOptions
from models.levels import FeatureLevels, join_levels
from ops import MSDeformAttn

C, F, M, K = 48, 96, 6, 4  # width, hidden width, heads, points
CLASSES = 7
SIZES = [(16, 16), (16, 32), (48, 32), (80, 112)]  # multiples of 16, as windows pad to those
Shapes = list[tuple[int, int]]


def test_deformable_attention_of_nine_heads_is_a_deformable_convolution() -> None:
    """One level, one point: its weight is 1, so that what is left of a head is where it looks."""
    torch.manual_seed(0)
    inputs, outputs, height, width = 3, 5, 6, 7
    attention = MSDeformAttn(9 * inputs, n_levels=1, n_heads=9, n_points=1).double()
    kernel = torch.randn(outputs, inputs, 3, 3).double()
    bias = torch.randn(outputs).double()
    grid = torch.stack(torch.meshgrid(*[torch.arange(-1, 2)] * 2, indexing="xy"), -1)  # (x, y)
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.zero_()
        attention.sampling_offsets.bias.copy_(grid.reshape(-1))  # a head looks at its neighbour
        attention.sampling_offsets.weight[:, :18].copy_(torch.eye(18))  # moved by the query
        for head in range(9):  # every head reads the whole value
            own = slice(head * inputs, (head + 1) * inputs)
            attention.value_proj.weight[own, :inputs].copy_(torch.eye(inputs))
            attention.output_proj.weight[:outputs, own] = kernel[:, :, head // 3, head % 3]
        attention.output_proj.bias[:outputs] = bias
        attention.attention_weights.weight.normal_()  # softmax of one number does not read it
    x = torch.randn(2, inputs, height, width).double()
    moved = torch.randn(2, 9, 2, height, width).double() * 2  # (y, x) of each kernel position
    expected = deform_conv2d(x, moved.flatten(1, 2), kernel, bias, padding=1)

    cells = [(torch.arange(size).double() + 0.5) / size for size in (height, width)]
    y, x_centres = torch.meshgrid(*cells, indexing="ij")
    references = torch.stack([x_centres, y], -1).view(1, -1, 1, 2).expand(2, -1, -1, -1)
    query = torch.zeros(2, height * width, 9 * inputs).double()
    query[..., :18] = moved.flip(2).flatten(1, 2).flatten(2).mT  # (x, y)
    value = torch.zeros_like(query)
    value[..., :inputs] = x.flatten(2).mT
    found = attention(query, references, value, [(height, width)])[..., :outputs]
    torch.testing.assert_close(found.mT.view_as(expected), expected)


def levels_of(shapes: Shapes) -> FeatureLevels:
    """Return levels of one image, whose numbers do not matter."""
    maps = [torch.empty(1, C, *shape) for shape in shapes]
    masks = [torch.empty(1, *shape, dtype=torch.bool) for shape in shapes]
    return join_levels(maps, masks, maps, torch.empty(len(shapes), C))


def products(run: Callable[[], object]) -> int:
    """Return the multiplications of matrix products and convolutions."""
    counter = FlopCounterMode(display=False)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake, torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        run()  # on tensors that have shapes alone
    return counter.get_total_flops() // 2


def counted(attention: str, shapes: Shapes, dat_stride: int = 1) -> int:
    """Return the multiplications of a layer's attention, without the feed-forward block."""
    options = EncoderOptions(
        d_model=C, num_layers=1, d_ffn=F, dropout=0.0, n_levels=len(shapes), n_heads=M, n_points=K,
        attention=attention, dat_stride=dat_stride, num_classes=CLASSES,
    )  # fmt: skip
    tokens = sum(height * width for height, width in shapes)
    encoder = ENCODERS["enhancer" if attention == "enhancer" else "mixed"](options)
    encoder.requires_grad_(False)  # the counter wants gradients of all that learns
    whole = products(lambda: encoder(levels_of(shapes)))
    return whole - 2 * tokens * C * F


@pytest.mark.long
@pytest.mark.parametrize("size", SIZES)
def test_products_of_attention_in_the_encoder(size: tuple[int, int]) -> None:
    """Of deformable attention the projections count: its sampling multiplies no matrices."""
    hw = size[0] * size[1]
    # value and output, then offsets and weights: 3 M K of them (Appendix A.1)
    assert counted("deformable", [size]) == 2 * hw * C**2 + 3 * hw * M * K * C
    # queries, keys, values and output, then every pair twice: logits, and the sum of values
    assert counted("dense", [size]) == 4 * hw * C**2 + 2 * hw**2 * C
    pairs = sum(2 * hw * window**2 * C for window in (4, 8, 16))
    assert counted("mswin", [size]) == 3 * 4 * hw * C**2 + pairs + 4 * C**2
    assert counted("msda", [size]) == 4 * hw * C**2  # logits of nine pairs are no matrix product
    for stride in (1, 4):
        points = hw // stride**2  # keys, values and the offset network's 25 + 2 weights a channel
        projections = 2 * hw * C**2 + 2 * points * C**2 + 27 * points * C
        assert counted("dat", [size], stride) == projections + 2 * hw * points * C


def test_products_of_deformable_attention_over_several_levels() -> None:
    shapes = [(16, 32), (8, 16), (4, 8), (2, 4)]
    tokens = sum(height * width for height, width in shapes)
    expected = 2 * tokens * C**2 + 3 * tokens * M * len(shapes) * K * C
    assert counted("deformable", shapes) == expected


@pytest.mark.long
@pytest.mark.parametrize("size", SIZES)
def test_products_of_the_enhancer(size: tuple[int, int]) -> None:
    """Image and classes meet in half of the hidden width, in both directions."""
    hw = size[0] * size[1]
    meeting = 3 * (hw + CLASSES) * C * (F // 2) + 4 * hw * CLASSES * (F // 2)
    among_classes = 4 * CLASSES * C**2 + 2 * CLASSES**2 * C + 2 * CLASSES * C * (F // 2)
    deformable = counted("deformable", [size])
    assert counted("enhancer", [size]) == meeting + among_classes + deformable


@pytest.mark.long
def test_cost_grows_with_the_cells_and_that_of_dense_attention_with_their_square() -> None:
    small, large = [(32, 32)], [(128, 128)]  # sixteen times the cells
    for attention in ("deformable", "mswin", "msda"):
        growth = counted(attention, large) / counted(attention, small)
        assert growth == pytest.approx(16, rel=0.01), attention
    # of a map of 128 x 128 cells nearly all is pairs
    assert counted("dense", large) / counted("dense", small) > 16**2 * 0.9


def test_products_of_cross_attention_in_the_decoder() -> None:
    """Each level is projected once for all queries: the cost of queries is not that of cells."""
    for queries, size in ((10, (16, 16)), (300, (16, 16)), (300, (40, 64))):
        hw = size[0] * size[1]

        def cross_attention(queries: int = queries, size: tuple[int, int] = size) -> None:
            layer = DeformableDecoderLayer(
                C, d_ffn=F, dropout=0.0, n_levels=1, n_heads=M, n_points=K
            )
            points = torch.empty(1, queries, 1, 2)
            memory = torch.empty(1, size[0] * size[1], C)
            layer.cross_attn(torch.empty(1, queries, C), points, memory, [size])

        found = products(cross_attention)
        # 2 N_q C^2 + min(HW C^2, N_q K C^2) in the paper; we always project all cells
        assert found == hw * C**2 + queries * C**2 + 3 * queries * M * K * C


def stacked_samples(offset_scale: float) -> int:
    """Return how many cells two stacked 3x3 convolutions read for one output, with offsets."""
    torch.manual_seed(0)
    x = torch.zeros(1, 1, 41, 41, dtype=torch.float64, requires_grad=True)
    offsets = [torch.randn(1, 18, 41, 41).double() * offset_scale for _ in range(2)]
    offsets = [offset.round() for offset in offsets]  # whole cells: each sample reads one
    kernel = torch.rand(1, 1, 3, 3).double() + 0.1
    y: Tensor = deform_conv2d(x, offsets[0], kernel, padding=1)
    z: Tensor = deform_conv2d(y, offsets[1], kernel, padding=1)
    (gradient,) = torch.autograd.grad(z[0, 0, 20, 20], x)
    return int((gradient != 0).sum())


def test_two_deformable_layers_see_up_to_81_places_and_plain_ones_25() -> None:
    assert stacked_samples(0.0) == 25
    assert 25 < stacked_samples(3.0) <= 81


def test_weights_of_deformable_attention_are_no_products_of_queries_and_keys() -> None:
    """They come of the query alone: the result is linear in what is looked at, as a sum is."""
    torch.manual_seed(0)
    attention = MSDeformAttn(C, n_levels=1, n_heads=M, n_points=K).double()
    torch.nn.init.normal_(attention.attention_weights.weight)
    query, references = torch.randn(1, 5, C).double(), torch.full((1, 5, 1, 2), 0.5).double()
    first, second = torch.randn(2, 1, 64, C).double()
    found, *parts = (
        attention(query, references, value, [(8, 8)]) for value in (first + second, first, second)
    )
    torch.testing.assert_close(found, parts[0] + parts[1])
    dense = torch.nn.MultiheadAttention(C, M, batch_first=True).double()
    found, *parts = (dense(query, v, v)[0] for v in (first + second, first, second))
    assert not torch.allclose(found, parts[0] + parts[1], rtol=0.1)
