"""Which differences a comparison calls shown: one level for all of its claims together."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from scipy.stats import norm, ttest_rel

from flatcal_dist.calibration.comparison.groups import SIDES, Method, Run, differences
from flatcal_dist.calibration.metrics.entries import COMPARED, STATISTICS
from flatcal_dist.calibration.report.about import About
from flatcal_dist.calibration.statistics.bootstrap import Bootstrap
from flatcal_dist.calibration.statistics.seeds import seed_difference

SEEDS = 5


def made(point: np.ndarray, replicates: np.ndarray) -> Bootstrap:
    """A bootstrap as if of 5,000 images, of which each network has 1,000 wrong."""
    samples = Bootstrap(point, replicates)
    about = {"images": 5000, "rarer": [1000] * len(point)}
    return replace(samples, **{k: v for k, v in about.items() if hasattr(samples, k)})


def two_methods(random: np.random.Generator, seeds: int, effect: float = 0.0) -> tuple:
    """Networks of two methods: as they were measured on some images, and on resamples of them.

    Every metric is the network's own value (seeds differ by 0.01), what the images add to it, and
    `effect` for the second method. Metrics are correlated, as those of real networks are.
    """
    runs, points, replicates = [], {side: [] for side in SIDES}, {side: [] for side in SIDES}
    for method in range(2):
        for seed in range(seeds):
            shared = random.normal(size=2)
            values = {}
            for side in SIDES:
                own = 0.01 * (0.7 * shared[0] + 0.7 * random.normal(size=len(STATISTICS)))
                of_images = 0.005 * random.normal(size=(61, len(STATISTICS)))
                point = 0.5 + own + effect * method + of_images[0]
                points[side].append(point)
                replicates[side].append(point + of_images[1:])
                values[side] = dict(zip(STATISTICS, point.tolist(), strict=True))
            values["after"]["accuracy"] = values["before"]["accuracy"]
            correct = random.random(50) < 0.5
            records = SimpleNamespace(
                correct=correct, prediction=random.integers(0, 10, 50),
                before=SimpleNamespace(log_confidence=random.random(50), nll=random.random(50)),
            )  # fmt: skip
            sides = {side: SimpleNamespace(value=values[side].__getitem__) for side in SIDES}
            about = About(seed=seed, method=f"method {method}")
            metrics = SimpleNamespace(side=sides.__getitem__, about=about)
            runs.append(Run(f"{method}_{seed}", len(runs), metrics, records))
    samples = {}
    for side in SIDES:
        at = list(STATISTICS).index("accuracy")
        for i in range(len(runs)):
            points[side][i][at] = points["before"][i][at]
            replicates[side][i][:, at] = replicates["before"][i][:, at]
        samples[side] = made(np.stack(points[side]), np.stack(replicates[side], axis=1))
    return [Method("a", tuple(runs[:seeds])), Method("b", tuple(runs[seeds:]))], samples


def any_shown(found: dict) -> bool:
    return any(found["differences"][0][side][key]["shown"] for side in SIDES for key in COMPARED)


@pytest.mark.parametrize("seeds", [1, pytest.param(SEEDS, marks=pytest.mark.exhaustive)])
def test_equal_methods_seldom_show_any_difference(seeds: int) -> None:
    """200 comparisons of two methods that do not differ: 5 % may show something, by chance.

    The bound is what a share of 5 % stays below in all but one of a thousand such tests. With one
    seed the networks have no seed to differ by, and images alone decide.
    """
    random, draws, shown = np.random.default_rng(seeds), 200, 0
    for _ in range(draws):
        methods, samples = two_methods(random, seeds)
        if seeds == 1:  # the same networks, but for the images
            for side in SIDES:
                own = samples[side].replicates.mean(axis=0) - samples[side].point
                samples[side].replicates[:] -= own
                noise = 0.005 * random.normal(size=samples[side].point.shape)
                samples[side].replicates[:] += 0.5 + noise - samples[side].point
                samples[side].point[:] = 0.5 + noise
        shown += any_shown(differences(methods, samples))
    most = 0.05 + norm.ppf(0.999) * np.sqrt(0.05 * 0.95 / draws)
    assert shown / draws <= most


def test_a_difference_that_is_there_is_found() -> None:
    random = np.random.default_rng(0)
    found = [any_shown(differences(*two_methods(random, SEEDS, effect=0.1))) for _ in range(20)]
    assert all(found)


def test_holm_against_the_definition() -> None:
    from flatcal_dist.calibration.statistics.decisions import holm

    random = np.random.default_rng(0)
    for _ in range(200):
        p = random.random(random.integers(1, 9)) ** 3
        order, rejected = np.argsort(p), set()
        for step, i in enumerate(order.tolist()):  # Holm 1979: stop at the first that is kept
            if p[i] > 0.05 / (len(p) - step):
                break
            rejected.add(i)
        adjusted = holm(p.tolist())
        assert {i for i, v in enumerate(adjusted) if v <= 0.05} == rejected
        assert all(a >= b for a, b in zip(adjusted, p, strict=True))
    assert holm([None, 0.01, None, 0.04]) == [None, 0.02, None, 0.04]
    assert holm([]) == []


def test_p_value_of_seeds_is_students() -> None:
    random = np.random.default_rng(1)
    a, b = random.normal(size=(2, 6))
    found = seed_difference(dict(enumerate(a)), dict(enumerate(b)))
    assert found.student_p_value == pytest.approx(ttest_rel(a, b).pvalue)
    assert seed_difference({0: 1.0, 1: 2.0}, {0: 1.0, 1: 2.0}).student_p_value == 1


def test_p_value_of_images_is_the_share_beyond_zero_or_the_normal_tail() -> None:
    from flatcal_dist.calibration.statistics.decisions import difference_p_value

    random = np.random.default_rng(2)
    for effect in (0.0, 0.01, 0.02, 0.05):
        replicates = effect + 0.01 * random.normal(size=(4000, 2, len(STATISTICS)))
        replicates[:, 1] -= effect
        samples = made(np.full((2, len(STATISTICS)), 0.0), replicates)
        samples.point[0] = effect
        for name in ("nll", "ece", "auroc"):
            m = list(STATISTICS).index(name)
            spread = (replicates[:, 0, m] - replicates[:, 1, m]).std()
            expected = 2 * norm.sf(effect / spread)
            p = difference_p_value(samples, 0, 1, name)
            assert p == pytest.approx(expected, rel=0.25, abs=1e-5) or effect == 0
            assert p > 0.9 or effect > 0
