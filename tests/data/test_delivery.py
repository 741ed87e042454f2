"""Loader workers that cannot deliver a batch end the run with the cause, under the real limits."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from accelerate import PartialState

from flatcal_dist import batch_sizes
from flatcal_dist.config import load
from flatcal_dist.data import Augmentation, DataError, training_transform
from flatcal_dist.ranks.distributed import FailedTogether
from tests.support.samples import train_on

SCRIPT = """
import resource, sys, time
from flatcal_dist.data import *

if __name__ == "__main__":
    index = load_index(expand(sys.argv[1]))
    for limit in sys.argv[3:] or ["0"]:
        loader = training_loader(
            index, BatchPlan(seed=0, global_batch_size=16, micro_batch_size=16, epochs=60),
            training_transform(Augmentation(kind="none"), 64), Decoding(3),
            Workers(2, context=sys.argv[2]),
        )
        if int(limit):
            resource.setrlimit(resource.RLIMIT_NOFILE, (int(limit), 1024))
        began = time.monotonic()
        try:
            print(limit, 0.0, len(list(loader)), "batches")
        except DataError as error:
            print(limit, time.monotonic() - began, error)
        if int(limit):
            resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1024))
"""


def run_loader(
    tmp_path: Path, shards: list[Path], context: str, *limits: int, before: Sequence[str] = ()
) -> list[tuple[int, float, str]]:
    """Iterate over loaders in another process: limit of open files, seconds, and what was said."""
    script = tmp_path / "iterate.py"
    script.write_text(SCRIPT)
    arguments = [sys.executable, str(script), str(shards[0].parent), context, *map(str, limits)]
    run = subprocess.run([*before, *arguments], capture_output=True, text=True, timeout=180)
    assert run.returncode == 0, run.stderr
    lines = [line.split(maxsplit=2) for line in run.stdout.splitlines()]
    return [(int(limit), float(seconds), said) for limit, seconds, said in lines]


@pytest.mark.exhaustive
@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_too_few_open_files(tmp_path, shards, context):
    """`ulimit -n`: the batch is lost where it is packed, where it is sent, or where it comes."""
    limits = (10, 14, 18, 20, 22, 26)
    results = run_loader(tmp_path, shards, context, *limits)
    assert [limit for limit, _, _ in results] == [*limits]
    # How many files Python itself has open differs: the least limits may not let it read the index.
    undelivered = [r for r in results if "cannot be read ([Errno 24]" not in r[2]]
    assert len(undelivered) >= 3
    for limit, seconds, said in undelivered:
        assert "A loader worker could not deliver a batch" in said
        assert f"may open {limit} files here (ulimit -n), which is too few: raise the" in said
        assert seconds < 60


def test_too_little_shared_memory(tmp_path, shards):
    """A container's /dev/shm, as small as some are."""
    unshare = ["unshare", "--mount", "sh", "-c"]
    mount = "mount -t tmpfs -o size=64k tmpfs /dev/shm"
    may = subprocess.run([*unshare, mount], capture_output=True, text=True)
    if may.returncode:
        pytest.skip(f"this user may not mount a small /dev/shm: {may.stderr.strip()}")
    begin = [*unshare, f'{mount} && exec "$@"', "sh"]
    ((_, seconds, said),) = run_loader(tmp_path, shards, "fork", before=begin)
    assert "A loader worker could not deliver a batch" in said
    assert "/dev/shm has 0.1 MiB, of which" in said
    assert "docker run --shm-size=8g" in said
    assert seconds < 60


class Dies:
    """A transform after which the worker is no more."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __call__(self, image: torch.Tensor, seed: int) -> torch.Tensor:
        os.kill(os.getpid(), self.number)
        return image


def training(index, **options):
    sizes = {"seed": 0, "global_batch_size": 8, "micro_batch_size": 8, "epochs": 3}
    transform = training_transform(Augmentation(kind="none"), 8)
    return train_on(index, **{"transform": transform, "workers": 2, **sizes, **options})


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGBUS, signal.SIGSEGV])
def test_a_worker_that_is_killed(index, number):
    handler = signal.getsignal(signal.SIGCHLD)
    with pytest.raises(DataError, match=rf"a worker was killed by {number.name}\. ") as error:
        list(training(index, transform=Dies(number)))
    if number == signal.SIGKILL:
        assert "memory has run out: lower data.workers" in str(error.value)
    if number == signal.SIGBUS:
        assert "--shm-size" in str(error.value)
    assert signal.getsignal(signal.SIGCHLD) == handler


def test_a_worker_that_is_killed_later_raises_at_the_loader_alone(index):
    """And not in whatever the main process does just then, as DataLoader's own handler would."""
    batches = iter(training(index, epochs=400))
    next(batches)
    for child in torch.multiprocessing.active_children():
        child.kill()
    end = time.monotonic() + 1
    while time.monotonic() < end:
        sum(range(1000))
    with pytest.raises(DataError, match="killed by SIGKILL"):
        list(batches)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_pinning_thread_that_dies(index, monkeypatch):
    """It unpacks batches where there is a GPU; here it dies for want of one."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)

    def dies(*_: object) -> None:
        raise RuntimeError("received 0 items of ancdata")

    monkeypatch.setattr(torch.accelerator, "set_device_index", dies)
    with pytest.raises(DataError, match=r"Pin memory thread exited.*\(ulimit -n\).*/dev/shm has"):
        list(training(index, pin_memory=True))


def test_room_is_computed_and_checked(monkeypatch):
    """By hand: 3 x 224 x 224 bytes, a label and a number of 8 bytes each, 4 workers x 2 + 2."""
    from flatcal_dist.data.loading.delivery import PREFETCH, needed_room

    assert PREFETCH == 2
    assert needed_room(256, 3 * 224 * 224 + 16, 4) == 10 * 256 * 150_544
    assert needed_room(256, 1000, 0) == 0
    PartialState()
    config = load(
        Path(__file__).parents[2] / "configs/imagenet/resnet50_csam.yaml",
        ["data.workers=4", "data.micro_batch_size=256", "evaluate.batch_size=128"],
    )
    mebibytes = 10 * (256 + 128) * 150_544 / 2**20
    assert f"up to {mebibytes:,.1f} MiB of batches in shared memory" in batch_sizes.check_room(
        config
    )
    monkeypatch.setattr(batch_sizes, "free_room", lambda: 64 << 20)
    with pytest.raises(FailedTogether, match=r"/dev/shm has 64\.0 MiB free.*--shm-size=8g"):
        batch_sizes.check_room(config)
    monkeypatch.setattr(batch_sizes, "free_room", lambda: None)  # a system without /dev/shm
    batch_sizes.check_room(config)
