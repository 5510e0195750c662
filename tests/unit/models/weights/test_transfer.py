"""Fine-tuning starts: what is copied, what follows class names, what stays fresh."""

import functools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.schema import ModelConfig
from models.build import build_model
from models.recipes.hybrid import Options as Hybrid
from models.recipes.mr import Options as Mr
from models.weights.class_names import coco_logit_classes
from models.weights.transfer import TransferReport, load_strict, transfer
from tests.unit.models.small import built
from util.classes import Classes
from util.errors import CheckpointError

TINY: dict[str, Any] = {
    "backbone": "resnet18",
    "hidden_dim": 32,
    "dim_feedforward": 16,
    "enc_layers": 1,
    "dec_layers": 2,
    "num_queries": 6,
}
REFINE: dict[str, Any] = {"with_box_refine": True}
TWO_STAGE: dict[str, Any] = {"with_box_refine": True, "two_stage": True}


def build(num_classes: int, **options: Any) -> torch.nn.Module:
    return built(ModelConfig(**TINY | options), num_classes)


def weights(num_classes: int, **options: Any) -> dict[str, torch.Tensor]:
    """Return the weights of a model none of whose tensors has its initial value."""
    model = build(num_classes, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return {key: tensor.clone() for key, tensor in model.state_dict().items()}


@functools.cache
def of_four_classes() -> dict[str, torch.Tensor]:
    """Return the weights that most tests start from."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return weights(4)


def classes(*names: str) -> Classes:
    return Classes(tuple(range(len(names))), names)


def run(
    model: torch.nn.Module, source: dict[str, torch.Tensor], theirs: Classes, ours: Classes
) -> tuple[TransferReport, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    report = transfer(model, source, source_classes=theirs, target_classes=ours)
    return report, before, model.state_dict()


@pytest.mark.long
@pytest.mark.parametrize("options", [{}, REFINE, TWO_STAGE], ids=["plain", "refine", "two_stage"])
def test_same_model_and_classes_copies_everything(options: dict[str, Any]) -> None:
    source, names = weights(2, **options), classes("cat", "dog")
    report, _, after = run(build(2, **options), source, names, names)
    heads = f"class_embed.{TINY['dec_layers']}." if options is TWO_STAGE else "none"
    assert all(after[key].equal(source[key]) for key in after if heads not in key)
    assert not report.reinitialised
    assert not report.ignored
    assert len(report.copied) + len(report.by_name) + len(report.adapted) == len(after)
    assert all(heads in key for key in report.adapted)


@pytest.mark.long
def test_class_rows_follow_names() -> None:
    source = weights(91)
    ours = classes("Dog", "widget", "person", "")
    report, before, after = run(build(4), source, coco_logit_classes(), ours)
    for layer in range(2):
        for part in ("weight", "bias"):
            key = f"class_embed.{layer}.{part}"
            assert after[key][0].equal(source[key][18])
            assert after[key][2].equal(source[key][1])
            assert after[key][[1, 3]].equal(before[key][[1, 3]])
    assert report.matched_classes == ("Dog", "person")
    assert report.fresh_classes == ("widget", "")
    assert "2 of 4 classes known, fresh: widget, (unnamed)" in report.table()


@pytest.mark.long
@settings(max_examples=10, deadline=None)
@given(st.permutations(["cat", "dog", "cow", "hen"]), st.integers(1, 4))
def test_any_order_of_classes(names: list[str], kept: int) -> None:
    theirs = classes("cat", "dog", "cow", "hen")
    ours = classes(*names[:kept])
    _, _, after = run(build(kept), of_four_classes(), theirs, ours)
    wanted = [theirs.names.index(name) for name in ours.names]
    assert after["class_embed.1.weight"].equal(of_four_classes()["class_embed.1.weight"][wanted])


def test_no_known_class_is_reported_fresh() -> None:
    report, before, after = run(
        build(1), of_four_classes(), classes("a", "b", "c", "d"), classes("x")
    )
    assert after["class_embed.0.weight"].equal(before["class_embed.0.weight"])
    assert report.by_name == []
    assert "4 tensors  class_embed (no class of a known name)" in report.table()


@pytest.mark.long
def test_proposal_head_keeps_its_ranking_row() -> None:
    source = weights(3, **TWO_STAGE)
    model = build(2, **TWO_STAGE)
    report, before, after = run(model, source, classes("a", "b", "c"), classes("c", "new"))
    key = "class_embed.2.weight"
    assert after[key][0].equal(source[key][0])
    assert after[key][1].equal(before[key][1])
    assert after["class_embed.1.weight"][0].equal(source["class_embed.1.weight"][2])
    assert not report.ignored
    assert set(report.adapted.values()) == {"row 0, which ranks proposals"}
    assert not [name for name in report.by_name if "class_embed.2." in name]


@pytest.mark.long
def test_proposal_head_follows_the_number_of_layers() -> None:
    source, names = weights(2, dec_layers=3, **TWO_STAGE), classes("a", "b")
    report, _, after = run(build(2, **TWO_STAGE), source, names, names)
    box = "{}.layers.0.weight".format
    assert after[box("bbox_embed.2")].equal(source[box("bbox_embed.3")])
    assert after[box("bbox_embed.1")].equal(source[box("bbox_embed.1")])
    assert any(key.startswith("bbox_embed.2.") for key in report.ignored)
    assert not report.reinitialised


@pytest.mark.parametrize("name", ["hybrid", "mr"])
def test_scores_of_objects_do_not_become_those_of_classes(name: str) -> None:
    options = {"hybrid": Hybrid(num_queries_one2many=4, hybrid_proposals=True), "mr": Mr()}[name]
    of_objects, of_classes = (
        build_model(
            ModelConfig(**TINY | TWO_STAGE, class_proposals=by_class),
            num_classes=3,
            recipes={name: options},
        )
        for by_class in (False, True)
    )
    names, key = classes("a", "b", "c"), f"recipes.{name}.encoder_heads.score.weight"
    pairs = ((of_objects, of_classes, 3, 1), (of_classes, of_objects, 1, 3))
    for source, model, own, given_rows in pairs:
        report = transfer(
            model,
            source.state_dict(),
            source_classes=names,
            target_classes=names,
            proposal_scores="either",
        )
        said = f"shape ({own}, 32), checkpoint ({given_rows}, 32)"
        assert report.reinitialised[key] == said


@pytest.mark.long
def test_decoder_and_proposal_heads_are_never_interchanged() -> None:
    names = classes("a", "b")
    deeper = run(build(2, dec_layers=3, **REFINE), weights(2, **TWO_STAGE), names, names)[0]
    assert "bbox_embed.2.layers.0.weight" in deeper.reinitialised
    two_stage = run(build(2, **TWO_STAGE), weights(2, dec_layers=3, **REFINE), names, names)[0]
    assert "bbox_embed.2.layers.0.weight" in two_stage.reinitialised


@pytest.mark.long
def test_shared_heads_become_separate_ones() -> None:
    source, names = weights(2), classes("a", "b")
    report, _, after = run(build(2, **REFINE), source, names, names)
    for index in range(2):
        key = f"bbox_embed.{index}.layers.1.weight"
        assert after[key].equal(source["bbox_embed.0.layers.1.weight"])
        assert after[f"transformer.decoder.{key}"].equal(after[key])
    assert not report.reinitialised


def test_more_queries_are_noisy_copies() -> None:
    names = classes("cat", "dog", "cow", "hen")
    report, _, after = run(build(4, num_queries=15), of_four_classes(), names, names)
    given_rows, rows = of_four_classes()["query_embed.weight"], after["query_embed.weight"]
    assert rows[:6].equal(given_rows)
    assert report.adapted == {"query_embed.weight": "6 queries to 15"}
    noise = rows[6:12] - given_rows
    assert 0.05 < float(noise.std()) < 0.2
    assert len({tuple(row) for row in rows.tolist()}) == 15


@pytest.mark.parametrize("count", [1, 3, 5])
def test_surplus_queries_are_dropped_where_they_are_densest(count: int) -> None:
    # in a model that reads its reference points off the first two numbers of a query
    points = [(0.1, 0.1), (0.5, 0.5), (0.12, 0.1), (0.9, 0.9), (0.12, 0.12), (0.9, 0.15)]
    source, names = dict(of_four_classes()), classes("cat", "dog", "cow", "hen")
    source["query_embed.weight"] = source["query_embed.weight"].clone()
    source["query_embed.weight"][:, :2] = torch.tensor(points).logit()
    source["transformer.reference_points.weight"] = torch.eye(2, 32)
    source["transformer.reference_points.bias"] = torch.zeros(2)
    report, _, after = run(build(4, num_queries=count), source, names, names)
    kept = {1: [1], 3: [0, 1, 3], 5: [0, 1, 3, 4, 5]}[count]
    assert after["query_embed.weight"].equal(source["query_embed.weight"][kept])
    assert report.adapted == {"query_embed.weight": f"6 queries to {count}"}


def test_queries_that_coincide_are_taken_once() -> None:
    source, names = dict(of_four_classes()), classes("cat", "dog", "cow", "hen")
    source["transformer.reference_points.weight"] = torch.zeros(2, 32)
    _, _, after = run(build(4, num_queries=4), source, names, names)
    assert len({tuple(row) for row in after["query_embed.weight"].tolist()}) == 4


@pytest.mark.long
def test_a_synonym_copies_the_row_and_is_reported() -> None:
    source = weights(91)
    ours = classes("pedestrian", "Dogs", "aeroplane")
    report, _, after = run(build(3), source, coco_logit_classes(), ours)
    assert after["class_embed.1.bias"].equal(source["class_embed.1.bias"][[1, 18, 5]])
    assert report.renamed == {"pedestrian": "person", "Dogs": "dog", "aeroplane": "airplane"}
    line = "3 of 3 classes known (pedestrian from person, Dogs from dog, aeroplane from airplane)"
    assert line in report.table()


@pytest.mark.long
def test_ambiguous_synonyms_are_reported_and_copy_no_row() -> None:
    ours = classes("people", "pedestrian", "RBC", "person")
    report, before, after = run(build(4), weights(91), coco_logit_classes(), ours)
    key = "class_embed.1.weight"
    assert after[key][:3].equal(before[key][:3])
    assert report.contested == {"people": "person", "pedestrian": "person"}
    line = "1 of 4 classes known, fresh: people (not the only one for person), pedestrian"
    assert line in report.table()
    assert "RBC (" not in report.table()


def test_other_levels_are_reported_and_nothing_is_lost() -> None:
    names = classes("cat", "dog", "cow", "hen")
    report, before, after = run(build(4, num_feature_levels=3), of_four_classes(), names, names)
    assert after["transformer.level_embed"].equal(before["transformer.level_embed"])
    assert report.reinitialised["transformer.level_embed"] == "shape (3, 32), checkpoint (4, 32)"
    assert any(key.startswith("input_proj.3.") for key in report.ignored)
    listed = [*report.copied, *report.by_name, *report.adapted, *report.reinitialised]
    assert sorted(listed) == sorted(after)
    table = report.table()
    offsets = (
        "transformer.encoder.layers.0.self_attn.sampling_offsets.{0}, "
        "transformer.decoder.layers.*.cross_attn.sampling_offsets.{0}"
    ).format
    assert f"; {offsets('weight')} (shape (192, 32), checkpoint (256, 32));" in table
    assert f"; {offsets('bias')} (shape (192,), checkpoint (256,));" in table
    assert "ignored               4 tensors  input_proj.3 (not in the model)" in table
    assert len(table.splitlines()) == 5


def test_a_module_transferred_only_in_part_is_listed_in_parts() -> None:
    report = TransferReport(
        reinitialised={"a.0.weight": "shape", "a.0.bias": "lost", "b.w": "lost", "b.v": "lost"},
        ignored={f"c.{i}.{part}": part for i in range(2) for part in ("weight", "bias")},
    )
    rows = report.table().splitlines()
    assert rows[3].endswith("4 tensors  a.0.weight (shape); a.0.bias, b (lost)")
    assert rows[4].endswith("4 tensors  c.*.weight (weight); c.*.bias (bias)")


def test_weights_without_class_names_are_reported() -> None:
    report, before, after = run(
        build(2), of_four_classes(), classes("", "", "", ""), classes("cat", "dog")
    )
    assert after["class_embed.1.bias"].equal(before["class_embed.1.bias"])
    line = "0 of 2 classes known, as the checkpoint names no classes, fresh: cat, dog"
    assert line in report.table()


def test_a_different_backbone_is_not_mixed_with_the_checkpoints() -> None:
    # torchvision's resnet18 and resnet34 have many tensors of one name and shape
    names, model = classes("cat", "dog", "cow", "hen"), build(4, backbone="resnet34")
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    report = transfer(
        model, of_four_classes(), source_classes=names, target_classes=names, backbone=False
    )
    after = model.state_dict()
    backbone = {key for key in after if key.startswith("backbone.0.")}
    assert backbone & of_four_classes().keys()
    assert all(after[key].equal(before[key]) for key in backbone)
    assert all(after[key].equal(of_four_classes()[key]) for key in after.keys() - backbone)
    listed = {*report.copied, *report.by_name, *report.adapted, *report.reinitialised}
    assert listed == after.keys() - backbone
    assert not report.ignored


@pytest.mark.long
def test_wrong_model_is_refused_with_its_options() -> None:
    names = classes("cat", "dog", "cow", "hen")
    with pytest.raises(CheckpointError, match="`hidden_dim`: checkpoint 64, run 32") as caught:
        run(build(4), weights(4, hidden_dim=64), names, names)
    assert "\n" not in str(caught.value)
    with pytest.raises(CheckpointError, match="only 0% of the weights fit"):
        run(build(4), {"fc.weight": torch.ones(3)}, names, names)


def test_strict_loading_names_what_differs() -> None:
    model = build(4)
    load_strict(model, of_four_classes(), "a.pth")
    assert all(tensor.equal(of_four_classes()[key]) for key, tensor in model.state_dict().items())
    fewer = {key: value for key, value in of_four_classes().items() if key != "query_embed.weight"}
    with pytest.raises(CheckpointError, match=r"a\.pth: .*'query_embed\.weight' is missing"):
        load_strict(model, fewer, "a.pth")
    with pytest.raises(CheckpointError, match="'extra' is not in the model"):
        load_strict(model, of_four_classes() | {"extra": torch.ones(1)}, "a.pth")
    with pytest.raises(CheckpointError, match=r"is \(4, 32\), the model's \(2, 32\)"):
        load_strict(build(2), of_four_classes(), "a.pth")


@pytest.mark.long
def test_frozen_and_trained_norms_share_checkpoints() -> None:
    trained = weights(4, train_backbone_norm=True)
    assert any(key.endswith("num_batches_tracked") for key in trained)
    load_strict(build(4), trained, "a.pth")
    load_strict(build(4, train_backbone_norm=True), of_four_classes(), "a.pth")
    counter = next(key for key in trained if key.endswith("num_batches_tracked"))
    with pytest.raises(CheckpointError, match=r"num_batches_tracked' is \(0,\), the model's \(\)"):
        load_strict(
            build(4, train_backbone_norm=True), trained | {counter: torch.zeros(0)}, "a.pth"
        )
