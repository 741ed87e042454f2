"""Runs of SAM that keep an average of a network with batch norm: from the start to the export."""

from random import Random

import pytest
import timm
import torch
from torch import nn
from torch.optim.swa_utils import update_bn

from flatcal_dist.checkpoints.format import CheckpointError, load_progress
from flatcal_dist.checkpoints.resharding import assemble, fill_network
from flatcal_dist.config import load, method_of
from flatcal_dist.inputs import evaluation_batches, open_index
from tests.support.jobs import Run, kill, same, stop_after_six

EMA = ("average.name=ema", "average.decay=0.9")
# FMFP. Three steps an epoch: one epoch is averaged when the run stops after six steps.
SWA = ("average={name: swa, start_epoch: 1}", "data.global_batch_size=256")
LENGTH = 35  # steps: the last epoch is a short one, with and without 256 images in a batch
CONVOLUTIONAL = (
    "sharpness={rule: sam, rho: 0.05}", "model.name=test_byobnet", "model.options={}",
    "optimizer.learning_rate=0.5", "train.keep_best=nll", f"train.max_steps={LENGTH}",
    "train.checkpoint_every_epochs=1", "train.keep_checkpoints=100",
)  # fmt: skip


@pytest.fixture(scope="module")
def data(digits_shards):
    return digits_shards


def pictures_of(config, split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """All images [N, 1, 8, 8] of a split, as evaluation sees them, and their labels."""
    pattern = getattr(config.data, split)
    where = config.data.model_copy(update={"validation": pattern})
    config = config.model_copy(update={"data": where})
    index = open_index(config.data, "validation", 10)
    batches = list(evaluation_batches(config, index, 0, 1, pin_memory=False))
    images = torch.cat([b.images[b.valid] for b in batches])
    return images / 255, torch.cat([b.labels[b.valid] for b in batches])


def nll(network: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    with torch.no_grad():
        return float(nn.functional.cross_entropy(network.eval()(images), labels))


def far_from_mean(run: Run, steps: range) -> float:
    """How far the exported weights are from the plain mean of those in these checkpoints."""
    paths = [run.path / f"checkpoints/step_{step:08d}" for step in steps]
    moments = [assemble(path, optimizer=False).weights for path in paths]
    weights = run.weights()
    assert moments[0].keys() <= weights.keys()
    return max(
        float((weights[name] - torch.stack([m[name] for m in moments]).mean(0)).abs().max())
        for name in moments[0]
    )


@pytest.mark.exhaustive
@pytest.mark.parametrize("average", [pytest.param(EMA, id="ema"), pytest.param(SWA, id="swa")])
def test_a_run_validates_keeps_exports_and_resumes_the_average_with_its_own_statistics(
    data, tmp_path, average
):
    run = Run(tmp_path / "run", data, "ddp", *CONVOLUTIONAL, *average)
    assert run.start(fault=stop_after_six).wait() == [75, 75]
    assert kill(run, Random(0), way=0)  # one rank, some steps later
    run.finish()
    stayed = Run(tmp_path / "stayed", data, "ddp", *CONVOLUTIONAL, *average).finish()
    assert same(run, stayed), "resumed bit for bit"

    config = load(run.path / "config.yaml")
    assert method_of(config) == f"sam+{config.average.name}"
    if config.average.name == "swa":
        assert far_from_mean(run, range(6, LENGTH, 3)) < 1e-6
    validation, training = pictures_of(config, "validation"), pictures_of(config, "train")
    network = timm.create_model("test_byobnet", in_chans=1, num_classes=10)
    network.load_state_dict(run.weights())
    ours = nll(network, *validation)
    last = max(record["val/nll"] for key, record in run.records().items() if key == (LENGTH, True))
    assert ours == pytest.approx(last, abs=1e-5), "what was validated is what was exported"
    update_bn(training[0].split(64), network)
    # 800 images instead of the 768 in whole batches, and in batches of other images.
    assert ours == pytest.approx(nll(network, *validation), rel=0.1)

    for path in sorted(run.path.glob("checkpoints/step_*")):
        fill_network(network, path)
        said = load_progress(path).validation.get("nll")
        if said is not None:
            assert nll(network, *validation) == pytest.approx(said, abs=1e-5), path
    assert said is not None, "the last one was validated"

    state = torch.load(path / "state_00000.pt")
    del state["average_statistics"]
    torch.save(state, path / "state_00000.pt")
    with pytest.raises(CheckpointError, match=r"running statistics of batch norm.* older version"):
        fill_network(network, path)
