"""Loss-equated SAM beside the matrix: its neutral values, its budget, and its scopes."""

import math

import pytest

from flatcal_dist.sharpness import LESAM, SAM, SharpnessAwareStep
from tests.support.engines import make_engine
from tests.support.reference import CLOSE, bits, far, make_batch


def one_step(rule, progress=0.0, **options):
    step = SharpnessAwareStep(make_engine("one"), rule, **options)
    result = step([make_batch(0)], progress=progress, measure=True)
    return step, result


def test_a_huge_budget_is_sam_and_its_end_is_plain_training():
    sam, _ = one_step(SAM(0.1))
    plain, _ = one_step(None)
    for progress in (0.0, 0.5, 0.99):
        ours, _ = one_step(LESAM(0.1, budget=1e6, anneal_from=0.3), progress)
        assert far(ours.engine.full_weights(), sam.engine.full_weights()) < CLOSE
    ours, _ = one_step(LESAM(0.1, budget=1e6), 1.0)
    assert bits(ours.engine.full_weights()) == bits(plain.engine.full_weights())


@pytest.mark.parametrize(("progress", "share"), [(0.0, 1), (0.2, 1), (0.6, 0.5), (1.0, 0)])
def test_the_budget_falls_along_half_a_cosine(progress, share):
    rule = LESAM(10.0, budget=0.01, anneal_from=0.2)
    assert rule.budget_at(progress) == pytest.approx(0.01 * share, abs=1e-12)
    _, result = one_step(rule, progress)
    length = 0.01 * share / result.ascent_gradient_norm
    assert result.perturbation_norm == pytest.approx(length, rel=1e-4, abs=1e-9)


def test_the_loss_rises_by_the_budget():
    _, result = one_step(LESAM(10.0, budget=1e-3))
    assert result.perturbed_loss - result.loss == pytest.approx(1e-3, rel=0.05)


def test_an_annealing_that_never_begins():
    assert LESAM(anneal_from=1.0, budget=0.3).budget_at(1.0) == 0.3
    assert math.isclose(LESAM(anneal_from=0.999, budget=0.3).budget_at(1.0), 0, abs_tol=1e-12)


def test_each_micro_batch_has_the_whole_budget():
    """Its gradient weighs less in the step. The length of e goes by the mean over its samples."""
    step = SharpnessAwareStep(make_engine("one"), LESAM(10.0, budget=1e-3), per_micro_batch=True)
    inputs, target = make_batch(0)
    result = step([(inputs[:4], target[:4]), (inputs[4:], target[4:])])
    assert result.perturbed_loss - result.loss == pytest.approx(1e-3, rel=0.05)
