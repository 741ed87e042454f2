"""Stable SAM beside the matrix: the length of the gradient is that at w."""

import pytest

from flatcal_dist.sharpness import SAM, SSAM, SharpnessAwareStep
from tests.support.engines import UNLIKE, everywhere, make_engine
from tests.support.reference import train


def lengths(rank, world_size, kind):
    """Norms at w and of what the optimizer got; SAM's; and the cosines of e with both."""
    found = []
    for rule in (SSAM(0.5), SAM(0.5)):
        step = SharpnessAwareStep(make_engine(kind), rule)
        [result] = train(step, rank, world_size, numbers=[0], measure=True)
        found.append((result.ascent_gradient_norm, result.gradient_norm, result.cosine))
    return found


@pytest.mark.parametrize("kind", UNLIKE)
def test_the_direction_is_sams_and_the_length_that_at_w(kind):
    for (clean, ours, _), (_, theirs, cosine) in everywhere(kind, lengths):
        assert ours == pytest.approx(clean, rel=1e-5)
        assert theirs > 1.05 * clean, "it must matter"
        assert 0 < cosine < 1
