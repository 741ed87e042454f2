"""Names are imported at first use: a message does not wait for torch, torchvision and timm."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.launching import ROOT


@pytest.mark.parametrize("package", ["config", "data", "sharpness"])
def test_every_name_is_there_and_is_what_type_checkers_see(package):
    module = importlib.import_module(f"flatcal_dist.{package}")
    tree = ast.parse(Path(module.__file__).read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    told = {alias.name: each.module for each in block.body for alias in each.names}
    assert sorted(told) == sorted(module.__all__)
    for name, home in told.items():
        assert getattr(module, name) is getattr(importlib.import_module(home), name)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        module.nothing  # noqa: B018


@pytest.mark.parametrize(
    ("code", "not_imported"),
    [
        ("from flatcal_dist.config import TrainConfig, ConfigError, parse_yaml", ["torch"]),
        ("import flatcal_dist.training.main", ["torch"]),
        ("from flatcal_dist.config import load; load('configs/imagenet/resnet50_csam.yaml', [])",
         ["timm", "torchvision", "accelerate", "torch._dynamo", "torch.distributed.tensor"]),
    ],
)  # fmt: skip
def test_what_takes_seconds_is_not_imported(code, not_imported):
    code += f"; import sys; sys.exit(' '.join(set({not_imported}) & sys.modules.keys()) or 0)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
