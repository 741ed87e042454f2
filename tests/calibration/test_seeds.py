import tracemalloc
from itertools import product

import numpy as np
import pytest
from scipy.stats import ttest_rel

from flatcal_dist.calibration.statistics.seeds import over_seeds, seed_difference


def test_mean_and_spread() -> None:
    s = over_seeds([0.70, 0.72, 0.77])
    assert (s.mean, s.sd, s.seeds) == (pytest.approx(0.73), pytest.approx(0.0360555128), 3)
    # Student's t of two degrees of freedom: 4.3027.
    half = 4.302652730 * 0.0360555128 / np.sqrt(3)
    assert (s.low, s.high) == (pytest.approx(0.73 - half), pytest.approx(0.73 + half))


def test_one_seed_has_no_spread() -> None:
    s = over_seeds([0.7])
    assert (s.mean, s.sd, s.low, s.high, s.seeds) == (0.7, None, None, None, 1)
    assert over_seeds([0.7, None]).mean is None
    assert over_seeds([0.7, float("nan")]).mean is None
    with pytest.raises(ValueError, match="at least one seed"):
        over_seeds([])


@pytest.mark.parametrize("n", [2, 3, 5, 8])
def test_difference_is_the_paired_t_test_and_all_sign_flips(n: int) -> None:
    random = np.random.default_rng(n)
    a, b = random.normal(1, 1, n), random.normal(0, 1, n)
    found = seed_difference(dict(enumerate(a)), dict(enumerate(b)))
    test = ttest_rel(a, b)
    interval = test.confidence_interval(0.95)
    assert found.mean == pytest.approx((a - b).mean())
    assert (found.low, found.high) == (pytest.approx(interval.low), pytest.approx(interval.high))
    assert found.shown == (n >= 3 and test.pvalue < 0.05)
    flips = [abs(np.dot(s, a - b)) for s in product((1, -1), repeat=n)]
    expected = np.mean([f >= abs((a - b).sum()) - 1e-12 for f in flips])
    assert found.p_value == pytest.approx(expected)
    assert found.p_value >= found.least_p_value == 2 / 2**n


def test_pairs_are_made_by_seed_and_others_left_out() -> None:
    first, second = {3: 0.4, 1: 0.1, 2: 0.2}, {2: 0.1, 1: 0.1, 7: 9.0}
    found = seed_difference(first, second)
    assert found.seeds == 2
    assert found.mean == pytest.approx(0.05)
    assert not found.shown
    assert seed_difference({1: 0.5}, {1: 0.25}).mean == 0.25
    assert seed_difference({1: 0.5}, {1: 0.25}).p_value is None
    assert seed_difference({1: 0.5}, {2: 0.25}) is None
    assert seed_difference({1: None, 2: 1.0}, {1: 0.5, 2: 0.5}) is None


def test_three_seeds_alone_prove_little() -> None:
    clear = seed_difference({0: 1.0, 1: 1.1, 2: 0.9}, {0: 0.0, 1: 0.1, 2: -0.05})
    assert clear.shown
    assert clear.p_value == clear.least_p_value == 0.25
    equal = seed_difference({0: 1.0, 1: 2.0, 2: 3.0}, {0: 1.0, 1: 2.0, 2: 3.0})
    assert not equal.shown
    assert equal.p_value == 1
    constant = seed_difference({0: 2.0, 1: 2.0, 2: 2.0}, {0: 1.0, 1: 1.0, 2: 1.0})
    assert (constant.low, constant.high) == (1.0, 1.0)


def test_equal_methods_are_seldom_told_apart() -> None:
    random = np.random.default_rng(0)
    shown = [
        seed_difference(
            dict(enumerate(random.normal(size=3))), dict(enumerate(random.normal(size=3)))
        ).shown
        for _ in range(600)
    ]
    assert np.mean(shown) == pytest.approx(0.05, abs=0.03)


def test_many_seeds_draw_their_signs() -> None:
    random = np.random.default_rng(1)
    values = random.normal(0.3, 1, 25)
    found = seed_difference(dict(enumerate(values)), dict.fromkeys(range(25), 0.0))
    t = ttest_rel(values, np.zeros(25)).pvalue
    assert found.p_value == pytest.approx(t, abs=0.03)


def test_twenty_seeds_take_no_longer_than_a_page_can_wait() -> None:
    """Seven metrics, two sides and all pairs of methods: all 2^20 signs took half a gigabyte."""
    random = np.random.default_rng(0)
    first, second = (dict(enumerate(random.normal(size=20))) for _ in range(2))
    tracemalloc.start()
    found = seed_difference(first, second)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1e8
    assert found.p_value == pytest.approx(found.student_p_value, abs=0.02)
