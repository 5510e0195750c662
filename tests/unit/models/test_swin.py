"""Swin, which is timm's, beside torchvision's, with the file names of its makers.

Names were read from microsoft/Swin-Transformer (models/swin_transformer.py at commit
055c506510dd456f4a5f6cc52655a35ebbb1f87b).
"""

from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from models.backbones import create_backbone
from tests.lanes import some
from tests.unit.models.small import perturb
from tests.unit.models.test_own_backbones import multiplications

TINY = "timm/swin_tiny_patch4_window7_224"
DEPTHS = (2, 2, 6, 2)
# name: width of the last stage, and the parameters of the classifier for 1000 classes
PUBLISHED = {
    TINY: (768, 28_288_354),
    "timm/swin_small_patch4_window7_224": (768, 49_606_258),
    "timm/swin_base_patch4_window7_224": (1024, 87_768_224),
    "timm/swin_large_patch4_window7_224": (1536, 196_532_476),
}


@pytest.mark.long
@pytest.mark.parametrize("name", some(PUBLISHED, TINY))
def test_it_has_the_published_number_of_parameters(name: str) -> None:
    width, published = PUBLISHED[name]
    network = cast(nn.Module, create_backbone(name))
    found = sum(p.numel() for p in network.parameters())
    assert found == published - (2 * width + 1000 * width + 1000)  # its last norm and its head


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "billions"), [(TINY, 4.49), ("timm/swin_small_patch4_window7_224", 8.74)]
)
def test_it_multiplies_as_often_as_the_makers_code(name: str, billions: float) -> None:
    network = cast(nn.Module, create_backbone(name))
    assert multiplications(network) / 1e9 == pytest.approx(billions, rel=0.005)


def makers_file(network: nn.Module, path: Path) -> None:
    """Write the weights of torchvision's network as the makers' classifier has them."""
    state = network.state_dict()
    found: dict[str, Tensor] = {}

    def take(theirs: str, place: str, *kinds: str) -> None:
        found.update({f"{theirs}.{kind}": state[f"{place}.{kind}"] for kind in kinds})

    both = ("weight", "bias")
    take("patch_embed.proj", "features.0.0", *both)
    take("patch_embed.norm", "features.0.2", *both)
    for i, depth in enumerate(DEPTHS):
        for j in range(depth):
            theirs, place = f"layers.{i}.blocks.{j}", f"features.{2 * i + 1}.{j}"
            for name in ("norm1", "attn.qkv", "attn.proj", "norm2"):
                take(f"{theirs}.{name}", f"{place}.{name}", *both)
            take(f"{theirs}.attn", f"{place}.attn", "relative_position_bias_table")
            index = state[f"{place}.attn.relative_position_index"]
            found[f"{theirs}.attn.relative_position_index"] = index.view(49, 49)
            if j % 2 and i < 3:
                found[f"{theirs}.attn_mask"] = torch.zeros((8 // 2**i) ** 2, 49, 49)
            for name, number in (("fc1", 0), ("fc2", 3)):
                take(f"{theirs}.mlp.{name}", f"{place}.mlp.{number}", *both)
        if i < 3:  # at the end of a stage, where timm has it at the beginning of the next
            take(f"layers.{i}.downsample.reduction", f"features.{2 * i + 2}.reduction", "weight")
            take(f"layers.{i}.downsample.norm", f"features.{2 * i + 2}.norm", *both)
    take("norm", "norm", *both)
    take("head", "head", *both)
    assert len(found) == len(state) + 5  # the masks of five shifted blocks
    torch.save({"model": found}, path)


@pytest.mark.long
def test_a_file_of_its_makers_gives_the_maps_of_torchvision(tmp_path: Path) -> None:
    """At 224 pixels, the one size that all implementations compute alike."""
    torch.manual_seed(0)
    theirs = torchvision.models.swin_t().eval()
    perturb(theirs)
    makers_file(theirs, tmp_path / "swin.pth")
    ours = cast(nn.Module, create_backbone(TINY, weights=str(tmp_path / "swin.pth"))).eval()
    images = torch.randn(1, 3, 224, 224, dtype=torch.float64)
    x, expected = images, []
    with torch.no_grad():
        found = ours.double()(images)
        for number, stage in enumerate(theirs.double().features):
            x = stage(x)
            if number in (3, 5, 7):
                expected.append(x.permute(0, 3, 1, 2))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def learning(**options: Any) -> nn.Module:
    """Return a network in training mode, all of which learns."""
    torch.manual_seed(0)
    return cast(nn.Module, create_backbone(TINY, frozen_stages=0, **options)).train()


def gradients(network: nn.Module) -> dict[str, Tensor]:
    """Return those of a weighted sum of all maps; blocks are left out alike in every call."""
    network.zero_grad()
    torch.manual_seed(1)
    maps = network(torch.randn(2, 3, 75, 107).to(next(network.parameters()).dtype))
    weighted = [(m * torch.linspace(-1, 1, m.shape[1])[:, None, None]).sum() for m in maps]
    torch.autograd.backward(weighted)
    found = {n: p.grad.clone() for n, p in network.named_parameters() if p.grad is not None}
    assert found.keys() == dict(network.named_parameters()).keys()
    return found


@pytest.mark.slow
def test_activations_computed_again_give_the_same_gradients() -> None:
    network = learning(drop_path=0.5)
    perturb(network)
    expected = gradients(network)
    cast(Any, network).checkpointing = True
    for name, value in gradients(network).items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.slow
def test_in_bfloat16_gradients_are_float32_and_near_those_of_float32() -> None:
    network = learning()
    expected = gradients(network)
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients(network)
    largest = max(float(value.norm()) for value in expected.values())
    for name, value in expected.items():
        assert found[name].dtype == torch.float32, name
        assert (found[name] - value).norm() < 0.2 * value.norm() + 1e-2 * largest, name


@pytest.mark.slow
def test_it_compiles_as_one_graph() -> None:
    torch.compiler.reset()
    network = learning().double()
    perturb(network)
    expected = gradients(network)
    counter = CompileCounter()
    network.compile(fullgraph=True, dynamic=False, backend=counter)
    for name, value in gradients(network).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-12, msg=name)
    assert counter.frame_count == 1
