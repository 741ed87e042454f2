"""Cross-entropy against its formula in double precision."""

from tests.support.literal_objectives import Case, check_formula, plain

TRAINED = [Case("cross_entropy", plain)]


def test_losses_and_gradient_are_the_formula():
    check_formula(TRAINED[0])
