"""What rules remember, in checkpoints that other engines and other numbers of ranks go on from."""

from pathlib import Path

import pytest
import torch.distributed as dist

from flatcal_dist.checkpoints import format as checkpoint
from flatcal_dist.checkpoints import resharding
from flatcal_dist.checkpoints.format import Progress
from flatcal_dist.sharpness import SharpnessAwareStep
from tests.support.engines import make_engine
from tests.support.ranks import on_ranks
from tests.support.reference import CLOSE, RULES, far, reference, train

REMEMBERING = ("friendly_sam", "stale_sam")


def saves(rank: int, world_size: int, kind: str, folder: str) -> None:
    """Three steps, and a checkpoint."""
    for name in REMEMBERING:
        step = SharpnessAwareStep(make_engine(kind), RULES[name])
        train(step, rank, world_size, numbers=range(3))
        progress = Progress(
            3, None, kind, world_size=world_size, sharded=kind != "ddp", seconds=1.0, validation={}
        )
        beside = Path(folder) / name / ".writing"
        beside.parent.mkdir(exist_ok=True)
        checkpoint.write_part(beside, rank, checkpoint.state_of(step))
        dist.barrier()
        if rank == 0:
            checkpoint.publish(beside, progress, 1, None)


def goes_on(rank: int, world_size: int, kind: str, folder: str) -> dict:
    """Two more steps, from a network and a memory of other steps."""
    weights = {}
    for name in REMEMBERING:
        step = SharpnessAwareStep(make_engine(kind), RULES[name])
        train(step, rank, world_size, numbers=[7])
        path, _ = checkpoint.newest(Path(folder) / name)
        resharding.load(path, step, checkpoint.load_progress(path))
        step.taken = 3
        train(step, rank, world_size, numbers=[3, 4])
        weights[name] = step.engine.full_weights()
    return weights


@pytest.mark.parametrize(
    ("before", "after", "ranks"), [("zero2", "one", 1), ("fsdp2", "zero1", 2), ("ddp", "zero3", 2)]
)
def test_memory_goes_on_with_other_engines_and_ranks(before, after, ranks, tmp_path):
    on_ranks(2, saves, before, str(tmp_path))
    for name, weights in on_ranks(ranks, goes_on, after, str(tmp_path))[0].items():
        assert far(weights, reference(RULES[name])[0]) < CLOSE, name
