"""A sparse encoder changes the tokens with the best scores, which learn where the decoder looks."""

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs.schema import LossConfig
from models.build import build_criterion, build_model, set_checkpointing
from models.deformable_detr import DeformableDETR
from models.encoders.sparse import SparseEncoder, TokenScorer, best_tokens
from models.levels import cell_centres
from models.recipes.hybrid import Options as Hybrid
from models.token_scores import attention_map
from ops import MSDeformAttn
from tests.unit.models.definitions import random_targets
from tests.unit.models.small import VARIANTS, perturb, random_images, small_config
from tests.unit.models.test_encoders import encoder, feature_levels
from util.batch import EffectiveBatch, pad_images

PARTS = [0.01, 0.3, 0.77]


def test_the_scorer_has_the_published_number_of_parameters() -> None:
    assert sum(p.numel() for p in TokenScorer(256).parameters()) == 107_521


def score_by_definition(scorer: TokenScorer, x: Tensor) -> Tensor:
    """Return the scores of an image's tokens without padding. Shape: [S,C] -> [S]."""
    state, width = scorer.state_dict(), x.shape[1]

    def linear(values: Tensor, name: str) -> Tensor:
        product: Tensor = values @ state[f"{name}.weight"].T + state[f"{name}.bias"]
        return product

    def gelu(values: Tensor) -> Tensor:
        return values * (1 + torch.erf(values / math.sqrt(2))) / 2

    deviation = (x.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
    normed = (x - x.mean(-1, keepdim=True)) / deviation
    normed = normed * state["layer1.0.weight"] + state["layer1.0.bias"]
    hidden = gelu(linear(normed, "layer1.1"))
    mean = hidden[:, width // 2 :].mean(0, keepdim=True).expand(len(x), -1)
    hidden = torch.cat([hidden[:, : width // 2], mean], dim=1)
    hidden = gelu(linear(gelu(linear(hidden, "layer2.0")), "layer2.2"))
    return linear(hidden, "layer2.4")[:, 0]


@pytest.mark.parametrize("part", PARTS)
@torch.no_grad()
def test_the_best_tokens_of_each_image_change_in_every_layer(part: float) -> None:
    levels = feature_levels()
    sparse = encoder(updates="sparse", rho=part)
    assert isinstance(sparse, SparseEncoder)
    x = levels.tokens
    changed = torch.zeros(x.shape[:2], dtype=torch.bool)
    for image in range(2):
        valid = (~levels.padding_mask[image]).nonzero()[:, 0]
        given = (levels.tokens + levels.pos)[image, valid]
        scores = score_by_definition(sparse.enc_mask_predictor, given)
        count = min(math.floor(part * len(valid)) + 1, len(valid))
        changed[image, valid[scores.argsort(descending=True)[:count]]] = True
    for layer in sparse.layers:
        everything = layer(x, levels.pos, cell_centres(levels), x, levels)
        x = torch.where(changed[..., None], everything, x)
    torch.testing.assert_close(sparse(levels), x)


@torch.no_grad()
def test_with_all_tokens_it_is_the_paper_s_encoder() -> None:
    levels = feature_levels()
    sparse, full = encoder(updates="sparse", rho=1.0), encoder()
    own = sparse.state_dict()
    full.load_state_dict({key: own[key] for key in full.state_dict()})
    valid = ~levels.padding_mask
    torch.testing.assert_close(sparse(levels)[valid], full(levels)[valid])


def test_an_image_has_as_many_tokens_as_its_size_gives() -> None:
    padding = torch.zeros(3, 100, dtype=torch.bool)
    padding[1, 10:], padding[2, 1:] = True, True
    scores = torch.arange(300.0).view(3, 100)
    tokens, among = best_tokens(scores, padding, 0.3)
    assert among.sum(1).tolist() == [31, 4, 1]
    assert tokens[1, :4].tolist() == [9, 8, 7, 6]
    assert best_tokens(scores, padding, 1.0)[1].sum(1).tolist() == [100, 10, 1]


def test_a_point_between_four_cells_counts_for_each_of_them() -> None:
    module = MSDeformAttn(4, n_levels=1, n_heads=1, n_points=1).double()
    with torch.no_grad():
        module.sampling_offsets.bias.zero_()
    query, middle = torch.randn(1, 1, 4).double(), torch.full((1, 1, 1, 2), 0.5).double()
    found = attention_map(module, query, middle, [(2, 2)])
    torch.testing.assert_close(found, torch.full((1, 4), 0.25).double())


@pytest.mark.parametrize("numbers", [2, 4])
def test_the_map_is_what_values_pass_on(numbers: int) -> None:
    """The sum of all outputs changes with a token's value as much as queries look at it."""
    torch.manual_seed(0)
    width, heads, shapes = 12, 3, [(4, 5), (2, 3)]
    module = MSDeformAttn(width, n_levels=2, n_heads=heads, n_points=2).double()
    perturb(module)
    with torch.no_grad():
        for projection in (module.value_proj, module.output_proj):
            nn.init.eye_(projection.weight)
    query = torch.randn(2, 6, width).double()
    reference = torch.rand(2, 6, 2, numbers).double()
    tokens = torch.zeros(2, 26, width, dtype=torch.float64, requires_grad=True)
    found = module(query, reference, tokens, shapes).sum()
    (gradient,) = torch.autograd.grad(found, tokens)
    expected = gradient.sum(-1) / (width // heads)
    torch.testing.assert_close(attention_map(module, query, reference, shapes), expected)
    assert expected.sum() < 2 * 6 * heads  # some points lie outside


def sparse_model(recipes: dict[str, Any] | None = None, **options: Any) -> DeformableDETR:
    """Return a perturbed float64 detector in training mode, without dropout."""
    torch.manual_seed(0)
    options = {"encoder_updates": "sparse", "dropout": 0.0, **VARIANTS["two_stage"], **options}
    model = build_model(small_config(**options), num_classes=5, recipes=recipes).double().train()
    perturb(model)
    return model


def losses_of_images(model: DeformableDETR) -> Tensor:
    """Return the loss of the scores of two images, the second smaller than the first."""
    torch.manual_seed(1)
    images, targets = pad_images(random_images((96, 128), (80, 64))), random_targets([2, 1], 5)
    losses: Tensor = model(images, targets)["image_losses"]["loss_mask_prediction"]
    return losses


@pytest.mark.parametrize("variant", ["plain", "two_stage"])
def test_scores_learn_which_tokens_the_decoder_looks_at_most(variant: str) -> None:
    model = sparse_model(**{"with_box_refine": False, "two_stage": False, **VARIANTS[variant]})
    encoder = model.transformer.encoder
    assert isinstance(encoder, SparseEncoder)
    looks: list[Any] = []
    scored: list[Any] = []
    for layer in model.transformer.decoder.layers:
        layer.get_submodule("cross_attn").register_forward_pre_hook(
            lambda module, inputs: looks.append((module, *inputs))
        )
    encoder.enc_mask_predictor.register_forward_hook(
        lambda _, inputs, output: scored.append((inputs[1], output))
    )
    found = losses_of_images(model)
    (padding, scores), seen = scored[0], torch.zeros(2, scored[0][1].shape[1]).double()
    assert len(looks) == 3
    for module, query, reference, memory, shapes in looks:
        value = torch.zeros_like(memory, requires_grad=True)
        probe = MSDeformAttn(64, 4, 4, 3).double()
        probe.load_state_dict(module.state_dict())
        for projection in (probe.value_proj, probe.output_proj):
            nn.init.eye_(projection.weight)
        total = probe(query.detach(), reference.detach(), value, shapes).sum()
        seen += torch.autograd.grad(total, value)[0].sum(-1)
    for image in range(2):
        valid = (~padding[image]).nonzero()[:, 0]
        own = seen[image, valid]
        count = min(math.floor(0.3 * len(valid)) + 1, int((own > 1e-9).sum()))
        wanted = torch.zeros_like(own)
        wanted[own.argsort(descending=True)[:count]] = 1.0
        expected = F.multilabel_soft_margin_loss(scores[image, valid][None], wanted[None])
        torch.testing.assert_close(found[image], expected)


def test_queries_of_a_recipe_do_not_count() -> None:
    model = sparse_model({"hybrid": Hybrid(num_queries_one2many=9, k_one2many=2)})
    alone = sparse_model()
    state = model.state_dict()
    alone.load_state_dict({key: state[key] for key in alone.state_dict()})
    torch.testing.assert_close(losses_of_images(model), losses_of_images(alone))


def test_activations_of_the_decoder_computed_again_are_not_counted_twice() -> None:
    model, plain = sparse_model(), sparse_model()
    set_checkpointing(model, ("encoder", "decoder"))
    for _ in range(2):
        found, expected = losses_of_images(model), losses_of_images(plain)
        assert torch.equal(found, expected)
        torch.autograd.backward(found.sum())


def test_the_loss_is_a_mean_over_the_images_of_the_effective_batch() -> None:
    model = sparse_model()
    torch.manual_seed(1)
    images, targets = pad_images(random_images((96, 128), (80, 64))), random_targets([2, 1], 5)
    output = model(images, targets)
    values = output["image_losses"]["loss_mask_prediction"]
    criterion = build_criterion(LossConfig())
    alone = criterion(output, targets)["loss_mask_prediction"]
    torch.testing.assert_close(alone, values.mean())
    criterion.whole = EffectiveBatch(boxes=12, most_boxes=9, images=8)
    losses = criterion(output, targets, num_boxes=12)
    torch.testing.assert_close(losses["loss_mask_prediction"], values.sum() / 8)
    assert criterion.weight("loss_mask_prediction") == 1.0
    parts = [criterion.weight(name) or 0.0 for name in losses]
    total = sum(w * v for w, v in zip(parts, losses.values(), strict=True))
    torch.testing.assert_close(losses["loss"], torch.as_tensor(total))


def test_in_evaluation_there_is_no_such_loss() -> None:
    model = sparse_model().eval()
    assert "image_losses" not in model(pad_images(random_images((96, 128))))


def test_a_copy_of_the_model_learns_by_itself() -> None:
    model = sparse_model()
    expected = losses_of_images(model)
    copied = copy.deepcopy(model)
    assert torch.equal(losses_of_images(copied), expected)
    assert torch.equal(losses_of_images(model), expected)
