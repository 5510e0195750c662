"""Attention, encoder, decoder and proposals against loops; what padding may change."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from models.heads import apply_delta
from models.layers import inverse_sigmoid
from models.levels import FeatureLevels, PositionEmbeddingSine, cell_centres, valid_ratio
from models.proposals import Proposals, token_proposals
from models.transformer import DeformableTransformer, TransformerOutput
from models.two_stage import TwoStageTransformer
from ops import MSDeformAttn
from tests.unit.models.small import VARIANTS, perturb, small_model
from tests.unit.ops.oracle import loop_oracle

SHAPES = [(4, 6), (2, 3)]
TOKENS = sum(h * w for h, w in SHAPES)
# unpadded (height, width) of each image on each level
VALID = [[(4, 4), (2, 2)], [(3, 6), (2, 3)]]
SHAPES_3, VALID_3 = [(4, 6), (2, 3), (1, 2)], [(4, 4), (2, 2), (1, 1)]
Maps = tuple[list[Tensor], list[Tensor], list[Tensor]]


def make_masks(shapes: list[tuple[int, int]], valid: list[list[tuple[int, int]]]) -> list[Tensor]:
    """Return L x [N,H,W], True = padding."""
    masks = []
    for level, (height, width) in enumerate(shapes):
        mask = torch.ones(len(valid), height, width, dtype=torch.bool)
        for image, sizes in enumerate(valid):
            mask[image, : sizes[level][0], : sizes[level][1]] = False
        masks.append(mask)
    return masks


def make_levels(shapes: list[tuple[int, int]] = SHAPES, width: int = 16) -> FeatureLevels:
    """Return random features of two padded images."""
    masks = make_masks(shapes, VALID)
    tokens = sum(h * w for h, w in shapes)
    return FeatureLevels(
        tokens=torch.randn(2, tokens, width, dtype=torch.float64),
        pos=torch.randn(2, tokens, width, dtype=torch.float64),
        padding_mask=torch.cat([m.flatten(1) for m in masks], dim=1),
        valid_ratios=torch.stack([valid_ratio(m, torch.float64) for m in masks], dim=1),
        sizes=torch.tensor([(w, h) for h, w in shapes], dtype=torch.float64),
        spatial_shapes=shapes,
    )


@pytest.mark.parametrize("numbers", [2, 4])
def test_attention_module_follows_equation_3(numbers: int) -> None:
    module = MSDeformAttn(8, n_levels=2, n_heads=2, n_points=3).double()
    perturb(module)
    levels = make_levels(width=8)
    query = torch.randn(2, 5, 8, dtype=torch.float64)
    reference = torch.rand(2, 5, 2, numbers, dtype=torch.float64)
    output = module(query, reference, levels.tokens, SHAPES, None, levels.padding_mask)

    value = module.value_proj(levels.tokens)
    value[levels.padding_mask] = 0
    offsets = module.sampling_offsets(query).reshape(2, 5, 2, 2, 3, 2)
    logits = module.attention_weights(query).reshape(2, 5, 2, 6)
    weights = logits.softmax(-1).reshape(2, 5, 2, 2, 3)
    locations = torch.empty_like(offsets)
    for b, q, m, level, k in itertools.product(*map(range, locations.shape[:5])):
        centre, offset = reference[b, q, level, :2], offsets[b, q, m, level, k]
        if numbers == 2:
            height, width = SHAPES[level]
            locations[b, q, m, level, k] = centre + offset / torch.tensor([width, height])
        else:
            locations[b, q, m, level, k] = centre + offset / 3 * reference[b, q, level, 2:] / 2
    attended = loop_oracle(value.reshape(2, TOKENS, 2, 4), SHAPES, locations, weights)
    torch.testing.assert_close(output, module.output_proj(attended))


def test_attention_starts_uniform_along_one_direction_per_head() -> None:
    module = MSDeformAttn(16, n_levels=2, n_heads=8, n_points=3)
    module.reset_parameters()
    offsets = module.sampling_offsets(torch.randn(1, 16)).reshape(8, 2, 3, 2)
    directions = [(1, 0), (1, 1), (0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1)]
    for (head, direction), level, k in itertools.product(enumerate(directions), range(2), range(3)):
        expected = [(k + 1) * d for d in direction]
        assert offsets[head, level, k].tolist() == pytest.approx(expected, abs=1e-5)
    assert not module.attention_weights(torch.randn(1, 16)).any()


def test_cell_centres_are_the_same_place_on_every_level() -> None:
    centres = cell_centres(make_levels())
    for image in range(2):
        token = 0
        for level, (height, width) in enumerate(SHAPES):
            valid_h, valid_w = VALID[image][level]
            for row, column in itertools.product(range(height), range(width)):
                x, y = (column + 0.5) / valid_w, (row + 0.5) / valid_h  # of the image
                for other, (h, w) in enumerate(SHAPES):
                    there_h, there_w = VALID[image][other]
                    expected = [x * there_w / w, y * there_h / h]
                    assert centres[image, token, other].tolist() == pytest.approx(expected)
                token += 1


def test_token_proposals_are_boxes_around_valid_tokens() -> None:
    shapes = [(4, 6), (2, 3)]
    proposals = token_proposals(make_levels(shapes))
    for image in range(2):
        token = 0
        for level, (height, width) in enumerate(shapes):
            valid_h, valid_w = VALID[image][level]
            for row, column in itertools.product(range(height), range(width)):
                found = proposals[image, token].tolist()
                if row < valid_h and column < valid_w:
                    size = 0.05 * 2**level
                    box = [(column + 0.5) / valid_w, (row + 0.5) / valid_h, size, size]
                    assert found == pytest.approx([math.log(v / (1 - v)) for v in box])
                else:
                    assert found == [math.inf] * 4
                token += 1


def test_tokens_at_the_very_border_or_on_too_coarse_levels_propose_nothing() -> None:
    levels = FeatureLevels(
        tokens=torch.zeros(1, 65, 8),
        pos=torch.zeros(1, 65, 8),
        padding_mask=torch.zeros(1, 65, dtype=torch.bool),
        valid_ratios=torch.ones(1, 6, 2),
        sizes=torch.tensor([(60.0, 1.0)] + [(1.0, 1.0)] * 5),
        spatial_shapes=[(1, 60), (1, 1), (1, 1), (1, 1), (1, 1), (1, 1)],
    )
    infinite = token_proposals(levels).isinf().all(-1)[0]
    # the first and last of 60 columns are centred at 0.8 %; level 5 would be 1.6 images wide
    assert infinite.nonzero().flatten().tolist() == [0, 59, 64]


def test_queries_from_boxes_start_from_interleaved_sines_of_each_number() -> None:
    transformer = build_small_transformer("two_stage")
    assert isinstance(transformer, TwoStageTransformer)
    seen: list[Tensor] = []
    transformer.pos_trans.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    boxes = torch.rand(1, 2, 4, dtype=torch.float64)
    group = transformer.from_boxes("_a", boxes)
    assert group.content.shape == group.position.shape == (1, 2, 64)
    assert group.reference is boxes
    for q, number, i in itertools.product(range(2), range(4), range(32)):
        angle = float(boxes[0, q, number]) * 2 * math.pi / 10000 ** (2 * (i // 2) / 32)
        expected = math.cos(angle) if i % 2 else math.sin(angle)
        assert seen[0][0, q, number * 32 + i].item() == pytest.approx(expected, abs=1e-12)


def test_padding_is_never_chosen_while_pixels_are_left() -> None:
    scores = torch.tensor([[0.0, 9.0, -5.0, 8.0], [1.0, 2.0, 3.0, 4.0]])
    padding = torch.tensor([[False, True, False, True], [False, False, False, False]])
    boxes = torch.arange(8.0).reshape(2, 4, 1).expand(-1, -1, 4)
    proposals = Proposals(scores[..., None], boxes, boxes, padding, boxes)
    best, second = (proposals.best(first, 2)[..., 0].logit() for first in (0, 1))
    torch.testing.assert_close(best, torch.tensor([[0.0, 2], [7, 6]]), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(second, best[:, 1:])
    assert proposals.best(0, 99).shape == (2, 4, 4)


@given(st.floats(0, 1))
def test_inverse_sigmoid_undoes_sigmoid_within_its_clamp(p: float) -> None:
    value = inverse_sigmoid(torch.tensor(p, dtype=torch.float64)).sigmoid().item()
    assert value == pytest.approx(min(max(p, 1e-5), 1 - 1e-5), abs=2e-5)
    if 1e-5 <= p <= 1 - 1e-5:
        assert value == pytest.approx(p, abs=1e-12)


def test_deltas_move_points_and_boxes_in_logit_space() -> None:
    delta = torch.randn(1, 2, 4, dtype=torch.float64)
    box = torch.rand(1, 2, 4, dtype=torch.float64) * 0.8 + 0.1
    logit = torch.log(box / (1 - box))
    torch.testing.assert_close(apply_delta(delta, box), torch.sigmoid(delta + logit))
    moved = apply_delta(delta, box[..., :2])
    torch.testing.assert_close(moved[..., :2], torch.sigmoid(delta + logit)[..., :2])
    torch.testing.assert_close(moved[..., 2:], delta[..., 2:].sigmoid())


def build_small_transformer(variant: str) -> DeformableTransformer:
    """Return a perturbed float64 transformer of three levels."""
    return small_model(num_classes=3, num_feature_levels=3, **VARIANTS[variant]).transformer


def make_maps(valid: list[tuple[int, int]], shapes: list[tuple[int, int]], seed: int) -> Maps:
    """Return features, masks and encodings of one image; padding is filled with noise."""
    masks = make_masks(shapes, [valid])
    features = []
    for (height, width), (h, w) in zip(shapes, valid, strict=True):
        torch.manual_seed(seed + h)
        content = torch.randn(1, 64, h, w, dtype=torch.float64)
        torch.manual_seed(height * 1000 + width)
        feature = torch.randn(1, 64, height, width, dtype=torch.float64)
        feature[..., :h, :w] = content
        features.append(feature)
    encode = PositionEmbeddingSine(32)
    return features, masks, [encode(mask, torch.float64) for mask in masks]


def decode(transformer: DeformableTransformer, maps: Maps) -> TransformerOutput:
    """Run a transformer with fixed query embeddings."""
    torch.manual_seed(5)
    queries = None if transformer.two_stage else torch.randn(7, 128, dtype=torch.float64)
    output: TransformerOutput = transformer(*maps, queries)
    return output


@pytest.mark.parametrize("variant", VARIANTS)
def test_neither_amount_nor_content_of_padding_reaches_a_query(variant: str) -> None:
    transformer = build_small_transformer(variant)
    valid = [(4, 6), (2, 3), (1, 2)]
    alone = decode(transformer, make_maps(valid, valid, seed=1)).decoder
    padded = decode(transformer, make_maps(valid, [(7, 9), (4, 5), (2, 2)], seed=1)).decoder
    for a, b in zip(alone.hidden, padded.hidden, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-9)
    for a, b in zip(alone.references, padded.references, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-9)


def test_references_between_layers_carry_no_gradient_but_the_first_does() -> None:
    refine = decode(build_small_transformer("refine"), make_maps(VALID_3, SHAPES_3, 2))
    assert [r.requires_grad for r in refine.decoder.references] == [True, False, False]
    staged = decode(build_small_transformer("two_stage"), make_maps(VALID_3, SHAPES_3, 2))
    assert not any(r.requires_grad for r in staged.decoder.references)
    assert [r.shape[-1] for r in refine.decoder.references] == [2, 4, 4]


def test_layers_refine_the_boxes_of_the_last() -> None:
    transformer = build_small_transformer("refine")
    decoded = decode(transformer, make_maps(VALID_3, SHAPES_3, 3)).decoder
    heads = transformer.decoder.heads
    for i in range(2):
        delta = heads.delta(i, decoded.hidden[i])
        expected = apply_delta(delta, decoded.references[i])
        torch.testing.assert_close(decoded.boxes[i], expected)
        assert torch.equal(decoded.references[i + 1], decoded.boxes[i])


def test_fewer_tokens_than_queries_give_fewer_queries() -> None:
    transformer = build_small_transformer("two_stage")
    sizes = [(1, 3), (1, 1), (1, 1)]
    output = decode(transformer, make_maps(sizes, sizes, seed=4))
    assert output.decoder.hidden[-1].shape == (1, 5, 64)
    assert all(h.isfinite().all() for h in output.decoder.hidden)


def test_encoder_predictions_are_finite_and_infinite_proposals_stay_at_the_edge() -> None:
    transformer = build_small_transformer("two_stage")
    assert isinstance(transformer, TwoStageTransformer)
    output = decode(transformer, make_maps(VALID_3, SHAPES_3, seed=6))
    assert output.proposals is not None
    boxes = output.proposals.box_logits.sigmoid()
    padding = torch.cat([m.flatten() for m in make_masks(SHAPES_3, [VALID_3])])
    assert (boxes[0, padding] == 1).all()
    assert output.proposals.logits.isfinite().all()
    (gradient,) = torch.autograd.grad(
        F.l1_loss(boxes, torch.zeros_like(boxes)), transformer.enc_output.weight
    )
    assert gradient.isfinite().all()
