"""What encoder layers attend with besides deformable attention, against definitions in loops."""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DetrConfig
from transformers.models.detr.modeling_detr import DetrEncoderLayer

from engine.attention_memory import attention_bytes, level_shapes
from models.build import build_model
from models.encoders import ENCODERS, Encoder, EncoderOptions
from models.encoders.dat import DATEncoderAttention
from models.encoders.mixed import MixedEncoderLayer
from models.encoders.msda import MSDA, MSDAttention
from models.encoders.mswin import WINDOWS, MSwin, SplitAttention, WindowAttention
from models.levels import FeatureLevels, cell_centres, join_levels
from tests.unit.models.dat_definition import dat_attention_by_definition
from tests.unit.models.small import perturb, random_images, small_config, small_model
from util.batch import pad_images
from util.errors import ConfigError

WIDTH, HEADS = 48, 6
SHAPES = [(9, 19), (5, 10), (3, 5)]
VALID = [(7, 12), (4, 7), (2, 4)]  # of the second image
ALONE = ["dense", "mswin", "msda", "dat"]
ALL = [*ALONE, *(f"{name}+deformable" for name in ALONE), "msda+mswin+dense"]


def encoder(attention: str, **options: Any) -> Encoder:
    """Return a perturbed float64 encoder of three levels."""
    torch.manual_seed(0)
    values: dict[str, Any] = {
        "d_model": WIDTH, "num_layers": 2, "d_ffn": 24, "dropout": 0.0, "n_levels": 3,
        "n_heads": HEADS, "n_points": 2, "attention": attention,
    }  # fmt: skip
    made = ENCODERS["mixed"](EncoderOptions(**(values | options))).double()
    perturb(made)
    return made


def random_maps(seed: int, count: int) -> list[list[Tensor]]:
    """Return lists of random maps of all levels, of two images."""
    torch.manual_seed(seed)
    return [[torch.randn(2, WIDTH, *s).double() for s in SHAPES] for _ in range(count)]


def padded_levels(features: list[Tensor], pos: list[Tensor]) -> FeatureLevels:
    """Return the levels of two images, the second of which is padded at the right and below."""
    masks = [torch.zeros(2, *shape, dtype=torch.bool) for shape in SHAPES]
    for mask, (height, width) in zip(masks, VALID, strict=True):
        mask[1, height:], mask[1, :, width:] = True, True
    return join_levels(features, masks, pos, torch.zeros(3, WIDTH).double())


def second_image(levels: FeatureLevels, tokens: Tensor) -> Tensor:
    """Return the unpadded tokens of the second image."""
    return tokens[1][~levels.padding_mask[1]]


@pytest.mark.long
@pytest.mark.parametrize("attention", ALL)
def test_padding_changes_nothing(attention: str) -> None:
    features, pos = random_maps(1, 2)
    model, levels = encoder(attention), padded_levels(features, pos)
    expected = model(levels)
    assert expected.isfinite().all()
    other_features, other_pos = random_maps(2, 2)
    for kept, new in zip(features + pos, other_features + other_pos, strict=True):
        height, width = VALID[SHAPES.index((kept.shape[2], kept.shape[3]))]
        new[1, :, :height, :width] = kept[1, :, :height, :width]
        new[0] = kept[0]
    noisy = padded_levels(other_features, other_pos)
    found = model(noisy)
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(second_image(levels, found), second_image(levels, expected))


@pytest.mark.parametrize("attention", ALONE)
def test_an_image_computes_the_same_alone(attention: str) -> None:
    features, pos = random_maps(1, 2)
    model, levels = encoder(attention), padded_levels(features, pos)
    together = second_image(levels, model(levels))
    cut = [
        [m[1:, :, :height, :width] for m, (height, width) in zip(maps, VALID, strict=True)]
        for maps in (features, pos)
    ]
    masks = [torch.zeros(1, *size, dtype=torch.bool) for size in VALID]
    alone = join_levels(cut[0], masks, cut[1], torch.zeros(3, WIDTH).double())
    torch.testing.assert_close(model(alone)[0], together)


@pytest.mark.parametrize("attention", ALL)
def test_only_deformable_attention_joins_the_levels(attention: str) -> None:
    features, pos = random_maps(1, 2)
    model = encoder(attention)
    before = model(padded_levels(features, pos))
    features[2] = features[2] + 1
    after = model(padded_levels(features, pos))
    finer = sum(h * w for h, w in SHAPES[:2])
    joined = not torch.equal(before[:, :finer], after[:, :finer])
    assert joined == attention.endswith("deformable")
    assert not torch.equal(before[:, finer:], after[:, finer:])


@pytest.mark.parametrize("attention", ALL)
def test_every_parameter_learns(attention: str) -> None:
    """Also queries, keys and values: the published listing of MSDA detaches all three."""
    model = encoder(attention)
    features, pos = random_maps(1, 2)
    model(padded_levels(features, pos)).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name
        if name.endswith(("qkv.weight", "qkv.bias", "to_qkv.weight", "in_proj_weight")):
            parts = zip("qkv", parameter.grad.chunk(3), strict=True)
            still = [part for part, gradient in parts if gradient.abs().max() < 1e-9]
            # a bias of all keys moves all logits of a query alike, but for those of the border
            assert not still or (still == ["k"] and name.endswith("bias")), name


def test_after_other_attention_the_layer_is_the_paper_s() -> None:
    torch.manual_seed(0)
    features, pos = random_maps(1, 2)
    levels = padded_levels(features, pos)
    mixed, plain = encoder("mswin+deformable", num_layers=1), encoder("deformable", num_layers=1)
    state = {k: v for k, v in mixed.state_dict().items() if ".before." not in k}
    plain.load_state_dict(state)
    (layer,) = mixed.get_submodule("layers").children()
    assert isinstance(layer, MixedEncoderLayer)
    x = layer.before[0](levels.tokens, levels)
    (paper,) = plain.get_submodule("layers").children()
    expected = paper(x, levels.pos, cell_centres(levels), x, levels)
    assert torch.equal(mixed(levels), expected)
    assert state.keys() == ENCODERS["deformable"](_options(num_layers=1)).state_dict().keys()


def _options(**options: Any) -> EncoderOptions:
    values: dict[str, Any] = {
        "d_model": WIDTH, "num_layers": 2, "d_ffn": 24, "dropout": 0.0, "n_levels": 3,
        "n_heads": HEADS, "n_points": 2,
    }  # fmt: skip
    return EncoderOptions(**(values | options))


def test_dense_layers_are_those_of_hugging_face_s_detr() -> None:
    torch.manual_seed(0)
    values: dict[str, Any] = {
        "d_model": WIDTH, "encoder_attention_heads": HEADS, "encoder_ffn_dim": 24, "dropout": 0.0,
        "attn_implementation": "eager",
    }  # fmt: skip
    config = DetrConfig(**values)
    theirs = DetrEncoderLayer(config).double().eval()
    (ours,) = encoder("dense", num_layers=1).eval().get_submodule("layers").children()
    names = {"norm1": "self_attn_layer_norm", "norm2": "final_layer_norm"}
    state = theirs.state_dict()
    target = {}
    for key in ours.state_dict():
        if ".in_proj_" in key:
            kind = key.rsplit("_", 1)[1]
            target[key] = torch.cat([state[f"self_attn.{part}_proj.{kind}"] for part in "qkv"])
            continue
        place = key.replace("self_attn.attn.out_proj", "self_attn.out_proj")
        for name, new in names.items():
            place = place.replace(name, new)
        candidates = [
            place,
            place.replace("self_attn.out_proj", "self_attn.o_proj"),
            place.replace("linear", "fc"),
            place.replace("linear", "mlp.fc"),
        ]
        target[key] = next(state[c] for c in candidates if c in state)
    ours.load_state_dict(target)
    features, pos = random_maps(1, 2)
    levels = padded_levels(features, pos)
    start = 0
    found = ours(levels.tokens, levels.pos, cell_centres(levels), levels.tokens, levels)
    for height, width in SHAPES:
        part = slice(start, start := start + height * width)
        mask = levels.padding_mask[:, None, None, part]
        bias = torch.zeros_like(mask, dtype=torch.float64).masked_fill(mask, -math.inf)
        given = levels.tokens[:, part], bias.expand(-1, -1, height * width, -1)
        expected = theirs(*given, levels.pos[:, part])
        expected = expected[0] if isinstance(expected, tuple) else expected
        valid = ~levels.padding_mask[:, part]
        torch.testing.assert_close(found[:, part][valid], expected[valid])


def test_window_attention_is_its_definition_in_loops() -> None:
    torch.manual_seed(0)
    window, heads, width = 2, 2, 4
    module = WindowAttention(width, window=window, heads=heads).double()
    perturb(module)
    x, pos = torch.randn(2, 1, 4, 6, width).double()
    mask = torch.zeros(1, 4, 6, dtype=torch.bool)
    mask[0, 3], mask[0, :, 4:] = True, True
    found = module(x, pos, mask)
    weight_q, weight_k, weight_v = module.to_qkv.weight.chunk(3)
    for row, column in itertools.product(range(3), range(4)):
        corner = row // window * window, column // window * window
        outputs = []
        for head in range(heads):
            own = slice(head * width // heads, (head + 1) * width // heads)
            query = (weight_q @ (x + pos)[0, row, column])[own]
            logits, values = [], []
            for dy, dx in itertools.product(range(window), range(window)):
                at = corner[0] + dy, corner[1] + dx
                if mask[0][at]:
                    continue
                key = (weight_k @ (x + pos)[0][at])[own]
                offset = at[0] - row + window - 1, at[1] - column + window - 1
                logits.append(query @ key / math.sqrt(width / heads) + module.relative[offset])
                values.append((weight_v @ x[0][at])[own])
            outputs.append((torch.stack(logits).softmax(0)[:, None] * torch.stack(values)).sum(0))
        expected = module.to_out(torch.cat(outputs))
        torch.testing.assert_close(found[0, row, column], expected)


def test_one_window_without_a_bias_is_ordinary_attention() -> None:
    torch.manual_seed(0)
    module = WindowAttention(WIDTH, window=4, heads=HEADS).double()
    ordinary = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True).double()
    with torch.no_grad():
        module.relative.zero_()
        ordinary.in_proj_weight.copy_(module.to_qkv.weight)
        ordinary.out_proj.weight.copy_(module.to_out.weight)
        ordinary.out_proj.bias.copy_(module.to_out.bias)
    x, pos = torch.randn(2, 2, 4, 4, WIDTH).double()
    tokens, query = x.flatten(1, 2), (x + pos).flatten(1, 2)
    found = module(x, pos, torch.zeros(2, 4, 4, dtype=torch.bool)).flatten(1, 2)
    torch.testing.assert_close(found, ordinary(query, query, tokens)[0])


def test_mswin_has_the_published_number_of_parameters() -> None:
    module = MSwin(256, WINDOWS)
    assert sum(p.numel() for p in module.parameters()) == 1_051_091
    x = torch.randn(1, 32, 48, 256)
    mask = torch.zeros(1, 32, 48, dtype=torch.bool)
    assert module(x, torch.zeros_like(x), mask).shape == x.shape


def test_split_attention_weighs_branches_by_channel() -> None:
    torch.manual_seed(0)
    module = SplitAttention(6, 3).double()
    perturb(module)
    maps = list(torch.randn(3, 2, 4, 5, 6).double())
    mask = torch.zeros(2, 4, 5, dtype=torch.bool)
    mask[1, :, 3:] = True
    found = module(maps, mask)
    for image in range(2):
        cells = [cell for cell in itertools.product(range(4), range(5)) if not mask[image][cell]]
        mean = sum((m[image][cell] for m in maps for cell in cells), torch.zeros(6).double())
        hidden = module.norm(module.fc1.weight @ mean / len(cells)).relu()
        logits = (module.fc2.weight @ hidden).view(3, 6)
        for cell in cells:
            expected = sum(
                logits.exp()[k] / logits.exp().sum(0) * maps[k][image][cell] for k in range(3)
            )
            torch.testing.assert_close(found[image][cell], expected)


def test_equal_branches_are_mixed_into_the_same() -> None:
    branch = torch.randn(2, 4, 5, 6).double()
    module = SplitAttention(6, 3).double()
    mixed = module([branch] * 3, torch.zeros(2, 4, 5, dtype=torch.bool))
    torch.testing.assert_close(mixed, branch)


def test_msda_is_its_definition_in_loops() -> None:
    torch.manual_seed(0)
    width, heads = 12, 6
    module = MSDA(width, heads).double()
    perturb(module)
    x, pos = torch.randn(2, 1, 5, 8, width).double()
    mask = torch.zeros(1, 5, 8, dtype=torch.bool)
    mask[0, :, 6:] = True
    found = module(x, pos, mask)
    weights, biases = module.qkv.weight.chunk(3), module.qkv.bias.chunk(3)
    q, k = (((x + pos)[0] @ weights[i].T + biases[i]) for i in (0, 1))
    v = x[0] @ weights[2].T + biases[2]
    size = width // heads
    for row, column in itertools.product(range(5), range(6)):
        outputs = []
        for head in range(heads):
            own, dilation = slice(head * size, (head + 1) * size), 1 + head * 3 // heads
            logits, values = [], []
            for dy, dx in itertools.product((-dilation, 0, dilation), repeat=2):
                at = row + dy, column + dx
                inside = 0 <= at[0] < 5 and 0 <= at[1] < 6  # zeros beyond, which take part
                key = k[at][own] if inside else torch.zeros(size).double()
                values.append(v[at][own] if inside else torch.zeros(size).double())
                logits.append(q[row, column][own] @ key / math.sqrt(size))
            outputs.append((torch.stack(logits).softmax(0)[:, None] * torch.stack(values)).sum(0))
        expected = module.proj(torch.cat(outputs))
        torch.testing.assert_close(found[0, row, column], expected)


def test_gradients_of_msda_are_right() -> None:
    torch.manual_seed(0)
    module = MSDA(3, 3).double()
    x, pos = (t.requires_grad_() for t in torch.randn(2, 1, 3, 4, 3).double())
    mask = torch.zeros(1, 3, 4, dtype=torch.bool)
    mask[:, :, 3] = True
    assert torch.autograd.gradcheck(lambda a, b: module(a, b, mask), (x, pos))


@pytest.mark.long
@pytest.mark.parametrize("stride", [1, 2])
@torch.no_grad()
def test_dat_is_its_definition_in_loops_on_every_level(stride: int) -> None:
    """Points beyond the image read zeros, positions are no values, and padding is nowhere."""
    made = encoder("dat", num_layers=1, dat_stride=stride)
    (layer,) = made.get_submodule("layers").children()
    module = layer.get_submodule("self_attn")
    assert isinstance(module, DATEncoderAttention)
    module.dat.get_parameter("conv_offset.3.weight").mul_(5)
    features, pos = random_maps(1, 2)
    levels = padded_levels(features, pos)
    found = torch.split(module(levels.tokens, levels), [h * w for h, w in SHAPES], dim=1)
    for attended, x, place, shape, size in zip(found, features, pos, SHAPES, VALID, strict=True):
        if shape == SHAPES[0]:  # loops over its cells and points would take seconds
            continue
        for image, (height, width) in enumerate((shape, size)):
            inside = (..., slice(height), slice(width))
            expected = dat_attention_by_definition(
                module.dat, x[image][inside], place[image][inside]
            )
            of_image = attended[image].mT.reshape(-1, *shape)[inside]
            torch.testing.assert_close(of_image, expected)


def test_dat_with_points_two_cells_apart_ignores_padding_too() -> None:
    features, pos = random_maps(1, 2)
    model = encoder("dat", dat_stride=2)
    levels = padded_levels(features, pos)
    together = second_image(levels, model(levels))
    cut = [
        [m[1:, :, :height, :width] for m, (height, width) in zip(maps, VALID, strict=True)]
        for maps in (features, pos)
    ]
    masks = [torch.zeros(1, *size, dtype=torch.bool) for size in VALID]
    alone = join_levels(cut[0], masks, cut[1], torch.zeros(3, WIDTH).double())
    torch.testing.assert_close(model(alone)[0], together)


def test_dat_without_offsets_and_bias_is_dense_attention() -> None:
    dat, dense = encoder("dat", num_layers=1), encoder("dense", num_layers=1)
    (ours,), (theirs,) = (e.get_submodule("layers").children() for e in (dat, dense))
    module = ours.get_submodule("self_attn.dat")
    state = {key: value for key, value in ours.state_dict().items() if "self_attn" not in key}
    parts = [module.get_submodule(f"proj_{part}").state_dict() for part in "qkv"]
    for name in ("weight", "bias"):
        joined = torch.cat([part[name] for part in parts])
        state[f"self_attn.attn.in_proj_{name}"] = joined.flatten(1) if name == "weight" else joined
    out = module.get_submodule("proj_out").state_dict()
    state["self_attn.attn.out_proj.weight"] = out["weight"].flatten(1)
    state["self_attn.attn.out_proj.bias"] = out["bias"]
    theirs.load_state_dict(state)
    with torch.no_grad():
        for name in ("rpe_table", "conv_offset.3.weight"):
            module.get_parameter(name).zero_()
    levels = padded_levels(*random_maps(1, 2))
    found, expected = (second_image(levels, made(levels)) for made in (dat, dense))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("attention", ["dense", "mswin", "msda", "dat", "msda+deformable"])
def test_the_memory_of_attention_weights_is_what_autograd_keeps(attention: str) -> None:
    options: dict[str, Any] = {
        "hidden_dim": WIDTH, "nheads": HEADS, "dropout": 0.1, "num_feature_levels": 3,
        "dat_stride": 2 if attention == "dat" else 1,
    }  # fmt: skip
    model = build_model(small_config(encoder_attn=attention, **options), num_classes=3).train()
    images = pad_images([image.float() for image in random_images((128, 180), (100, 192))])
    levels = join_levels(*model.feature_levels(images), model.transformer.level_embed)
    shapes = levels.spatial_shapes
    assert shapes == level_shapes(model, (128, 192))
    keys = {
        "dense": {height * width for height, width in shapes},
        "mswin": {window**2 for window in WINDOWS},
        "msda": {9},
        "dat": {-(-height // 2) * -(-width // 2) for height, width in shapes},
    }[attention.split("+")[0]]
    weights: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point() or tensor.dim() < 3:
            return tensor
        displacements = attention == "dat" and tensor.shape[-1] == 2 and tensor.shape[-2] in keys
        if tensor.shape[-1] in keys or displacements:
            storage = tensor.untyped_storage()
            weights[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        memory = model.transformer.encoder(levels)
    assert memory.requires_grad  # and keeps what it needs
    stated = 2 * attention_bytes(model, shapes, recomputed=False)
    assert sum(weights.values()) == pytest.approx(stated, rel=0.3)
    assert attention_bytes(model, shapes, recomputed=True) * 2 * 2 == stated


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"encoder_attn": "mswin+denes"},
            "encoder_attn mswin.denes: 'denes' does not exist.*dense",
        ),
        ({"encoder_attn": "deformable+mswin"}, r"comes last, and once\. Write mswin\+deformable"),
        ({"encoder_attn": "msda"}, "hidden_dim must be a multiple of 3.*`hidden_dim 288`"),
        ({"encoder_attn": "msda", "hidden_dim": 96}, "nheads must be a multiple of 3.*`nheads 9`"),
        ({"encoder_attn": "mswin", "hidden_dim": 40}, "must be a multiple of 16, not 40"),
        (
            {"encoder_attn": "dat", "hidden_dim": 72, "nheads": 9},
            "encoder_attn dat: 2 heads share their points, so nheads must be a multiple of 2",
        ),
        ({"encoder_attn": "dense", "encoder_updates": "lite"}, "combined with `encoder_updates"),
        ({"encoder_attn": "dense", "encoder": "mine"}, "cannot be combined with `encoder mine`"),
    ],
)
def test_what_cannot_work_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_model(small_config(**options), num_classes=3)


def test_biases_of_windows_start_as_published_inside_a_model() -> None:
    torch.manual_seed(0)
    model = small_model(encoder_attn="mswin+deformable")
    tables = [p for name, p in model.named_parameters() if name.endswith(".relative")]
    assert len(tables) == 2 * 3
    everything = torch.cat([table.flatten() for table in tables])
    assert everything.std().item() == pytest.approx(1.0, abs=0.1)


def test_bias_tables_of_dat_start_as_published_inside_a_model() -> None:
    torch.manual_seed(0)
    model = build_model(small_config(encoder_attn="dat+deformable"), num_classes=5)
    tables = [p for name, p in model.named_parameters() if name.endswith(".rpe_table")]
    assert [tuple(table.shape) for table in tables] == [(4, 55, 55)] * 2
    assert tables[0].std().item() == pytest.approx(0.01, rel=0.05)


def test_msda_is_an_attention_of_the_layer() -> None:
    (layer,) = encoder("msda", num_layers=1).get_submodule("layers").children()
    assert isinstance(layer.get_submodule("self_attn"), MSDAttention)
