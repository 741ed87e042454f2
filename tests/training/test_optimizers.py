"""The optimizer that a configuration names, and its groups of weights."""

import importlib.util
import math

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from flatcal_dist.config import ConfigError, OptimizerConfig, load
from flatcal_dist.networks.registry import build
from flatcal_dist.sharpness import SharpnessAwareStep
from flatcal_dist.training.optimizers import build_optimizer, build_schedule, learning_rate
from tests.support.engines import MOST, everywhere, make_engine
from tests.support.reference import CLOSE, far, make_batch, train

LAYERED = ["optimizer.learning_rate=0.2", "optimizer.weight_decay=0.3", "optimizer.layer_decay=0.5"]
STEPS = 3


def by_name(optimizer: torch.optim.Optimizer, network: nn.Module, key: str) -> dict[str, float]:
    of = {id(w): group[key] for group in optimizer.param_groups for w in group["params"]}
    return {name: of[id(w)] for name, w in network.named_parameters()}


@pytest.mark.parametrize(
    ("name", "package"), [("fusedsgd", "apex"), ("bnbadam8bit", "bitsandbytes")]
)
def test_an_optimizer_whose_package_is_missing_is_refused(name, package):
    """timm lists the optimizers of these packages whether they are installed or not."""
    if importlib.util.find_spec(package):
        pytest.skip(f"{package} is installed")
    with pytest.raises(ConfigError, match=f"optimizer.name={name} cannot be used here"):
        build_optimizer(OptimizerConfig(name=name), nn.Linear(2, 2))


@pytest.mark.parametrize("layer_decay", [1.0, 0.5])
def test_everything_is_decayed_or_matrices_that_the_network_does_not_exempt(layer_decay):
    network = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=3)
    config = OptimizerConfig(weight_decay=0.1, layer_decay=layer_decay)
    decays = by_name(build_optimizer(config, network), network, "weight_decay")
    shapes = {name: w.shape for name, w in network.named_parameters()}
    exempt = ("cls_token", "pos_embed")
    assert decays == {n: 0.1 * (len(s) > 1 and n not in exempt) for n, s in shapes.items()}
    config = config.model_copy(update={"decayed": "all"})
    decays = by_name(build_optimizer(config, network), network, "weight_decay")
    assert decays == dict.fromkeys(shapes, 0.1)


@pytest.mark.parametrize(
    ("name", "layers", "below"),
    [
        ("preact_resnet20", 11, "stages.2.blocks.2.conv2.weight"),
        ("resnet20_cifar", 11, "features.9.conv2.weight"),
        ("densenet_bc_100", 50, "features.denseblock3.denselayer16.conv2.weight"),
        ("convmixer_256_16", 18, "blocks.15.1.weight"),
        ("mobilenetv2_cifar", 19, "blocks.6.0.conv_pw.weight"),
        ("vgg16_bn_cifar", 16, "neck.2.1.weight"),
        ("lenet5", 5, "neck.2.0.weight"),
        ("mlp", 3, "hidden.1.weight"),
        ("resnet18", 10, "layer4.1.conv2.weight"),
    ],
)
def test_layers_learn_with_rates_that_grow_to_the_last(name, layers, below):
    network = build(name, 10, 3, 32, {})
    optimizer = build_optimizer(OptimizerConfig(learning_rate=0.2, layer_decay=0.5), network)
    build_schedule(load(None, LAYERED), optimizer, 10, 5).step_update(0)
    rates = by_name(optimizer, network, "lr")
    names = list(rates)
    assert rates[names[-1]] == 0.2
    assert rates[below] == 0.1
    assert min(rates.values()) == rates[names[0]] == pytest.approx(0.2 * 0.5 ** (layers - 1))
    assert len(set(rates.values())) == layers
    assert learning_rate(optimizer) == pytest.approx(0.2)


def test_a_network_that_does_not_tell_its_layers_is_refused():
    network = build("torchvision:resnet18", 10, 3, 32, {})
    with pytest.raises(ConfigError, match=r"layer_decay=0\.5 needs the order of the layers, .*Res"):
        build_optimizer(OptimizerConfig(layer_decay=0.5), network)


def layered() -> nn.Sequential:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 5)
    )
    network.group_matcher = lambda coarse=False: {"blocks": r"^(\d+)\."}
    return network


def trained(rank, world_size, kind):
    """The weights after steps with a schedule, and the rate that is logged, by step."""
    config, rates = load(None, LAYERED), []
    engine = make_engine(
        kind, layered(), optimizer=lambda network: build_optimizer(config.optimizer, network)
    )
    schedule = build_schedule(config, engine.optimizer, STEPS, STEPS)
    step = SharpnessAwareStep(engine, None)
    for number in range(STEPS):
        schedule.step_update(number)
        rates.append(learning_rate(engine.optimizer))
        train(step, rank, world_size, 2, [number])
    return engine.full_weights(), rates


@pytest.mark.parametrize("kind", MOST)
def test_each_layer_has_its_rate_on_every_engine(kind):
    network = layered()
    scales = {"0": 0.25, "2": 0.5, "4": 1.0}
    velocity = {n: torch.zeros_like(w) for n, w in network.named_parameters()}
    expected = [0.1 * (1 + math.cos(math.pi * number / STEPS)) for number in range(STEPS)]
    for number in range(STEPS):
        inputs, labels = make_batch(number)
        network.zero_grad()
        F.cross_entropy(network(inputs), labels).backward()
        with torch.no_grad():
            for name, w in network.named_parameters():
                decay = 0.3 if name.endswith("weight") else 0.0
                velocity[name].mul_(0.9).add_(w.grad + decay * w)
                w -= expected[number] * scales[name[0]] * velocity[name]
    weights, rates = everywhere(kind, trained)[0]
    assert far(weights, network.state_dict()) < CLOSE
    assert rates == pytest.approx(expected)
