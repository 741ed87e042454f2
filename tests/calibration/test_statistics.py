from dataclasses import replace
from math import comb

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest, norm

from flatcal_dist.calibration.metrics import calibration_errors as metrics
from flatcal_dist.calibration.metrics import selective
from flatcal_dist.calibration.metrics.entries import RANKS, STATISTICS
from flatcal_dist.calibration.metrics.smooth import kernel_width, smooth_error_at
from flatcal_dist.calibration.records.records import Records, Scores
from flatcal_dist.calibration.softmax import score_images
from flatcal_dist.calibration.statistics import inflated
from flatcal_dist.calibration.statistics.bootstrap import bootstrap, mcnemar, rank_bootstrap
from flatcal_dist.calibration.statistics.intervals import Interval, proportion_interval
from tests.support.synthetic import make_records

ERRORS = [key for key, statistic in STATISTICS.items() if statistic.centred]
PLACE = {key: m for m, key in enumerate(STATISTICS)}


def resampled(scores: Scores, chosen: np.ndarray) -> Scores:
    return Scores(*(getattr(scores, f)[chosen] for f in scores.__dataclass_fields__))


def direct(scores: Scores) -> dict[str, float]:
    """Every statistic by the public functions, on images that stand there in full.

    Adaptive bins and the width of the kernel are those of the images before resampling: see
    `test_figures_with_choices_of_their_own`.
    """
    rank_by, correct, confidence = scores.log_confidence, scores.correct, scores.confidence
    table = metrics.reliability_bins(confidence, correct)
    variance = np.nan_to_num(table.accuracy * (1 - table.accuracy)) / np.maximum(table.count - 1, 1)
    squares = np.nan_to_num(table.accuracy - table.mean_confidence) ** 2 - variance
    return {
        "accuracy": correct.mean(),
        "nll": scores.nll.mean(),
        "brier": scores.brier.mean(),
        "signed_gap": metrics.signed_gap(confidence, correct),
        "mean_entropy": scores.entropy.mean(),
        "mean_confidence": confidence.mean(),
        "top_label_brier": metrics.top_label_brier_score(confidence, correct),
        "mean_entropy_correct": scores.entropy[correct].mean(),
        "mean_entropy_wrong": scores.entropy[~correct].mean(),
        "ece": metrics.expected_calibration_error(confidence, correct),
        "rmsce": metrics.root_mean_square_calibration_error(confidence, correct),
        "rmsce_debiased": (table.count * squares)[table.count > 1].sum() / len(correct),
        "ks": metrics.kolmogorov_smirnov_error(confidence, correct),
        "coverage_at_95_accuracy": selective.coverage_at_risk(rank_by, correct, 0.05),
        "coverage_at_99_accuracy": selective.coverage_at_risk(rank_by, correct, 0.01),
        "risk_at_80_coverage": selective.risk_at_coverage(rank_by, correct, 0.8),
    } | {name: getattr(selective, name)(rank_by, correct) for name in RANKS if "cover" not in name}


def test_figures_with_choices_of_their_own(records: Records) -> None:
    scores = records.before
    samples = bootstrap([scores], resamples=3, seed=5)
    inner = metrics.equal_mass_edges(scores.confidence, 15)
    width = kernel_width(scores.confidence, scores.correct)
    rng = np.random.default_rng(5)
    draws = [np.arange(400), *(rng.integers(400, size=400) for _ in range(3))]
    for chosen, row in zip(draws, (samples.point[0], *samples.replicates[:, 0]), strict=True):
        confidence, correct = scores.confidence[chosen], scores.correct[chosen]
        index = np.searchsorted(inner, confidence, side="left")
        gaps = [(confidence - correct)[index == m].sum() for m in range(len(inner) + 1)]
        expected = np.abs(gaps).sum() / 400
        assert row[PLACE["adaptive_ece"]] == pytest.approx(expected, abs=1e-12)
        expected = smooth_error_at(confidence, correct, width)
        assert row[PLACE["smooth_ece"]] == pytest.approx(expected, abs=1e-10)
    pair = scores.confidence, scores.correct
    for bins, name in ((15, "adaptive_ece"), (100, "adaptive_ece_100")):
        expected = metrics.adaptive_calibration_error(*pair, bins)
        assert samples.interval(0, name).value == pytest.approx(expected, abs=1e-12)
    expected = metrics.smooth_calibration_error(*pair)
    assert samples.interval(0, "smooth_ece").value == pytest.approx(expected, abs=1e-12)
    expected = metrics.root_mean_square_calibration_error(*pair, debiased=True)
    assert samples.interval(0, "rmsce_debiased").value == pytest.approx(expected, abs=1e-12)


def test_replicates_are_the_metrics_of_resampled_images(records: Records) -> None:
    samples = bootstrap([records.before, records.after], resamples=3, seed=5)
    rng = np.random.default_rng(5)
    for replicate in samples.replicates:
        chosen = rng.integers(len(records), size=len(records))
        for which, scores in enumerate((records.before, records.after)):
            for name, expected in direct(resampled(scores, chosen)).items():
                m = PLACE[name]
                assert replicate[which, m] == pytest.approx(expected, abs=1e-10), name
    for name, expected in direct(records.before).items():
        assert samples.point[0, PLACE[name]] == pytest.approx(expected, abs=1e-12)


def test_ties_are_kept_together() -> None:
    records = make_records(100)
    coarse = replace(records.before, log_confidence=np.round(records.before.log_confidence, 1))
    samples = bootstrap([coarse], resamples=2, seed=1)
    rng = np.random.default_rng(1)
    for replicate in samples.replicates:
        chosen = rng.integers(100, size=100)
        for name, expected in direct(resampled(coarse, chosen)).items():
            assert replicate[0, PLACE[name]] == pytest.approx(expected, abs=1e-10), name


def test_intervals_are_those_of_the_normal_approximation() -> None:
    records = make_records(2000)
    interval = bootstrap([records.before], resamples=1000).interval(0, "accuracy")
    deviation = np.sqrt(interval.value * (1 - interval.value) / 2000)
    assert interval.low == pytest.approx(interval.value - 1.96 * deviation, abs=0.3 * deviation)
    assert interval.high == pytest.approx(interval.value + 1.96 * deviation, abs=0.3 * deviation)


def test_seed_decides(records: Records) -> None:
    first, again, other = (bootstrap([records.before], 20, seed) for seed in (1, 1, 2))
    assert (first.replicates == again.replicates).all()
    assert (first.replicates != other.replicates).any()


def test_paired_differences_are_narrower_than_unpaired_ones() -> None:
    a, b = make_records(1000, seed=1), make_records(1000, seed=2)
    samples = bootstrap([a.before, b.before], 300)
    paired = samples.difference(1, 0, "nll")
    apart = [samples.interval(i, "nll") for i in (0, 1)]
    assert paired.high - paired.low < 0.8 * sum(i.high - i.low for i in apart) / np.sqrt(2)


def test_same_run_shows_no_difference(records: Records) -> None:
    samples = bootstrap([records.before, records.before], 50)
    for name in STATISTICS:
        difference = samples.difference(1, 0, name)
        assert (difference.value, difference.low, difference.high) == pytest.approx((0, 0, 0))
        assert not difference.excludes_zero


def test_ece_difference_is_spread_around_the_observed_one() -> None:
    # A calibrated network against an over-confident one: resampling inflates the first's ECE.
    random = np.random.default_rng(0)
    confidence = random.beta(4, 1, 3000)
    correct = random.random(3000) < confidence
    zeros = np.zeros(3000)
    calibrated = Scores(correct, np.log(confidence), zeros, zeros, zeros)
    shifted = Scores(correct, np.log(np.minimum(1, confidence + 0.05)), zeros, zeros, zeros)
    d = bootstrap([calibrated, shifted], 300).difference(1, 0, "ece")
    assert d.excludes_zero
    assert abs((d.low + d.high) / 2 - d.value) < 0.1 * (d.high - d.low)


def test_undefined_intervals() -> None:
    zeros = np.zeros(20)
    right = Scores(np.ones(20, bool), np.log(np.linspace(0.5, 0.9, 20)), zeros, zeros, zeros)
    samples = bootstrap([right], 50)
    assert samples.interval(0, "auroc").value is None
    accuracy = samples.interval(0, "accuracy")
    wilson = wilson_by_roots(20, 20)
    assert accuracy.value == 1.0
    assert (accuracy.low, accuracy.high) == pytest.approx(wilson)
    # 20 right answers do not tell the gap to within the spread of the confidences alone.
    for name in ("signed_gap", "ece", "smooth_ece", "rmsce_debiased", "aurc", "top_label_brier"):
        interval = samples.interval(0, name)
        assert interval.value is not None, name
        assert (interval.low, interval.high) == (None, None), name
    assert samples.interval(0, "mean_confidence").low is not None


def wilson_by_roots(k: int, n: int) -> tuple[float, float]:
    """Wilson's interval, by solving (p - k/n)^2 = z^2 p (1 - p) / n for p."""
    z2 = 1.959963984540054**2
    low, high = sorted(np.roots([n + z2, -(2 * k + z2), k**2 / n]))
    return float(low), float(high)


def test_rounding_is_no_interval_and_no_difference() -> None:
    """Of equal confidences, and of logits that differ by a constant, only rounding varies."""
    labels = np.arange(60) % 3
    equal = score_images(np.zeros((60, 10)), labels).scores()
    interval = bootstrap([equal], 50).interval(0, "nll")
    assert (interval.low, interval.high) == (None, None)
    logits = np.random.default_rng(0).normal(size=(60, 10))
    pair = [score_images(z, labels).scores() for z in (logits, logits + 3.3)]
    samples = bootstrap(pair, 50)
    assert not any(samples.difference(1, 0, name).excludes_zero for name in STATISTICS)


def test_an_end_that_is_zero_but_for_rounding_shows_nothing() -> None:
    for low, high in ((1.5e-17, 0.08), (-0.08, -1.5e-17), (None, None), (-1.0, 1.0)):
        assert not Interval(0.04, low, high).excludes_zero
    assert Interval(0.04, 1e-6, 0.08).excludes_zero


def test_a_ranking_by_equal_confidences_has_no_interval() -> None:
    scores = score_images(np.zeros((300, 5)), np.arange(300) % 5).scores()
    samples = bootstrap([scores], 50)
    for name, value in (("auroc", 0.5), ("naurc", 1.0)):
        interval = samples.interval(0, name)
        assert interval.value == pytest.approx(value)
        assert (interval.low, interval.high) == (None, None)


def test_refused(records: Records) -> None:
    other = make_records(50)
    with pytest.raises(ValueError, match="same images"):
        bootstrap([records.before, other.before])
    with pytest.raises(ValueError, match="resamples"):
        bootstrap([records.before], 0)


@pytest.mark.parametrize(
    "truth",
    [0.0, *(pytest.param(truth, marks=pytest.mark.exhaustive) for truth in (0.03, 0.1))],
)
def test_intervals_of_calibration_errors_hold_the_truth(truth: float) -> None:
    """Over-confident by `truth` everywhere, so that every one of these errors is `truth`.

    Of 60 intervals at 95 %, 57 should hold it; 51 or fewer have a chance of 1 in 100.
    """
    random = np.random.default_rng(0)
    inside = {name: 0 for name in ERRORS if name != "adaptive_ece_100"}
    percentiles = 0
    for seed in range(60):
        confidence = 0.5 + 0.5 * random.beta(3, 1, 600)
        correct = random.random(600) < confidence - truth
        zeros = np.zeros(600)
        scores = Scores(correct, np.log(confidence), zeros, zeros, zeros)
        samples = bootstrap([scores], 60, seed)
        for name in inside:
            interval = samples.interval(0, name)
            inside[name] += interval.low <= truth <= interval.high
        low, high = np.quantile(samples.replicates[:, 0, PLACE["ece"]], (0.025, 0.975))
        percentiles += low <= truth <= high
    assert min(inside.values()) >= 51, inside
    if truth < 0.05:
        assert percentiles < 51, "or the plain bootstrap would do"


def ranked(images: int, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Scores of right images lie 1.8 above those of wrong ones, one in ten; both are normal."""
    correct = random.random(images) >= 0.1
    return random.normal(size=images) + 1.8 * correct, correct


def test_intervals_of_rankings_hold_the_truth_with_few_wrong_images() -> None:
    """Some 30 wrong images. Of 120 intervals at 95 %, 114 should hold the truth.

    Those of the three metrics that hang on the few surest errors hold it in about 90 % of cases
    (`benchmarks/interval_coverage.py`); percentiles hold it in fewer.
    """
    random = np.random.default_rng(0)
    score, correct = ranked(400_000, random)
    pair = [score, score + random.normal(size=400_000)]
    truth, worse = rank_bootstrap(pair, correct, 1).point
    assert truth[list(RANKS).index("auroc")] == pytest.approx(norm.cdf(1.8 / np.sqrt(2)), abs=3e-3)
    inside = dict.fromkeys([key for key, ranking in RANKS.items() if ranking.combined], 0)
    differences, percentiles = dict(inside), dict(inside)
    for seed in range(120):
        score, correct = ranked(300, random)
        other = score + random.normal(size=300)  # ranks worse
        samples = rank_bootstrap([score, other], correct, 100, seed)
        for name in inside:
            m = list(RANKS).index(name)
            interval, difference = samples.interval(0, name), samples.difference(1, 0, name)
            inside[name] += interval.low <= truth[m] <= interval.high
            differences[name] += difference.low <= worse[m] - truth[m] <= difference.high
            low, high = np.quantile(samples.replicates[:, 0, m], (0.025, 0.975))
            percentiles[name] += low <= truth[m] <= high
    for name in ("eaurc", "naurc", "aupr_success"):
        assert inside.pop(name) >= max(103, percentiles[name] + 3), name
        assert differences.pop(name) >= 103, name
    assert min(inside.values()) >= 108, inside
    assert min(differences.values()) >= 108, differences


def test_interval_of_a_largest_gap_holds_whatever_the_gaps_are() -> None:
    """Gaps that are no multiple of those seen: over-confident below, under-confident above."""
    random = np.random.default_rng(0)
    population = random.uniform(0.5, 1, 200_000)
    chance = population + 0.12 * np.sin(2 * np.pi * (population - 0.5) / 0.5)
    truth = np.abs(np.cumsum((population - chance)[np.argsort(population)])).max() / 200_000
    inside = 0
    for seed in range(100):
        chosen = random.integers(200_000, size=400)
        confidence, correct = population[chosen], random.random(400) < chance[chosen]
        zeros = np.zeros(400)
        samples = bootstrap([Scores(correct, np.log(confidence), zeros, zeros, zeros)], 60, seed)
        interval = samples.interval(0, "ks")
        inside += interval.low <= truth <= interval.high
    assert inside >= 90  # 95 at 95 %; fewer than 90 have a chance of 1 in 100


def test_no_interval_of_a_ranking_without_enough_outcomes() -> None:
    score = np.arange(40.0)
    perfect = rank_bootstrap([score], score >= 4, 50)
    for name in ("eaurc", "naurc", "auroc"):
        interval = perfect.interval(0, name)
        assert interval.value is not None, name
        assert (interval.low, interval.high) == (None, None), name
    single = rank_bootstrap([score], score != 7, 50)
    assert single.interval(0, "aurc").low is None
    assert single.interval(0, "risk_at_80_coverage").low is not None


def test_interval_of_a_vector_of_gaps() -> None:
    """Far from 0 the interval is that of the normal approximation; at 0 it begins at 0."""
    noise = np.random.default_rng(0).normal(0, 0.01, (4000, 1))
    low, high = inflated.interval(np.array([0.5]), 0.5 + noise, inflated.absolute, 0.95)
    assert (low, high) == (pytest.approx(0.4804, abs=1e-3), pytest.approx(0.5196, abs=1e-3))
    low, high = inflated.interval(np.array([-0.5]), -0.5 + noise, inflated.largest, 0.95)
    assert (low, high) == (pytest.approx(0.4804, abs=1e-3), pytest.approx(0.5196, abs=1e-3))
    many = np.random.default_rng(1).normal(0, 0.01, (1000, 50))
    seen = np.random.default_rng(2).normal(0, 0.01, 50)
    for of_gaps in (inflated.absolute, inflated.euclidean, inflated.largest):
        low, _ = inflated.interval(seen, seen + many, of_gaps, 0.95)
        assert low == 0
    assert inflated.interval(np.zeros(3), np.zeros((10, 3)), inflated.absolute, 0.95) == (0, 0)


def test_scores_of_the_confidence_alone(records: Records) -> None:
    alone = replace(records.before, nll=None, brier=None, entropy=None)
    samples = bootstrap([records.before, alone], 20)
    for name in STATISTICS:
        if name in ("nll", "brier") or name.startswith("mean_entropy"):
            assert samples.interval(1, name) == Interval(None, None, None)
            assert samples.difference(1, 0, name).value is None
        else:
            assert samples.interval(1, name) == samples.interval(0, name)


def test_rank_bootstrap_sees_the_same_draws(records: Records) -> None:
    whole = bootstrap([records.before], 30, seed=4)
    ranks = rank_bootstrap([records.before.log_confidence, -records.before.entropy],
                           records.correct, 30, seed=4)  # fmt: skip
    for name in RANKS:
        assert ranks.interval(0, name) == whole.interval(0, name)
    assert ranks.difference(1, 0, "aurc").value == pytest.approx(
        selective.aurc(-records.before.entropy, records.correct)
        - selective.aurc(records.before.log_confidence, records.correct)
    )


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=40))
def test_mcnemar_is_the_binomial_test(pairs: list) -> None:
    first, second = (np.array(column) for column in zip(*pairs, strict=True))
    found = mcnemar(first, second)
    b, c = int((first & ~second).sum()), int((~first & second).sum())
    assert (found.only_first, found.only_second) == (b, c)
    expected = binomtest(b, b + c).pvalue if b + c else 1.0
    assert found.exact == pytest.approx(expected)
    equally_likely = comb(b + c, min(b, c)) / 2 ** (b + c)
    assert found.mid_p == pytest.approx(expected - equally_likely if b != c else 1.0)
    assert mcnemar(second, first).mid_p == found.mid_p


def test_mcnemar_of_a_textbook_table() -> None:
    # Fagerland et al. (2013), table 1: 1 against 7 discordant pairs.
    first = np.array([1] * 1 + [0] * 7 + [1] * 12 + [0] * 1)
    second = np.array([0] * 1 + [1] * 7 + [1] * 12 + [0] * 1)
    found = mcnemar(first, second)
    assert found.exact == pytest.approx(0.0703, abs=5e-5)
    assert found.mid_p == pytest.approx(0.0391, abs=5e-5)


def test_wilson_interval() -> None:
    low, high = proportion_interval([0, 8, 10, 0], [10, 10, 10, 0])
    for k, n, i in ((0, 10, 0), (8, 10, 1), (10, 10, 2)):
        expected = binomtest(k, n).proportion_ci(method="wilson")
        assert (low[i], high[i]) == (pytest.approx(expected.low), pytest.approx(expected.high))
    assert np.isnan([low[3], high[3]]).all()
    with pytest.raises(ValueError, match="between 0 and trials"):
        proportion_interval([3], [2])
