"""Every objective on every engine, against training by its formula in one process.

An objective is found by the configuration, and its formula by the list TRAINED in its own test,
tests/objectives/test_<name>.py: see `tests.support.literal_objectives.Case`.
"""

import functools
import importlib
import importlib.util
from collections.abc import Iterator

import pytest
import torch

from flatcal_dist.config.choice_sections import OBJECTIVES
from flatcal_dist.objectives import Targets
from tests.support.engines import ENGINES, EVERYWHERE, everywhere
from tests.support.literal_objectives import (
    ALL,
    Case,
    Formula,
    literal_training,
    our_training,
    plain,
)
from tests.support.ranks import on_ranks
from tests.support.reference import CLOSE, far

# Micro-batches of a rank, and whether there is a perturbation.
SETTINGS = ((1, False), (3, True))


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


def jobs() -> Iterator[tuple[Case, bool, int, bool]]:
    """Yield a case, whether its labels are soft, and a setting."""
    for name in OBJECTIVES:
        for case in cases_of(name):
            for soft in case.kinds():
                for micro_batches, sam in SETTINGS:
                    yield case, soft, micro_batches, sam


def train_all(rank, world_size, kind, wanted):
    """The weights that each job ends with. One group of ranks takes all of them."""
    return [our_training(rank, world_size, kind, *each)[0] for each in wanted]


def compare(outcomes) -> None:
    """Weights are those of the plain loop.

    CLOSE is relative to the largest weight. It is what rounding of float32 in another order of
    sums comes to; the formulas are computed in float64.
    """
    off = {}
    for (case, soft, micro_batches, sam), ours in zip(jobs(), outcomes[0], strict=True):
        expected = literal_training(case.begin(), sam, soft)
        off[case.name, str(case.keys), soft, micro_batches, sam] = far(ours, expected)
        if case.name != "cross_entropy":
            other = far(literal_training(Formula(plain), sam, soft), expected)
            assert other > 1000 * CLOSE, f"{case} is cross-entropy"
    wrong = {each: distance for each, distance in off.items() if not distance < CLOSE}
    assert not wrong, "\n".join(f"{each}: {distance:.1e}" for each, distance in wrong.items())


def wanted() -> list[tuple]:
    return [(case.objective(), micro, sam, soft) for case, soft, micro, sam in jobs()]


@pytest.mark.parametrize("kind", EVERYWHERE)
def test_training_is_that_of_one_process_by_the_formula(kind):
    compare(everywhere(kind, train_all, wanted()))


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", ENGINES)
def test_training_on_four_ranks_is_that_of_one_process_by_the_formula(kind):
    compare(on_ranks(4, train_all, kind, wanted()))


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
