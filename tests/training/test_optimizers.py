"""The optimizer that a configuration names."""

import importlib.util

import pytest
from torch import nn

from flatcal_dist.config import ConfigError, OptimizerConfig
from flatcal_dist.training.optimizers import build_optimizer


@pytest.mark.parametrize(
    ("name", "package"), [("fusedsgd", "apex"), ("bnbadam8bit", "bitsandbytes")]
)
def test_an_optimizer_whose_package_is_missing_is_refused(name, package):
    """timm lists the optimizers of these packages whether they are installed or not."""
    if importlib.util.find_spec(package):
        pytest.skip(f"{package} is installed")
    with pytest.raises(ConfigError, match=f"optimizer.name={name} cannot be used here"):
        build_optimizer(OptimizerConfig(name=name), nn.Linear(2, 2))
