from dataclasses import replace

import numpy as np
import pytest

from flatcal_dist.calibration import metrics, selective
from flatcal_dist.calibration.records import Records, Scores
from flatcal_dist.calibration.smooth import smooth_curve, smooth_error_at
from flatcal_dist.calibration.statistics import RANKS, STATISTICS, bootstrap

from .synthetic import make_records


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
    width = smooth_curve(scores.confidence, scores.correct).width
    rng = np.random.default_rng(5)
    draws = [np.arange(400), *(rng.integers(400, size=400) for _ in range(3))]
    for chosen, row in zip(draws, (samples.point[0], *samples.replicates[:, 0]), strict=True):
        confidence, correct = scores.confidence[chosen], scores.correct[chosen]
        index = np.searchsorted(inner, confidence, side="left")
        gaps = [(confidence - correct)[index == m].sum() for m in range(len(inner) + 1)]
        expected = np.abs(gaps).sum() / 400
        assert row[STATISTICS.index("adaptive_ece")] == pytest.approx(expected, abs=1e-12)
        expected = smooth_error_at(confidence, correct, width)
        assert row[STATISTICS.index("smooth_ece")] == pytest.approx(expected, abs=1e-10)
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
                m = STATISTICS.index(name)
                assert replicate[which, m] == pytest.approx(expected, abs=1e-10), name
    for name, expected in direct(records.before).items():
        assert samples.point[0, STATISTICS.index(name)] == pytest.approx(expected, abs=1e-12)


def test_ties_are_kept_together() -> None:
    records = make_records(100)
    coarse = replace(records.before, log_confidence=np.round(records.before.log_confidence, 1))
    samples = bootstrap([coarse], resamples=2, seed=1)
    rng = np.random.default_rng(1)
    for replicate in samples.replicates:
        chosen = rng.integers(100, size=100)
        for name, expected in direct(resampled(coarse, chosen)).items():
            assert replicate[0, STATISTICS.index(name)] == pytest.approx(expected, abs=1e-10), name


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
    assert (accuracy.value, accuracy.low, accuracy.high) == (1.0, None, None)
    assert samples.interval(0, "signed_gap").low is not None


def test_refused(records: Records) -> None:
    other = make_records(50)
    with pytest.raises(ValueError, match="same images"):
        bootstrap([records.before, other.before])
    with pytest.raises(ValueError, match="resamples"):
        bootstrap([records.before], 0)
