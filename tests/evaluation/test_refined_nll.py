"""The NLL after cross-fitted temperature in validation: over ranks as one process computes it."""

from pathlib import Path

import pytest
import torch

from flatcal_dist.calibration.calibrators.refinement import refined_nll
from flatcal_dist.config import load
from flatcal_dist.data import prepare_digits
from flatcal_dist.evaluation.predicting import predict
from flatcal_dist.evaluation.running import running_metrics
from flatcal_dist.inputs import open_index
from flatcal_dist.networks.registry import build
from tests.evaluation.small_networks import join
from tests.support.ranks import on_ranks

pytestmark = pytest.mark.filterwarnings("ignore:no finite temperature")
KEPT = "train.keep_best=refined_nll"


def validated(rank: int, world_size: int, data: str) -> tuple[dict[str, float], float | None]:
    """What validation logs, and the value from the logits of one process."""
    accelerator = join(rank, world_size)
    config = load(Path("configs/digits/csam.yaml"), [f"data.validation={data}", KEPT])
    torch.manual_seed(0)
    index = open_index(config.data, "validation", 10)
    module = build("mlp", 10, channels=1, image_size=8, options={})
    found = predict(config, module, index, accelerator)
    own = None
    if world_size == 1:
        own = refined_nll(index.keys(), found.logits, index.label)
    return running_metrics(config, module, index, accelerator), own


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    return str(prepare_digits(tmp_path_factory.mktemp("data") / "digits"))


def test_ranks_agree_with_one_process(data: str) -> None:
    alone, own = validated(0, 1, data)
    assert alone["val/refined_nll"] == own
    assert own < alone["val/nll"] + 0.05
    for figures, _ in on_ranks(2, validated, data):
        # The forward pass of other batches rounds otherwise.
        assert figures["val/refined_nll"] == pytest.approx(own, rel=1e-6)
