"""Networks, optimizers and schedules by name."""

import math
from contextlib import nullcontext

import pytest
import torch
import torchvision
from torch import nn

from flatcal_dist import networks
from flatcal_dist.config import ConfigError, OptimizerConfig, load
from flatcal_dist.networks import registry
from flatcal_dist.networks.evaluation_mode import in_evaluation_mode
from flatcal_dist.networks.registry import build, check_images
from flatcal_dist.networks.weights import load_weights
from flatcal_dist.training.optimizers import build_optimizer, build_schedule

LENET = """
from timm.models import register_model
from torch import nn


@register_model
def lenet(pretrained=False, *, num_classes, in_chans, kernel=3, **ignored):
    return nn.Sequential(
        nn.Conv2d(in_chans, 4, kernel), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(4, num_classes),
    )
"""


def test_a_new_file_in_the_package_is_a_network(tmp_path, monkeypatch):
    (tmp_path / "lenet.py").write_text(LENET)
    monkeypatch.setattr(networks, "__path__", [*networks.__path__, str(tmp_path)])
    registry._import_networks.cache_clear()
    network = build("lenet", 7, channels=1, image_size=8, options={"kernel": 5})
    assert network(torch.zeros(2, 1, 8, 8)).shape == (2, 7)
    assert network[0].kernel_size == (5, 5)
    with pytest.raises(ConfigError, match=r"lenett is no network .*did you mean .*lenet"):
        build("lenett", 7, 1, 8, {})


def test_unknown_names_and_options_are_refused():
    with pytest.raises(ValueError, match=r"resnet5O.*did you mean resnet50"):
        build("resnet5O", 10, 3, 32, {})
    with pytest.raises(ValueError, match=r"optimizer\.name=sgdd is not one of timm's"):
        build_optimizer(OptimizerConfig(name="sgdd"), nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"optimizer\.options\.lr: .* are other keys"):
        build_optimizer(OptimizerConfig(options={"lr": 1}), nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"optimizer.options.beta: adamw takes .*betas"):
        build_optimizer(OptimizerConfig(name="adamw", options={"beta": 1}), nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("name", "option", "message"),
    [
        ("mlp", "widht", r"did you mean width\? It has width, depth, drop_rate\. \("),
        ("resnet18", "drop_path", r"did you mean drop_path_rate\? It has block, layers, "),
        ("timm:swin_tiny_patch4_window7_224", "windw_size", r"did you mean window_size\?"),
        ("resnet20_cifar", "blcks", r"did you mean blocks\?"),
        ("lenet5", "x", r"\. It has drop_rate\. \("),
        ("torchvision:resnet18", "zero_init", r"did you mean zero_init_residual\?"),
        ("torchvision:mnasnet1_0", "alfa", r"It has alpha, dropout\. \("),
    ],
)
def test_options_that_a_network_has_not_are_refused_with_those_that_it_has(name, option, message):
    size = 32 if name in ("mlp", "resnet20_cifar", "lenet5") else 224
    start = rf"^model\.options\.{option}: model\.name={name} has no such option.*"
    with pytest.raises(ConfigError, match=start + message):
        build(name, 10, 3, size, {option: 1})


def test_sgd_is_the_papers_and_spares_biases_from_decay():
    network = nn.Linear(4, 4)
    optimizer = build_optimizer(OptimizerConfig(weight_decay=0.1), network)
    decays = {id(w): g["weight_decay"] for g in optimizer.param_groups for w in g["params"]}
    assert decays == {id(network.bias): 0.0, id(network.weight): 0.1}
    assert all(not group["nesterov"] for group in optimizer.param_groups)


def test_schedule_is_linear_warm_up_then_cosine_to_zero():
    config = load(None, ["optimizer.learning_rate=0.8", "optimizer.warmup_epochs=2"])
    optimizer = build_optimizer(config.optimizer, nn.Linear(2, 2))
    schedule = build_schedule(config, optimizer, total_steps=100, epoch_steps=10)
    seen = []
    for step in (99, 0, 5, 19, 20, 60, 100):  # in no order: a function of the step alone
        schedule.step_update(step)
        seen.append(optimizer.param_groups[0]["lr"])
    cosine = [0.4 * (1 + math.cos(math.pi * (s - 20) / 80)) for s in (99, 20, 60)]
    expected = [cosine[0], 0.04, 0.04 + 0.76 * 5 / 20, 0.04 + 0.76 * 19 / 20, *cosine[1:], 0.0]
    assert seen == pytest.approx(expected, abs=1e-12)


def rates(words, total, epoch):
    config = load(None, ["optimizer.learning_rate=0.8", *words])
    optimizer = build_optimizer(config.optimizer, nn.Linear(2, 2))
    schedule = build_schedule(config, optimizer, total, epoch)
    found = []
    for step in range(total):
        schedule.step_update(step)
        found.append(optimizer.param_groups[0]["lr"])
    return found


def test_milestones_are_epochs_from_the_start_as_torch_counts_them():
    words = ["schedule={name: multi_step, milestones: [4.0, 2.5], factor: 0.5}"]
    network = nn.Linear(2, 2)
    plain = torch.optim.SGD(network.parameters(), 0.8)
    peer = torch.optim.lr_scheduler.MultiStepLR(plain, [25, 40], 0.5)
    expected = []
    for _ in range(60):
        expected.append(plain.param_groups[0]["lr"])
        plain.step()
        peer.step()
    assert rates(words, 60, 10) == pytest.approx(expected, abs=1e-12)
    warm = rates([*words, "optimizer.warmup_epochs=1"], 60, 10)
    assert warm[10:] == pytest.approx(expected[10:], abs=1e-12)
    assert warm[:10] == pytest.approx([0.08 + 0.072 * step for step in range(10)], abs=1e-12)


def test_a_constant_rate_and_a_cosine_that_ends_above_zero():
    assert rates(["schedule.name=constant"], 30, 10) == [0.8] * 30
    cosine = rates(["schedule={name: cosine, final: 0.25}"], 100, 10)
    expected = [0.2 + 0.3 * (1 + math.cos(math.pi * step / 100)) for step in range(100)]
    assert cosine == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("name", "size"), [("googlenet", 64), ("inception_v3", 96)])
def test_torchvisions_networks_give_logits_alone_in_training(name, size, tmp_path):
    """Auxiliary heads would make of the output what no loss takes."""
    network = build(f"torchvision:{name}", 7, 3, size, {"init_weights": False}).train()
    assert network(torch.zeros(2, 3, size, size)).shape == (2, 7)
    with pytest.raises(ConfigError, match=rf"aux_logits=true gives {name} several outputs"):
        build(f"torchvision:{name}", 7, 3, size, {"aux_logits": True})
    published = torchvision.models.get_model(
        name, weights=None, num_classes=7, aux_logits=True, init_weights=False
    )
    torch.save(published.state_dict(), tmp_path / "published.pth")
    load_weights(network, tmp_path / "published.pth")
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        assert torch.equal(network.eval()(images), published.eval()(images))


class CountsAlways(nn.Module):
    """Counts passes, keeps a mean and draws a dropout in evaluation mode as well."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.frozen = nn.BatchNorm1d(2).eval()
        self.register_buffer("passes", torch.zeros((), dtype=torch.long))
        self.register_buffer("mean", torch.zeros(3))

    def forward(self, x):
        self.passes += 1
        self.mean = 0.9 * self.mean + 0.1 * x.mean(0)
        return self.frozen(nn.functional.dropout(self.linear(x), 0.5))


@pytest.mark.parametrize("fails", [False, True])
def test_an_evaluation_leaves_no_trace(fails):
    network = CountsAlways()
    network.frozen.eval()
    network(torch.randn(4, 3))
    mean, passes, stream = network.mean, network.passes.clone(), torch.get_rng_state()
    values = mean.clone()
    expected = pytest.raises(InterruptedError) if fails else nullcontext()
    with expected, torch.inference_mode(), in_evaluation_mode(network):
        assert not network.training
        network(torch.randn(4, 3))
        assert network.passes == passes + 1
        if fails:
            raise InterruptedError
    assert network.training
    assert not network.frozen.training
    assert network.mean is mean
    assert torch.equal(mean, values)
    assert network.passes == passes
    assert torch.equal(torch.get_rng_state(), stream)
    network(torch.randn(4, 3)).sum().backward()  # nothing is left of the inference mode


@pytest.mark.parametrize(
    ("name", "size", "options", "message"),
    [
        ("vit_tiny_patch16_224", 16, {}, r"data\.image_size=16 .* model\.options=\{img_size: 16\}"),
        ("vgg16_bn", 16, {}, r"data\.image_size=16 .*: RuntimeError: Given input size"),
        (
            "resnet18",
            32,
            {"global_pool": ""},
            "does not take images",
        ),
        ("resnet18", 32, {"output_stride": 7}, "AssertionError: it says no more"),
        ("resnet18", 32, {"num_classes": 3}, "follows from model.num_classes: leave it out"),
    ],
)
def test_images_that_do_not_fit_are_refused_before_training(name, size, options, message):
    with pytest.raises(ConfigError, match=message):
        check_images(name, 10, 3, size, options)


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224", "torchvision:resnet18"])
def test_trying_images_draws_no_random_number(name):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    check_images(name, 10, 3, 224, {})
    assert torch.equal(torch.get_rng_state(), before)


def test_a_network_that_looks_at_values_is_tried_with_values(monkeypatch):
    class Looks(nn.Module):
        def __init__(self, size):
            super().__init__()
            self.size, self.head = size, nn.Linear(3, 10)

        def forward(self, images):
            assert float(images.sum()) == 0  # which no tensor without values answers
            assert images.shape[-1] == self.size, "another size"
            return self.head(images.mean((2, 3)))

    monkeypatch.setattr(registry, "build", lambda *_: Looks(8))
    check_images("looks", 10, 3, 8, {})
    with pytest.raises(ConfigError, match=r"data\.image_size=9 .* another size"):
        check_images("looks", 10, 3, 9, {})
