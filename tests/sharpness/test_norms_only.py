"""select="norms": which weights it names in networks of timm, and that it perturbs no others."""

import pytest
import timm
import torch
from timm.models.swin_transformer import SwinTransformer
from torch import nn

from flatcal_dist.sharpness import SAM, LookSAM, ReplicatedEngine, SharpnessAwareStep, StepError
from flatcal_dist.sharpness.weights import norm_weights


def swin() -> nn.Module:
    sizes = {"img_size": 32, "patch_size": 4, "window_size": 4, "num_classes": 5}
    return SwinTransformer(embed_dim=16, depths=(1, 1), num_heads=(1, 2), **sizes)


NETWORKS = {
    name: lambda name=name: timm.create_model(name, num_classes=5)
    for name in (
        "test_resnet",
        "test_vit",
        "test_convnext",
        "test_convnext2",
        "test_efficientnet",
        "test_efficientnet_gn",
        "test_efficientnet_ln",
    )
} | {"swin": swin}


def with_vectors_as_weights(network: nn.Module) -> set[str]:
    """The parameters of modules whose `weight` is a vector: here norm layers alone."""
    return {
        f"{layer}.{name}"
        for layer, module in network.named_modules()
        if getattr(module, "weight", None) is not None and module.weight.dim() == 1
        for name, _ in module.named_parameters(recurse=False)
    }


@pytest.mark.parametrize("name", NETWORKS)
def test_exactly_the_norm_layers_of_networks_of_timm(name):
    network = NETWORKS[name]()
    expected = with_vectors_as_weights(network)
    assert norm_weights(network) == expected
    assert 5 < len(expected) < len(list(network.parameters()))


def test_only_they_move():
    network = NETWORKS["swin"]()
    before = {name: weight.detach().clone() for name, weight in network.named_parameters()}
    seen = []
    network.register_forward_pre_hook(
        lambda *_: seen.append({n: w.detach().clone() for n, w in network.named_parameters()})
    )
    engine = ReplicatedEngine(network, torch.optim.SGD(network.parameters(), 0.1))
    step = SharpnessAwareStep(engine, SAM(0.3, select="norms"))
    result = step([(torch.randn(4, 3, 32, 32), torch.arange(4))], measure=True)
    moved = {name for name, weight in before.items() if not torch.equal(weight, seen[1][name])}
    assert moved == norm_weights(network)
    assert result.perturbation_norm == pytest.approx(0.3, rel=1e-5)


@pytest.mark.parametrize(
    "network",
    [timm.create_model("test_nfnet", num_classes=5), nn.Linear(3, 2)],
    ids=["nfnet", "linear"],
)
def test_networks_without_norm_layers_are_refused(network):
    engine = ReplicatedEngine(network, torch.optim.SGD(network.parameters(), 0.1))
    with pytest.raises(StepError, match="has no norm layer with trained weights"):
        SharpnessAwareStep(engine, SAM(0.1, select="norms"))


def test_norm_layers_that_are_frozen_are_none():
    network = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    network[1].requires_grad_(False)
    weights = [w for w in network.parameters() if w.requires_grad]
    engine = ReplicatedEngine(network, torch.optim.SGD(weights, 0.1))
    with pytest.raises(StepError, match="Use select='all'"):
        SharpnessAwareStep(engine, SAM(0.1, select="norms"))


def test_what_is_not_finite_elsewhere_skips_the_step_and_is_not_remembered():
    """The gradient of a weight that does not move is a part of what LookSAM remembers."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    calls = []

    def spoil(gradient):
        calls.append(1)
        return gradient * float("inf") if len(calls) == 1 else gradient

    network[0].bias.register_hook(spoil)
    engine = ReplicatedEngine(network, torch.optim.SGD(network.parameters(), 0.1))
    step = SharpnessAwareStep(engine, LookSAM(0.1, every=2, select="norms"))
    batch = torch.randn(6, 3), torch.randint(2, (6,))
    assert step([batch]).skipped
    assert step.memory is None
    assert not step([batch], at=0).skipped
    assert all(g.isfinite().all() for g in step.memory.values())
