"""The multilayer perceptron, built by its name."""

import pytest
import torch

from flatcal_dist.networks.pretrained import build_pretrained, settings
from flatcal_dist.networks.registry import build
from flatcal_dist.networks.weights import WeightsError


def test_it_has_the_shape_of_the_protocol():
    network = build("mlp", 10, channels=1, image_size=8, options={"width": 512, "depth": 2})
    shapes = [tuple(weight.shape) for weight in network.parameters() if weight.ndim == 2]
    assert shapes == [(512, 64), (512, 512), (10, 512)]
    assert network(torch.zeros(3, 1, 8, 8)).shape == (3, 10)


@pytest.mark.parametrize(
    "options", [{"width": 0}, {"width": -5}, {"depth": -1}, {"depth": 1.5}, {"drop_rate": 1.0}]
)
def test_impossible_options_are_refused(options):
    with pytest.raises(
        ValueError,
        match=rf"(does not fit model.name=mlp: .*|model\.options\.){next(iter(options))}=",
    ):
        build("mlp", 10, 1, 8, options)


def test_it_has_no_published_weights():
    assert settings("mlp", published=False) == []
    with pytest.raises(WeightsError, match="mlp has no published weights"):
        build_pretrained("timm:mlp", 1, {"img_size": 8})
