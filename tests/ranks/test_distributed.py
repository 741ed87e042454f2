"""The ranks that tests run on: fresh, with the environment of now; what goes wrong is told."""

import os
import signal

import pytest
import torch
import torch.distributed as dist

from tests.support.ranks import on_ranks


def remembers(rank, world_size):
    """What an earlier call left, if ranks were used twice; and what this process sees."""
    before = os.environ.get("LEFT_BEHIND"), torch.initial_seed()
    os.environ["LEFT_BEHIND"] = "yes"
    torch.manual_seed(7)
    total = torch.tensor(rank + 1.0)
    dist.all_reduce(total)
    return before, os.environ.get("SET_BY_THE_TEST"), float(total), os.getpid()


def test_ranks_are_fresh_and_together(monkeypatch):
    calls = []
    for value in ("one", "two"):
        monkeypatch.setenv("SET_BY_THE_TEST", value)
        outcome = on_ranks(2, remembers)
        assert [(left, seen, total) for (left, _), seen, total, _ in outcome] == [
            (None, value, 3.0)
        ] * 2
        assert all(seed != 7 for (_, seed), *_ in outcome)
        calls += [pid for *_, pid in outcome]
    assert len(set(calls)) == 4


def dies(rank, world_size):
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def test_a_rank_that_dies_without_a_word_fails_the_test_with_its_exit_code():
    """At once: the other would wait for it in the barrier, then for the test's timeout."""
    told = r"rank 1 died with exit code -9|Connection (reset|closed)"  # whoever notices first
    with pytest.raises(AssertionError, match=told):
        on_ranks(2, dies)


def raises(rank, world_size):
    if rank == 1:
        raise ValueError("what went wrong")
    return dist.barrier()


def test_an_exception_on_a_rank_fails_the_test_with_its_traceback():
    with pytest.raises(AssertionError, match=r"rank 1 failed:(?s:.*)what went wrong"):
        on_ranks(2, raises)
