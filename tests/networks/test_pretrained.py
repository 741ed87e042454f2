"""Published weights: how their libraries evaluate them, and what is said when they are away."""

import math
import urllib.error

import huggingface_hub.constants
import pytest
import timm
import torch
import torchvision
from torchvision.transforms._presets import ImageClassification

from flatcal_dist import config
from flatcal_dist.config import ConfigError
from flatcal_dist.networks.pretrained import build_pretrained, crop_share, settings
from flatcal_dist.networks.registry import build
from flatcal_dist.networks.weights import WeightsError, weights_hash


@pytest.mark.parametrize(
    ("name", "resized", "classes"),
    [("resnet50", 232, 1000), ("resnet50.IMAGENET1K_V1", 256, 1000), ("vit_b_16", 256, 1000)],
)
def test_torchvisions_settings(name, resized, classes):
    found = config.load(
        None, [f"model.name=torchvision:{name}", *settings(f"torchvision:{name}", True)]
    )
    data = found.data
    assert (data.image_size, math.floor(data.image_size / data.crop_pct)) == (224, resized)
    assert (data.mean, data.interpolation) == ([0.485, 0.456, 0.406], "bilinear")
    assert found.model.num_classes == classes


def test_resized_sides_survive_rounding():
    """For every published weight of torchvision's classifiers, floor(size / share) is its side."""
    seen = set()
    for name in torchvision.models.list_models(module=torchvision.models):
        for weights in torchvision.models.get_model_weights(name):
            how = weights.transforms()
            assert isinstance(how, ImageClassification), name
            seen.add((how.crop_size[0], how.resize_size[0]))
    assert len(seen) > 10
    for size, resized in seen:
        assert math.floor(size / crop_share(size, resized)) == resized


def test_timms_settings_with_a_tag():
    cfg = timm.get_pretrained_cfg("resnet50.a1_in1k")
    found = config.load(None, settings("timm:resnet50.a1_in1k", True))
    assert found.data.image_size == cfg.test_input_size[-1] == 288
    assert found.data.crop_pct == cfg.test_crop_pct
    many = settings("timm:vit_base_patch16_224.augreg_in21k", True)
    assert "model.num_classes=21843" in many
    assert not any("num_classes" in s for s in settings("timm:resnet50", False))


def test_torchvisions_network_with_weights_from_its_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    module = torchvision.models.squeezenet1_1()
    (tmp_path / "hub/checkpoints").mkdir(parents=True)
    url = torchvision.models.get_model_weights("squeezenet1_1").DEFAULT.url
    torch.save(module.state_dict(), tmp_path / "hub/checkpoints" / url.rpartition("/")[2])
    loaded = build_pretrained("torchvision:squeezenet1_1", 3, {})
    assert weights_hash(loaded) == weights_hash(module)
    with torch.no_grad():
        loaded.classifier[1].bias[0] += 1e-3
    assert weights_hash(loaded) != weights_hash(module)


def test_without_a_network_the_error_says_what_to_do(tmp_path, monkeypatch):
    def nothing(*arguments, **options):
        raise urllib.error.URLError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "urlopen", nothing)
    with pytest.raises(WeightsError, match=r"(?s)resnet18 cannot be had: .*no network.*--weights"):
        build_pretrained("torchvision:resnet18", 3, {})
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(WeightsError, match=r"(?s)timm:resnet10t cannot be had: .*HF_HOME"):
        build_pretrained("timm:resnet10t", 3, {})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("torchvision:resnet5O", "no classification network 'resnet5O'; did you mean"),
        ("torchvision:fcn_resnet50", "no classification network"),
        ("keras:resnet50", "expected NAME, timm:NAME or torchvision:NAME"),
    ],
)
def test_unknown_names_are_refused(name, message):
    with pytest.raises(ConfigError, match=message):
        build(name, 10, 3, 32, {})
    with pytest.raises(ConfigError, match=message):
        settings(name, False)


def test_unknown_weights_are_refused():
    with pytest.raises(ConfigError, match="no weights 'V7' of resnet50, only IMAGENET1K_V1, "):
        settings("torchvision:resnet50.V7", True)
    with pytest.raises(ConfigError, match="take 3 channels"):
        build("torchvision:resnet18", 10, 1, 32, {})


def test_both_libraries_by_prefix():
    by_name = build("resnet18", 7, 3, 32, {})
    assert build("timm:resnet18", 7, 3, 32, {}).state_dict().keys() == by_name.state_dict().keys()
    other = build("torchvision:resnet18", 7, 3, 32, {})
    assert other.fc.out_features == 7
    assert type(other).__module__.startswith("torchvision")
