"""The networks for small images: sizes of the papers, functions of the published code, two steps.

Counts and logits of the published code were computed with it (FMFP at 97f673c, and
torrvision/focal_calibration at 475422a for resnet50_cifar), and stand here as literals.
"""

import re
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import pytest
import timm
import torch
from timm.layers import DropPath
from torch import Tensor, nn

import flatcal_dist.networks
from flatcal_dist.config import ConfigError
from flatcal_dist.networks.features import watching_features
from flatcal_dist.networks.pretrained import build_pretrained, settings
from flatcal_dist.networks.registry import build
from flatcal_dist.networks.weights import WeightsError
from flatcal_dist.sharpness import SAM, ReplicatedEngine, SharpnessAwareStep
from flatcal_dist.sharpness.networks import refuse_unheld
from tests.support.engines import ENGINES, make_engine, used
from tests.support.ranks import on_ranks

README = Path(flatcal_dist.networks.__file__).parent / "README.md"


class Published(NamedTuple):
    """What is published of a network.

    Attributes:
        code: The number of parameters of the published code, with 10 classes.
        paper: The paper's number of parameters in millions, or None if it has no figure.
        logits: The first logits of the published code on the weights and the image of `filled`.
        classes: The number of classes that the paper's figure is for.
        options: The options with which the network is that of the published code.
    """

    code: int
    paper: float | None
    logits: tuple[float, float, float]
    classes: int = 10
    options: dict[str, bool] = {}  # noqa: RUF012, which is for mutable defaults of classes


NETWORKS = {
    "preact_resnet110": Published(1_730_522, 1.7, (690.45, 1202.6, -416.9)),
    "preact_resnet20": Published(272_282, 0.27, (0.90314, -4.2509, 2.1334)),
    "wrn_28_10": Published(36_479_194, 36.5, (-0.83843, -7.4052, 2.9045)),
    "densenet_bc_100": Published(769_162, 0.8, (-0.21109, 0.70179, -0.092851)),
    "convmixer_256_16": Published(1_339_402, None, (83.078, -1.1314, -39.01)),
    "resnet18_cifar": Published(11_173_962, None, (-5.3422, 4.6226, -1.9702)),
    "resnet20_cifar": Published(
        272_474, 0.27, (1.363, -0.47659, -0.37535), options={"projection": True}
    ),
    "resnet50_cifar": Published(23_520_842, None, (-8.9865, 8.8934, 1.0369)),
    "mobilenetv2_cifar": Published(2_237_770, None, (-0.26062, 1.3388, 0.39812)),
    "efficientnet_b0_cifar": Published(4_020_358, 5.3, (0.25726, -0.1327, 0.046427), 1000),
    "vgg16_bn_cifar": Published(15_253_578, None, (0.25694, -0.091521, 0.14711)),
    "lenet5": Published(62_006, None, (6.7976, -1.5451, -4.0466)),
}
# The other networks have residuals, which stochastic depth can leave out.
WITHOUT_RESIDUALS = ("densenet_bc_100", "vgg16_bn_cifar", "lenet5")
# Others of the same kind take the same steps.
LARGER = ("preact_resnet110", "wrn_28_10", "resnet50_cifar", "vgg16_bn_cifar")
SIDES = {"vgg16_bn_cifar": 32, "lenet5": 16}  # pixels that are enough for two steps; else 8


def made(name: str, classes: int = 10, channels: int = 3, size: int = 32, **options) -> nn.Module:
    return build(name, classes, channels, size, options)


def shaped(name: str, *arguments: int, **options) -> nn.Module:
    """The network without values, which are not drawn: for shapes alone."""
    with torch.device("meta"):
        return made(name, *arguments, **options)


def outlined(name: str, **options) -> nn.Module:
    """A network of timm, without values, too."""
    with torch.device("meta"):
        return timm.create_model(name, **options)


def count(network: nn.Module) -> int:
    return sum(weight.numel() for weight in network.parameters())


@torch.no_grad()
def filled(network: nn.Module) -> tuple[nn.Module, Tensor]:
    """Give all layers weights by one rule, in their order, and return an image as well.

    A value that the rule leaves out is not a number, and neither are the logits then.
    """
    network = network.to_empty(device="cpu")
    for value in (*network.parameters(), *network.buffers()):
        value.fill_(float("nan") if value.is_floating_point() else 0)
    generator = torch.Generator().manual_seed(0)

    def draw(tensor: Tensor, mean: float, spread: float) -> None:
        tensor.copy_(mean + spread * torch.randn(tensor.shape, generator=generator))

    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            draw(layer.weight, 1, 0.1)
            draw(layer.bias, 0, 0.1)
            draw(layer.running_mean, 0, 0.1)
            variance = torch.rand(layer.running_var.shape, generator=generator)
            layer.running_var.copy_(1 + variance)
        elif isinstance(layer, nn.Conv2d | nn.Linear):
            draw(layer.weight, 0, (2 / layer.weight[0].numel()) ** 0.5)
            if layer.bias is not None:
                draw(layer.bias, 0, 0.1)
    return network, torch.randn(1, 3, 32, 32, generator=generator)


@pytest.mark.parametrize("name", NETWORKS)
def test_sizes_are_those_of_the_published_code_and_of_the_paper(name):
    published = NETWORKS[name]
    assert count(shaped(name, **published.options)) == published.code
    if published.paper is not None:
        digits = len(str(published.paper).partition(".")[2])
        size = count(shaped(name, published.classes)) / 1e6
        assert round(size, digits) == published.paper


def test_sizes_that_papers_give_for_other_forms_follow():
    """What another form has more or fewer is counted by hand."""
    # MobileNetV2: 3.4 M in the paper. The layers of its table 2 have 3,504,872 parameters, and
    # 3,470,760 without norms. Here the first block has 32 x 32 weights and a norm more.
    theirs = outlined("mobilenetv2_100")
    norms = [m for m in theirs.modules() if isinstance(m, nn.BatchNorm2d)]
    assert count(theirs) == 3_504_872
    assert count(theirs) - sum(count(norm) for norm in norms) == 3_470_760
    assert count(shaped("mobilenetv2_cifar", 1000)) == 3_504_872 + 32 * 32 + 2 * 32
    # LeNet-5: 60,000. C3 sees a part of the channels, S2 and S4 have weights, the output is fixed.
    assert count(shaped("lenet5", channels=1)) - 900 + (12 + 32) - 850 == 60_000
    # ResNet-18 and -50, EfficientNet-B0: timm's, but for the stem and the number of classes.
    for name in ("resnet18", "resnet50"):
        theirs = count(outlined(name, num_classes=10))
        assert count(shaped(f"{name}_cifar")) == theirs - (49 - 9) * 3 * 64
    theirs = count(outlined("efficientnet_b0"))
    assert count(shaped("efficientnet_b0_cifar", 1000)) == theirs == 5_288_548
    # VGG-16: 138 M, of which convolutions have 14.7 M. Norms have 2 x 4,224.
    theirs = count(outlined("vgg16").features)
    assert count(shaped("vgg16_bn_cifar").features) == theirs + 2 * 4_224
    assert round(theirs / 1e6, 1) == 14.7
    # ResNet-20, -32, -44, -56 and -110 (table 6), without weights in the shortcuts.
    for blocks, millions in ((3, 0.27), (5, 0.46), (7, 0.66), (9, 0.85), (18, 1.7)):
        found = count(shaped("resnet20_cifar", blocks=blocks)) / 1e6
        assert round(found, len(str(millions)) - 2) == millions
    assert count(shaped("resnet20_cifar")) == 269_722
    assert count(shaped("resnet20_cifar", blocks=1, width=32, projection=True)) == 308_650
    # ConvMixer: h (d (k^2 + h + 6) + c p^2 + K + 3) + K.
    assert count(shaped("convmixer_256_16")) == 256 * (16 * (64 + 256 + 6) + 3 + 10 + 3) + 10


def test_a_resnet_without_norms_has_none_and_trains():
    network = made("resnet20_cifar", blocks=1, width=4, projection=True, batch_norm=False)
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in network.modules())
    network(torch.randn(2, 3, 32, 32)).square().mean().backward()
    assert all(weight.grad.abs().sum() > 0 for weight in network.parameters())
    for wrong in ({"blocks": 0}, {"width": 1.5}, {"blocks": True}):
        with pytest.raises(ConfigError, match="is a whole number from 1 on"):
            build("resnet20_cifar", 10, 3, 32, wrong)


def test_the_readme_has_the_sizes():
    rows = re.findall(r"^\| `(\w+)` \| ([\d,]+) \|", README.read_text(), re.MULTILINE)
    assert {name: int(size.replace(",", "")) for name, size in rows} == {
        name: count(shaped(name)) for name in NETWORKS
    }


@pytest.mark.parametrize("name", NETWORKS)
def test_logits_are_those_of_the_published_code_on_the_same_weights(name):
    published = NETWORKS[name]
    network, image = filled(shaped(name, **published.options).eval())
    with torch.no_grad():
        logits = network(image)[0]
    close = 1e-4 * float(logits.abs().max())  # five digits are written above
    assert logits[:3].tolist() == pytest.approx(published.logits, abs=close)


@pytest.mark.parametrize("name", NETWORKS)
def test_any_number_of_classes_and_channels_at_32_and_64_pixels(name):
    shapes = []
    for size, channels, classes in ((32, 3, 100), (64, 3, 200), (32, 1, 7)):
        network = shaped(name, classes, channels, size).eval()
        images = torch.zeros(2, channels, size, size, device="meta")
        with torch.no_grad():
            assert network(images).shape == (2, classes)
        shapes.append({n: w.shape for n, w in network.named_parameters()})
    same = [n for n in shapes[0] if shapes[0][n] == shapes[1][n]]
    other = len(shapes[0]) - len(same)  # the last layer; LeNet's first linear one
    assert other == (3 if name == "lenet5" else 2)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.exhaustive if name in LARGER else ())
        for name in NETWORKS
    ],
)
def test_two_steps_move_every_weight(name):
    torch.manual_seed(0)
    side = SIDES.get(name, 8)
    network = made(name, 3, 1, side)
    refuse_unheld(network, "DeepSpeed")  # all engines hold it
    before = {n: w.detach().clone() for n, w in network.named_parameters()}
    optimizer = torch.optim.SGD(network.parameters(), 0.05, momentum=0.9)
    step = SharpnessAwareStep(ReplicatedEngine(network, optimizer), SAM(0.05))
    batch = torch.randn(4, 1, side, side), torch.arange(4) % 3
    results = [step([batch]) for _ in range(2)]
    assert not any(result.skipped for result in results)
    assert all(result.perturbed_loss != result.loss for result in results)
    still = [n for n, w in network.named_parameters() if torch.equal(w, before[n])]
    assert still == []


@pytest.mark.parametrize("name", NETWORKS)
def test_features_are_the_input_of_the_last_layer(name):
    """So scores of features, such as trust_score, work with them."""
    side = SIDES.get(name, 8)
    network = filled(shaped(name, 3, 3, side).eval())[0]
    images = torch.randn(2, 3, side, side)
    with torch.no_grad(), watching_features(network, name, 3) as features:
        logits = network(images)
        found = features(logits)
        own = network.forward_head(network.forward_features(images), pre_logits=True)
        assert torch.allclose(network.get_classifier()(own), logits, atol=1e-5)
    assert found.shape == (2, network.num_features if name != "vgg16_bn_cifar" else 512)
    assert torch.allclose(found, own)


@pytest.mark.parametrize("name", NETWORKS)
def test_stochastic_depth_grows_from_residual_to_residual(name):
    if name in WITHOUT_RESIDUALS:
        with pytest.raises(ConfigError, match="drop_path_rate"):
            made(name, drop_path_rate=0.1)
        return
    network = shaped(name, drop_path_rate=0.3)
    rates = [m.drop_prob for m in network.modules() if isinstance(m, DropPath)]
    assert len(rates) > 6
    assert all(a < b for a, b in pairwise(rates))
    assert rates[-1] <= 0.3 + 1e-6
    assert count(network) == count(shaped(name))


def test_what_does_not_fit_is_refused():
    with pytest.raises(ConfigError, match=r"lenet5 takes images of 16, 20, 24, \.\.\. pixels"):
        made("lenet5", size=30)
    with pytest.raises(WeightsError, match="wrn_28_10 has no published weights"):
        build_pretrained("wrn_28_10", 3, {})
    assert settings("wrn_28_10", published=False) == []


def steps_on_ranks(rank, world_size, kind):
    """By network: the loss after a step, and the weights after two."""
    outcome = {}
    for name in ("lenet5", "preact_resnet20"):
        torch.manual_seed(0)
        engine = make_engine(kind, made(name, 3, 1, 16).train())
        step = SharpnessAwareStep(engine, SAM(0.05))
        generator = torch.Generator().manual_seed(rank)
        images = torch.randn(3, 1, 16, 16, generator=generator)
        results = [step([(images, torch.arange(3))]) for _ in range(2)]
        assert not any(result.skipped for result in results)
        names = [n for n, _ in engine.named.named_parameters()]
        outcome[name] = results[-1].loss, {n: w for n, w in used(engine).items() if n in names}
    return outcome


@pytest.fixture(scope="module")
def on_ddp():
    return on_ranks(2, steps_on_ranks, "ddp")[0]


@pytest.mark.parametrize("kind", ENGINES[1:])
def test_steps_on_every_engine(kind, on_ddp):
    for outcome in on_ranks(2, steps_on_ranks, kind):
        for name, (loss, weights) in outcome.items():
            assert loss == pytest.approx(on_ddp[name][0], rel=1e-4)
            for weight in weights:
                assert torch.allclose(weights[weight], on_ddp[name][1][weight], atol=1e-4), weight


@pytest.mark.parametrize("rate", [-0.1, 1.0, 1.5, True, "yes", None])
@pytest.mark.parametrize("key", ["drop_rate", "drop_path_rate"])
def test_a_rate_that_is_no_share_is_refused(key, rate):
    """Networks themselves take some of them and train without meaning, or fail in a later step."""
    with pytest.raises(ConfigError, match=rf"model\.options\.{key}=.* is no share"):
        build("preact_resnet20", 10, 3, 32, {key: rate})
    with pytest.raises(ConfigError, match="is no share"):
        build("timm:resnet18", 10, 3, 32, {key: rate})


def test_images_that_do_not_fit_a_network_are_refused():
    with pytest.raises(
        ConfigError, match="vgg16_bn_cifar takes images of 32 pixels or more, not 1"
    ):
        build("vgg16_bn_cifar", 10, 3, 16, {})
    with pytest.raises(ConfigError, match=r"img_size=64 is another size .* data\.image_size=32"):
        build("lenet5", 10, 3, 32, {"img_size": 64})
