"""DAT and DilateFormer, beside their definitions written out, and the names that their makers use.

Names and shapes were read from LeapLabTHU/DAT (models/dat.py, models/dat_blocks.py and configs/
at commit 81c67ea1589a21f7610c9bcee7e82c38aa9bd0c0) and from JIAOJIAYUASD/dilateformer
(models/dilateformer.py at commit 29c1b66f532638fb34386a8343b4dc6091d2b258).
"""

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from configs.schema import ModelConfig
from models.backbones import BackboneOptions, create_backbone
from models.backbones.dat import DAT, WindowAttention
from models.backbones.dat import Size as DATSize
from models.backbones.dilateformer import DilatedAttention, DilateFormer, GlobalAttention
from models.backbones.dilateformer import Size as DilateFormerSize
from models.backbones.published import drop_path_rates
from models.dat_attention import DATAttention
from models.levels import Joiner, PositionEmbeddingSine
from tests.unit.models.dat_definition import dat_attention_by_definition, over_channels, per_cell
from tests.unit.models.small import perturb, random_images
from util.batch import pad_images
from util.errors import CheckpointError, ConfigError

Shapes = dict[str, tuple[int, ...]]

# name: depths, width of the first stage, and the parameters of the classifier for 1000 classes
DATS = {
    "dat_tiny": ((2, 2, 6, 2), 96, (3, 6, 12, 24), (3, 6), 28_319_138),
    "dat_small": ((2, 2, 18, 2), 96, (3, 6, 12, 24), (3, 6), 49_700_402),
    "dat_base": ((2, 2, 18, 2), 128, (4, 8, 16, 32), (4, 8), 87_881_632),
}
DILATEFORMERS = {
    "dilateformer_tiny": ((2, 2, 6, 2), 72, 17_238_744),
    "dilateformer_small": ((3, 5, 8, 3), 72, 24_057_504),
    "dilateformer_base": ((4, 8, 10, 3), 96, 47_432_376),
}


def small_dat(**options: Any) -> DAT:
    size = DATSize(8, (2, 2, 2, 2), (2, 2, 4, 4), (2, 2))
    return DAT(size, BackboneOptions("", **({"frozen_stages": 0} | options)))


def small_dilateformer(**options: Any) -> DilateFormer:
    size = DilateFormerSize(12, (1, 2, 2, 1))
    return DilateFormer(size, BackboneOptions("", **({"frozen_stages": 0} | options)))


Make = Callable[..., DAT | DilateFormer]
both = pytest.mark.parametrize("make", [small_dat, small_dilateformer])


def dat_shapes(name: str) -> tuple[Shapes, Shapes]:
    """Return the parameters of the published classifier, and its other tensors."""
    depths, width, heads, groups, _ = DATS[name]
    learned: Shapes = {}
    other: Shapes = {}

    def layer(place: str, *shape: int, bias: bool = True) -> None:
        learned[f"{place}.weight"] = shape
        if bias:
            learned[f"{place}.bias"] = shape[:1]

    layer("patch_proj.0", width, 3, 4, 4)
    layer("patch_proj.1.norm", width)
    for i, depth in enumerate(depths):
        c, side = width * 2**i, 56 // 2**i
        for j in range(2 * depth):
            layer(f"stages.{i}.layer_norms.{j}.norm", c)
        for j in range(depth):
            layer(f"stages.{i}.mlps.{j}.chunk.linear1", 4 * c, c)
            layer(f"stages.{i}.mlps.{j}.chunk.linear2", c, 4 * c)
            place = f"stages.{i}.attns.{j}"
            if i >= 2 and j % 2:
                of_group, kernel = c // groups[i - 2], {2: 5, 3: 3}[i]
                layer(f"{place}.conv_offset.0", of_group, 1, kernel, kernel)
                layer(f"{place}.conv_offset.1.norm", of_group)
                layer(f"{place}.conv_offset.3", 2, of_group, 1, 1, bias=False)
                for part in "qkv":
                    layer(f"{place}.proj_{part}", c, c, 1, 1)
                layer(f"{place}.proj_out", c, c, 1, 1)
                learned[f"{place}.rpe_table"] = (heads[i], 2 * side - 1, 2 * side - 1)
            else:
                layer(f"{place}.proj_qkv", 3 * c, c)
                layer(f"{place}.proj_out", c, c)
                learned[f"{place}.relative_position_bias_table"] = (13 * 13, heads[i])
                other[f"{place}.relative_position_index"] = (49, 49)
                if j % 2:
                    other[f"{place}.attn_mask"] = ((side // 7) ** 2, 49, 49)
        if i < 3:
            layer(f"down_projs.{i}.0", 2 * c, c, 2, 2, bias=False)
            layer(f"down_projs.{i}.1.norm", 2 * c)
    layer("cls_norm.norm", 8 * width)
    layer("cls_head", 1000, 8 * width)
    return learned, other


def dilateformer_shapes(name: str) -> tuple[Shapes, Shapes]:
    """Return the parameters of the published classifier, and its other tensors."""
    depths, width, _ = DILATEFORMERS[name]
    learned: Shapes = {}
    other: Shapes = {}

    def layer(place: str, *shape: int, bias: bool = True) -> None:
        learned[f"{place}.weight"] = shape
        if bias:
            learned[f"{place}.bias"] = shape[:1]

    def batch_norm(place: str, channels: int) -> None:
        layer(place, channels)
        other.update({f"{place}.running_{k}": (channels,) for k in ("mean", "var")})
        other[f"{place}.num_batches_tracked"] = ()

    for conv, inputs, outputs in ((0, 3, 16), (3, 16, 32), (6, 32, 64), (9, 64, width)):
        layer(f"patch_embed.proj.{conv}", outputs, inputs, 3, 3, bias=False)
        if conv < 9:
            batch_norm(f"patch_embed.proj.{conv + 1}", outputs)
    for i, depth in enumerate(depths):
        c = width * 2**i
        for j in range(depth):
            place = f"stages.{i}.blocks.{j}"
            layer(f"{place}.pos_embed", c, 1, 3, 3)
            layer(f"{place}.norm1", c)
            layer(f"{place}.attn.qkv", *((3 * c, c, 1, 1) if i < 2 else (3 * c, c)))
            layer(f"{place}.attn.proj", c, c)
            layer(f"{place}.norm2", c)
            layer(f"{place}.mlp.fc1", 4 * c, c)
            layer(f"{place}.mlp.fc2", c, 4 * c)
        if i < 3:
            layer(f"stages.{i}.downsample.proj.0", 2 * c, c, 3, 3)
            batch_norm(f"stages.{i}.downsample.proj.1", 2 * c)
    layer("norm", 8 * width)
    layer("head", 1000, 8 * width)
    return learned, other


def shapes_of(name: str) -> tuple[Shapes, Shapes]:
    return dat_shapes(name) if name in DATS else dilateformer_shapes(name)


@pytest.mark.parametrize("name", [*DATS, *DILATEFORMERS])
def test_it_has_the_published_number_of_parameters(name: str) -> None:
    learned, _ = shapes_of(name)
    published = (DATS | DILATEFORMERS)[name][-1]
    assert sum(math.prod(shape) for shape in learned.values()) == published
    with torch.device("meta"):
        network = cast(nn.Module, create_backbone(name, train_norm=True))
    c = create_channels(network)[-1]
    own = {n: p.numel() for n, p in network.named_parameters() if not n.startswith("norms.")}
    assert sum(own.values()) == published - (2 * c + 1000 * c + 1000)


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "billions"),
    [("dat_tiny", 4.56), ("dilateformer_tiny", 3.16), ("dilateformer_small", 4.59),
     ("dilateformer_base", 9.92)],
)  # fmt: skip
def test_it_multiplies_as_often_as_the_makers_code(name: str, billions: float) -> None:
    """At 224 pixels. Ours has some more windows where they are shifted, and dilates in sums."""
    network = cast(nn.Module, create_backbone(name))
    assert multiplications(network) / 1e9 == pytest.approx(billions, rel=0.03)


def multiplications(network: nn.Module) -> float:
    """Return those of matrix products and convolutions, for an image of 224 pixels."""
    counter = FlopCounterMode(display=False)
    network.requires_grad_(False)  # the counter wants gradients of all that learns
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake, torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        network(torch.empty(1, 3, 224, 224))
    return counter.get_total_flops() / 2


def create_channels(network: Any) -> tuple[int, ...]:
    return tuple(network.channels)


def published_file(name: str, path: Path) -> dict[str, Tensor]:
    """Write a file such as the makers', whose tensors all differ; return its tensors."""
    learned, other = shapes_of(name)
    numbered = enumerate((learned | other).items())
    state = {key: torch.full(shape, float(i)) for i, (key, shape) in numbered}
    torch.save({"model": state, "epoch": 299}, path)
    return state


@pytest.mark.parametrize("name", ["dat_tiny", "dilateformer_tiny"])
def test_a_published_file_fills_every_tensor(name: str, tmp_path: Path) -> None:
    state = published_file(name, tmp_path / "w.pth")
    network = cast(nn.Module, create_backbone(name, weights=str(tmp_path / "w.pth")))
    found = {k: v for k, v in network.state_dict().items() if not k.startswith("norms.")}
    unused = ("cls_", "head.", "norm.")
    without = ("relative_position_index", "attn_mask", "num_batches_tracked")
    given = {k: v for k, v in state.items() if not k.startswith(unused) and not k.endswith(without)}
    assert {(float(v.max()), tuple(v.shape)) for v in found.values()} == {
        (float(v.max()), tuple(v.shape)) for v in given.values()
    }
    assert len(found) == len(given)
    samples = {
        "dat_tiny": {
            "stages.2.3.attn.conv_offset.1.bias": "stages.2.attns.3.conv_offset.1.norm.bias",
            "stages.3.1.norm1.weight": "stages.3.layer_norms.2.norm.weight",
            "stages.3.1.norm2.weight": "stages.3.layer_norms.3.norm.weight",
            "stages.0.0.mlp.linear2.bias": "stages.0.mlps.0.chunk.linear2.bias",
            "down_projs.1.1.weight": "down_projs.1.1.norm.weight",
        },
        "dilateformer_tiny": {
            key: key
            for key in ("patch_embed.proj.4.running_var", "stages.2.blocks.5.attn.qkv.weight")
        },
    }[name]
    for ours, theirs in samples.items():
        assert torch.equal(found[ours], state[theirs]), ours
    norms = [v for k, v in network.state_dict().items() if k.startswith("norms.")]
    assert len(norms) == 6
    assert all(((v == 0) | (v == 1)).all() for v in norms)


@pytest.mark.long
def test_a_file_that_does_not_fit_is_refused_in_one_line(tmp_path: Path) -> None:
    file = tmp_path / "w.pth"
    state = published_file("dilateformer_tiny", file)

    def refused(name: str = "dilateformer_tiny", weights: str = str(file)) -> str:
        with pytest.raises(CheckpointError) as error:
            create_backbone(name, weights=weights)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "'stages.0.blocks.2.attn.proj.bias' is missing, and" in refused("dilateformer_small")
    assert "does not hold dat_tiny" in refused("dat_tiny")
    assert "dat_tiny is not downloaded. Pass the file" in refused("dat_tiny", "imagenet")
    key = "stages.1.blocks.1.mlp.fc2.weight"
    for change, message in (
        ({"stages.4.weight": torch.ones(1)}, "'stages.4.weight' is not in the network, and 0 more"),
        ({key: torch.ones(3, 2)}, f"'{key}' is (3, 2), the network's (144, 576), and 0 more"),
    ):
        torch.save(state | change, file)
        assert message in refused()
    del state[key]
    torch.save(state, file)
    assert f"'{key}' is missing, and 0 more" in refused()


@torch.no_grad()
def random_dat_attention(stride: int, grid: Literal["corrected", "published"]) -> DATAttention:
    torch.manual_seed(0)
    module = DATAttention(8, heads=4, groups=2, kernel=3, table=3, stride=stride, grid=grid)
    perturb(module.double())
    cast(nn.Conv2d, module.conv_offset[3]).weight.mul_(5)
    return module


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("grid", ["corrected", "published"])
@torch.no_grad()
def test_dat_attention_is_that_of_the_paper(
    stride: int, grid: Literal["corrected", "published"]
) -> None:
    module = random_dat_attention(stride, grid)
    x = torch.randn(2, 8, 4, 5, dtype=torch.float64)
    expected = torch.stack([dat_attention_by_definition(module, image) for image in x])
    torch.testing.assert_close(module(x), expected)


@torch.no_grad()
def test_dat_attention_without_offsets_is_plain_attention() -> None:
    module = random_dat_attention(1, "corrected")
    cast(nn.Conv2d, module.conv_offset[3]).weight.zero_()
    module.rpe_table.zero_()
    plain = nn.MultiheadAttention(8, 4, batch_first=True).double()
    parts = (module.proj_q, module.proj_k, module.proj_v)
    plain.in_proj_weight.copy_(torch.cat([part.weight.flatten(1) for part in parts]))
    plain.in_proj_bias.copy_(torch.cat([cast(Tensor, part.bias) for part in parts]))
    plain.out_proj.weight.copy_(module.proj_out.weight.flatten(1))
    plain.out_proj.bias.copy_(cast(Tensor, module.proj_out.bias))
    x = torch.randn(2, 8, 4, 5, dtype=torch.float64)
    tokens = x.flatten(2).mT
    torch.testing.assert_close(module(x).flatten(2).mT, plain(tokens, tokens, tokens)[0])
    shifted = random_dat_attention(1, "published")
    shifted.load_state_dict(module.state_dict())
    assert (shifted(x) - module(x)).abs().max() > 0.01  # its points are no cells


@torch.no_grad()
def windows_by_definition(module: WindowAttention, x: Tensor) -> Tensor:
    """Attention of each cell to those of its window. Shape: [C,H,W] -> [C,H,W]."""
    channels, height, width = x.shape
    size, heads, d = module.window, module.heads, channels // module.heads
    q, k, v = per_cell(x, module.proj_qkv).chunk(3)
    table = module.relative_position_bias_table
    cells = list(itertools.product(range(height), range(width)))
    out = torch.zeros_like(x)
    for (i, j), m in itertools.product(cells, range(heads)):
        own = slice(m * d, (m + 1) * d)

        def window(y: int, x_: int) -> tuple[int, int]:
            return (y + module.before) // size, (x_ + module.before) // size

        near = [cell for cell in cells if window(*cell) == window(i, j)]
        logits = [
            q[own, i, j] @ k[own, y, x_] / d**0.5
            + table[(i - y + size - 1) * (2 * size - 1) + j - x_ + size - 1, m]
            for y, x_ in near
        ]
        weights = torch.stack(logits).softmax(0)
        values = torch.stack([v[own, y, x_] for y, x_ in near], -1)
        out[own, i, j] = values @ weights
    return per_cell(out, module.proj_out)


@pytest.mark.parametrize("shift", [0, 2])
@torch.no_grad()
def test_windows_attend_among_themselves_for_any_size(shift: int) -> None:
    torch.manual_seed(0)
    module = WindowAttention(4, 2, window=3, shift=shift).double()
    perturb(module)
    for height, width in ((6, 6), (4, 5), (1, 2)):
        x = torch.randn(1, 4, height, width, dtype=torch.float64)
        torch.testing.assert_close(module(x)[0], windows_by_definition(module, x[0]))


def dilated_by_definition(module: DilatedAttention, x: Tensor) -> Tensor:
    """Eq. 1 to 5 of DilateFormer, query by query. Shape: [C,H,W] -> [C,H,W]."""
    channels, height, width = x.shape
    heads, d = module.heads, channels // module.heads
    q, k, v = per_cell(x, module.qkv).chunk(3)
    out = []
    for m in range(heads):
        own = slice(m * d, (m + 1) * d)
        r = 1 + m * 3 // heads
        for i, j in itertools.product(range(height), range(width)):
            near = list(itertools.product((i - r, i, i + r), (j - r, j, j + r)))
            inside = [0 <= y < height and 0 <= x_ < width for y, x_ in near]
            zero = x.new_zeros(d)
            keys, values = (
                torch.stack([t[own, y, x_] if ok else zero
                             for (y, x_), ok in zip(near, inside, strict=True)])
                for t in (k, v)
            )  # fmt: skip
            out.append(values.mT @ (keys @ q[own, i, j] / d**0.5).softmax(0))
    joined = torch.stack(out).view(heads, height, width, d).permute(0, 3, 1, 2).flatten(0, 1)
    return per_cell(joined, module.proj)


@torch.no_grad()
def test_dilated_attention_is_that_of_the_paper() -> None:
    torch.manual_seed(0)
    module = DilatedAttention(12, 6).double()
    x = torch.randn(2, 12, 5, 7, dtype=torch.float64)
    expected = torch.stack([dilated_by_definition(module, image) for image in x])
    torch.testing.assert_close(module(x, None), expected)


def test_queries_keys_and_values_of_dilated_attention_learn() -> None:
    module = DilatedAttention(6, 3)
    torch.autograd.backward(module(torch.randn(1, 6, 4, 4), None).square().sum())
    assert module.qkv.weight.grad is not None
    for part in module.qkv.weight.grad.chunk(3):
        assert part.abs().min() > 0


def global_by_definition(module: GlobalAttention, x: Tensor) -> Tensor:
    """Attention of all cells to all, head by head. Shape: [C,H,W] -> [C,H,W]."""
    heads = zip(*(t.flatten(1).chunk(module.heads) for t in per_cell(x, module.qkv).chunk(3)),
                strict=True)  # fmt: skip
    found = [v @ (q.mT @ k / len(q) ** 0.5).softmax(-1).mT for q, k, v in heads]
    return per_cell(torch.cat(found).view_as(x), module.proj)


@torch.no_grad()
def test_dilateformer_is_its_definition() -> None:
    torch.manual_seed(0)
    network = small_dilateformer().double()
    perturb(network)
    state: dict[str, Tensor] = network.state_dict()
    image = torch.randn(3, 41, 54, dtype=torch.float64)

    def conv(x: Tensor, place: str, **options: Any) -> Tensor:
        return F.conv2d(x[None], state[f"{place}.weight"], state.get(f"{place}.bias"), padding=1,
                        **options)[0]  # fmt: skip

    def batch_norm(x: Tensor, place: str) -> Tensor:
        names = ("running_mean", "running_var", "weight", "bias")
        mean, var, weight, bias = (state[f"{place}.{part}"].view(-1, 1, 1) for part in names)
        return (x - mean) / (var + 1e-5).sqrt() * weight + bias

    x = image
    for i, stride in ((0, 1), (3, 2), (6, 1)):
        x = F.gelu(batch_norm(conv(x, f"patch_embed.proj.{i}", stride=stride),
                              f"patch_embed.proj.{i + 1}"))  # fmt: skip
    x = conv(x, "patch_embed.proj.9", stride=2)
    maps = []
    for i, stage in enumerate(network.stages):
        for j, block in enumerate(cast(Any, stage).blocks):
            place = f"stages.{i}.blocks.{j}"
            x = x + conv(x, f"{place}.pos_embed", groups=len(x))
            define: Any = dilated_by_definition if i < 2 else global_by_definition
            x = x + define(block.attn, over_channels(x, block.norm1))
            hidden = F.gelu(per_cell(over_channels(x, block.norm2), block.mlp.fc1))
            x = x + per_cell(hidden, block.mlp.fc2)
        if i:
            maps.append(over_channels(x, network.norms[str(i)]))
        if i < 3:
            x = conv(x, f"stages.{i}.downsample.proj.0", stride=2)
            x = batch_norm(x, f"stages.{i}.downsample.proj.1")
    found_maps = network.eval()(image[None])
    assert len(found_maps) == 3
    for found, expected in zip(found_maps, maps, strict=True):
        torch.testing.assert_close(found[0], expected)


@pytest.mark.long
@torch.no_grad()
def test_dat_is_its_definition() -> None:
    torch.manual_seed(0)
    network = small_dat().double()
    perturb(network)
    image = torch.randn(3, 42, 51, dtype=torch.float64)

    def patches(x: Tensor, layers: Any, size: int) -> Tensor:
        """Return a linear map of whole patches, which zeros complete."""
        padded = F.pad(x, (0, -x.shape[2] % size, 0, -x.shape[1] % size))
        rows, columns = padded.shape[1] // size, padded.shape[2] // size
        cut = padded.reshape(len(x), rows, size, columns, size)
        product = torch.einsum("ocyx,chywx->ohw", layers[0].weight, cut)
        if layers[0].bias is not None:
            product = product + layers[0].bias[:, None, None]
        return over_channels(product, layers[1])

    x = patches(image, network.patch_proj, 4)
    maps = []
    for i, stage in enumerate(network.stages):
        for block in cast(Any, stage):
            define: Any = windows_by_definition
            if isinstance(block.attn, DATAttention):
                define = dat_attention_by_definition
            x = x + define(block.attn, over_channels(x, block.norm1))
            hidden = F.gelu(per_cell(over_channels(x, block.norm2), block.mlp.linear1))
            x = x + per_cell(hidden, block.mlp.linear2)
        if i:
            maps.append(over_channels(x, network.norms[str(i)]))
        if i < 3:
            x = patches(x, network.down_projs[i], 2)
    for found, expected in zip(network.eval()(image[None]), maps, strict=True):
        torch.testing.assert_close(found[0], expected)


@both
@torch.no_grad()
def test_padding_changes_no_cell_of_an_image(make: Make) -> None:
    torch.manual_seed(0)
    backbone = make().double().eval()
    perturb(backbone)
    joiner = Joiner(backbone, PositionEmbeddingSine(4))
    images = random_images((45, 70), (75, 33), (66, 107))
    together = joiner(pad_images(images))[0]
    for n, image in enumerate(images):
        for alone, padded in zip(joiner(pad_images([image]))[0], together, strict=True):
            rows, columns = alone.shape[2:]
            torch.testing.assert_close(padded[n, :, :rows, :columns], alone[0])


@pytest.mark.parametrize("single", [False, True])
@both
@torch.no_grad()
def test_any_size_gives_maps_of_the_stated_channels_and_strides(make: Make, single: bool) -> None:
    backbone = make(single_level=single).eval()
    assert backbone.strides == ((32,) if single else (8, 16, 32))
    for height, width in ((75, 107), (1, 33), (224, 224)):
        maps = backbone(torch.randn(1, 3, height, width))
        assert [tuple(m.shape) for m in maps] == [
            (1, channels, math.ceil(height / stride), math.ceil(width / stride))
            for channels, stride in zip(backbone.channels, backbone.strides, strict=True)
        ]
        assert all(m.isfinite().all() for m in maps)


def gradients(backbone: nn.Module) -> dict[str, Tensor]:
    """Return those of a weighted sum of all maps of two padded images."""
    backbone.zero_grad()
    torch.manual_seed(3)
    batch = pad_images([image.float() for image in random_images((40, 64), (61, 52))])
    dtype = next(backbone.parameters()).dtype
    maps = backbone(batch.images.to(dtype), batch.mask)
    torch.autograd.backward([(m * torch.linspace(-1, 1, m.shape[1])[:, None, None]).sum()
                             for m in maps])  # fmt: skip
    return {n: p.grad.clone() for n, p in backbone.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("frozen", "learns"), [(0, 4), (1, 4), (2, 3), (5, 0)])
@pytest.mark.parametrize("name", ["dat", "dilateformer"])
def test_what_is_not_frozen_learns_and_nothing_else(
    name: str, frozen: int, learns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    module: Any = __import__(f"models.backbones.{name}", fromlist=["SIZES"])
    size = DATSize(8, (2, 2, 2, 2), (2, 2, 4, 4), (2, 2))
    monkeypatch.setitem(
        module.SIZES, "tiny", size if name == "dat" else DilateFormerSize(12, (1, 1, 1, 1))
    )
    backbone = cast(nn.Module, create_backbone(f"{name}_tiny", frozen_stages=frozen)).train()
    perturb(backbone)
    found = gradients(backbone) if learns else {}
    for key, parameter in backbone.named_parameters():
        assert (key in found) == parameter.requires_grad, key
    assert len({k.split(".")[1] for k in found if k.startswith("stages")}) in (learns, learns + 1)
    stem = [k for k in found if k.startswith("patch_")]
    assert bool(stem) == (frozen == 0)


@both
def test_activations_computed_again_give_the_same_gradients(make: Make) -> None:
    torch.manual_seed(0)
    backbone = make(drop_path=0.5, train_norm=True).train()
    perturb(backbone)
    expected = gradients(backbone)
    backbone.checkpointing = True
    found = gradients(backbone)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@both
def test_in_bfloat16_gradients_are_float32_and_near_those_of_float32(make: Make) -> None:
    torch.manual_seed(0)
    backbone = make().eval()
    expected = gradients(backbone)
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients(backbone)
    largest = max(float(value.norm()) for value in expected.values())
    for name, value in expected.items():
        assert found[name].dtype == torch.float32, name
        assert (found[name] - value).norm() < 0.2 * value.norm() + 1e-2 * largest, name


@pytest.mark.slow
@both
def test_it_compiles_as_one_graph(make: Make) -> None:
    torch.compiler.reset()
    torch.manual_seed(0)
    backbone = make().double().train()
    perturb(backbone)
    expected = gradients(backbone)
    counter = CompileCounter()
    backbone.compile(fullgraph=True, dynamic=False, backend=counter)
    for name, value in gradients(backbone).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-12, msg=name)
    assert counter.frame_count == 1


def test_blocks_are_left_out_more_often_the_deeper_they_are() -> None:
    options = BackboneOptions("", drop_path=0.3, frozen_stages=2)
    rates = drop_path_rates(options, (1, 1, 2))
    assert rates == [[0.0], [pytest.approx(0.1)], [pytest.approx(0.2), pytest.approx(0.3)]]
    backbone = small_dat(drop_path=0.9).double()
    images = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        whole = backbone.eval()(images)
        assert all(torch.equal(a, b) for a, b in zip(backbone(images), whole, strict=True))
        assert not torch.equal(backbone.train()(images)[-1], whole[-1])


def test_wrong_options_are_errors_of_one_line() -> None:
    for name, options, message in (
        ("dat_tin", {}, "backbone dat_tin: there is no such size. Did you mean 'dat_tiny'?"),
        ("dilateformer_large", {}, "backbone dilateformer_large: there is no such size."),
        ("dat_tiny", {"dilation": True}, "dilation: not for dat_tiny. Use a torchvision ResNet."),
        ("dilateformer_tiny", {"dcn": "v1"}, "dcn: not for dilateformer_tiny."),
        ("resnet18", {"drop_path": 0.1}, "drop_path: has no effect on a ResNet"),
    ):
        with pytest.raises(ConfigError) as error:
            create_backbone(name, **cast(Any, options))
        assert str(error.value).startswith(message)
    with pytest.raises(ConfigError, match="dat_stride: has no effect without `backbone dat_tiny`"):
        ModelConfig(dat_stride=2)


def test_padding_is_a_key_for_nobody_in_global_attention() -> None:
    torch.manual_seed(0)
    module = GlobalAttention(6, 3).double()
    x = torch.randn(1, 6, 2, 3, dtype=torch.float64)
    padding = torch.tensor([[[False, False, True], [True, True, True]]])
    torch.testing.assert_close(module(x, padding)[:, :, :1, :2], module(x[:, :, :1, :2], None))
