"""Every objective on every engine, against training by its formula in one process.

An objective is found by the configuration, and its formula by the list TRAINED in its own test,
tests/objectives/test_<name>.py: see `tests.support.literal_objectives.Case`.
"""

import functools
import importlib
import importlib.util
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch

from flatcal_dist.config.choice_sections import OBJECTIVES
from flatcal_dist.objectives import Targets
from tests.support.engines import ENGINES, EVERYWHERE, everywhere
from tests.support.literal_objectives import (
    ALL,
    Case,
    literal_training,
    our_trainings,
)
from tests.support.ranks import on_ranks
from tests.support.reference import CLOSE, far


@dataclass(frozen=True)
class Job:
    """One training: a case, micro-batches of a rank, with SAM or without, soft labels or hard."""

    case: Case
    micro_batches: int
    sam: bool
    soft: bool = False


@functools.cache
def cases_of(name: str) -> tuple[Case, ...]:
    module = f"tests.objectives.test_{name}"
    cases = ()
    if importlib.util.find_spec(module):
        cases = tuple(getattr(importlib.import_module(module), "TRAINED", ()))
    assert cases, (
        f"objective.name={name} is compared with nothing: write its losses by the formula into "
        f"tests/objectives/test_{name}.py, and TRAINED = [Case({name!r}, literal, {{...}})]"
    )
    return cases


def jobs() -> Iterator[Job]:
    """Yield every case with SAM, the first of each objective without it, and soft labels."""
    for name in OBJECTIVES:
        first, *_ = cases = cases_of(name)
        yield Job(first, 2, sam=False)
        for case in cases:
            yield Job(case, 1, sam=True)
        if not first.objective().hard_labels:
            yield Job(cases[-1], 1, sam=True, soft=True)


def all_jobs() -> Iterator[Job]:
    for name in OBJECTIVES:
        for case, sam in itertools.product(cases_of(name), (False, True)):
            for soft in case.kinds():
                yield Job(case, 3, sam, soft)


@functools.cache
def by_the_formula(name: str, number: int, sam: bool, soft: bool):
    return literal_training(cases_of(name)[number].begin(), sam, soft)


def compare(jobs: list[Job], start: Callable[[list], list]) -> None:
    """Weights are those of the plain loop.

    CLOSE is relative to the largest weight. It allows for float32 sums in another order, for which
    up to 2e-7 was measured here. The formulas are computed in float64.
    """
    wanted = [(job.case.objective(), job.micro_batches, job.sam, job.soft) for job in jobs]
    wrong = []
    for job, (ours, _) in zip(jobs, start(wanted)[0], strict=True):
        name, number = job.case.name, cases_of(job.case.name).index(job.case)
        expected = by_the_formula(name, number, job.sam, job.soft)
        if not far(ours, expected) < CLOSE:
            wrong.append(f"{far(ours, expected):.1e}: {job}")
        if name != "cross_entropy":
            other = by_the_formula("cross_entropy", 0, job.sam, job.soft)
            assert far(other, expected) > 1000 * CLOSE, f"{job} is cross-entropy"
    assert not wrong, "\n".join(wrong)


OFTEN = ("fsdp2",)


@pytest.mark.parametrize(
    "kind",
    [k if k in OFTEN else pytest.param(k, marks=pytest.mark.exhaustive) for k in EVERYWHERE],
)
def test_training_is_that_of_one_process_by_the_formula(kind):
    compare(list(jobs()), lambda wanted: everywhere(kind, our_trainings, wanted))


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", ENGINES)
def test_training_on_four_ranks_is_that_of_one_process_by_the_formula(kind):
    every = list(all_jobs())
    for first in range(0, len(every), 8):  # ranks that say nothing for minutes are ended
        compare(every[first : first + 8], lambda wanted: on_ranks(4, our_trainings, kind, wanted))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_low_precision_tails_and_empty_batches(name):
    """Logits of 10^4 give finite losses and slopes, and losses are in float32 at least."""
    rows = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 0.0], [0.0, 0.0, 0.0], [1e4, 1e4, -1e4]])
    labels, samples = torch.tensor([0, 0, 2, 2]), torch.arange(4)
    for case in cases_of(name):
        objective = case.objective()
        objective.begin(ALL, "cpu")
        for soft in case.kinds():
            target = torch.eye(3)[labels].roll(1, 0) / 2 + torch.eye(3)[labels] / 2
            targets = Targets(target if soft else labels, samples, epoch=3)
            for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
                logits = rows.to(dtype, copy=True).requires_grad_()
                losses = objective(logits, targets)
                assert losses.dtype == torch.promote_types(dtype, torch.float32)
                assert losses.shape == (4,)
                losses.sum().backward()
                assert losses.isfinite().all()
                assert logits.grad.isfinite().all()
            half = torch.randn(4, 3).bfloat16()
            assert torch.equal(objective(half, targets), objective(half.float(), targets))
            assert objective(torch.zeros(0, 3), targets[:0]).shape == (0,)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_soft_labels_are_refused_where_they_have_no_meaning(name):
    objective = cases_of(name)[0].objective()
    if objective.hard_labels:
        with pytest.raises(ValueError, match="is defined for hard labels only"):
            objective(torch.zeros(2, 3), Targets(torch.full((2, 3), 1 / 3), torch.arange(2)))
