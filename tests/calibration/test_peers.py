"""The same figures by other libraries, where they are installed; and their known differences.

Each difference is asserted as it is, so that a release that mends it is noticed.
"""

import numpy as np
import pytest

from flatcal_dist.calibration.metrics import calibration_errors as metrics
from flatcal_dist.calibration.metrics import selective
from flatcal_dist.calibration.metrics.smooth_relplot import relplot_error_at
from flatcal_dist.calibration.softmax import score_images
from tests.support.synthetic import golden_inputs, make_logits


@pytest.fixture(scope="module")
def images():
    _, labels, logits = make_logits(3000)
    scores = score_images(logits, labels)
    return logits, labels, scores.confidence, scores.correct


def probabilities(logits: np.ndarray) -> np.ndarray:
    z = np.exp(logits.astype(np.float64) - logits.max(1, keepdims=True))
    return z / z.sum(1, keepdims=True)


class TestTorchUncertainty:
    @pytest.fixture(autouse=True)
    def library(self):
        pytest.importorskip("torch_uncertainty", exc_type=ImportError)

    def value(self, metric, logits, labels) -> float:
        import torch

        metric.set_dtype(torch.float64)
        metric.update(torch.from_numpy(probabilities(logits)), torch.from_numpy(labels))
        return float(metric.compute())

    def test_calibration(self, images) -> None:
        from torch_uncertainty.metrics import classification as tu

        logits, labels, confidence, correct = images
        options = {"task": "multiclass", "num_bins": 15, "num_classes": 10}
        ece = self.value(tu.CalibrationError(**options), logits, labels)
        # It computes in float32 within.
        assert ece == pytest.approx(
            metrics.expected_calibration_error(confidence, correct), abs=1e-6
        )
        adaptive = self.value(tu.AdaptiveCalibrationError(**options), logits, labels)
        # No two confidences are equal here.
        assert adaptive == pytest.approx(
            metrics.adaptive_calibration_error(confidence, correct), abs=1e-6
        )

    def test_proper_scores(self, images) -> None:
        from torch_uncertainty.metrics import classification as tu

        logits, labels, *_ = images
        nll = self.value(tu.CategoricalNLL(), logits, labels)
        assert nll == pytest.approx(metrics.negative_log_likelihood(logits, labels), abs=1e-6)
        brier = self.value(tu.BrierScore(num_classes=10), logits, labels)
        assert brier == pytest.approx(metrics.brier_score(logits, labels), abs=1e-6)

    def test_failure_prediction(self, images) -> None:
        import torch
        from torch_uncertainty.metrics import classification as tu

        logits, labels, confidence, correct = images
        n = len(labels)
        # Its AURC is the trapezoid over [1/N, 1]; ours the mean of the same risks.
        area, first, last = selective.aurc(confidence, correct), 0.0, 1 - correct.mean()
        assert correct[confidence.argmax()], "so that the first risk is 0"
        theirs = self.value(tu.AURC(), logits, labels)
        assert theirs == pytest.approx((area * n - (first + last) / 2) / (n - 1), abs=1e-6)
        metric = tu.FPR95(pos_label=1)
        metric.update(torch.from_numpy(confidence), torch.from_numpy(correct.astype(np.int64)))
        assert float(metric.compute()) == pytest.approx(
            selective.fpr_at_95_tpr(confidence, correct), abs=1e-6
        )
        coverage = self.value(tu.CovAtxRisk(risk_threshold=0.05), logits, labels)
        assert coverage == pytest.approx(selective.coverage_at_risk(confidence, correct, 0.05))
        risk = self.value(tu.RiskAt80Cov(), logits, labels)
        assert risk == pytest.approx(selective.risk_at_coverage(confidence, correct, 0.8))

    def test_known_differences(self) -> None:
        import torch
        from torch_uncertainty.metrics import classification as tu

        # A confidence of exactly 1 falls into a bin of its own.
        metric = tu.CalibrationError("binary", num_bins=15)
        metric.update(torch.tensor([0.95, 1.0]), torch.tensor([1, 0]))
        assert float(metric.compute()) == pytest.approx(0.525)
        ours = metrics.expected_calibration_error(*golden_inputs("F_phantom_bin"))
        assert ours == pytest.approx(0.475)
        # Equal confidences are parted between adaptive bins.
        metric = tu.AdaptiveCalibrationError("binary", num_bins=8)
        metric.update(torch.full((8,), 0.75), torch.tensor([1, 1, 1, 0, 1, 1, 1, 0]))
        assert float(metric.compute()) == pytest.approx(0.375)
        pair = golden_inputs("E_all_tied_calibrated")
        assert metrics.adaptive_calibration_error(*pair, 8) == pytest.approx(0)


class TestRelplot:
    @pytest.fixture(autouse=True)
    def library(self):
        pytest.importorskip("relplot", exc_type=ImportError)

    def test_smooth_error(self, images) -> None:
        import relplot

        *_, confidence, correct = images
        ours = metrics.smooth_calibration_error_relplot(confidence, correct)
        assert ours == pytest.approx(relplot.smECE(confidence, correct.astype(float)), abs=1e-3)
        for width in (0.02, 0.1):
            theirs = relplot.smECE_sigma(confidence, correct.astype(float), sigma=width)
            assert relplot_error_at(confidence, correct, width) == pytest.approx(theirs, abs=1e-4)

    def test_known_difference(self) -> None:
        from relplot.metrics import binnedECE

        confidence, correct = golden_inputs("F_phantom_bin")
        assert binnedECE(confidence, correct.astype(float), nbins=15) == pytest.approx(0.525)


class TestUncertaintyCalibration:
    @pytest.fixture(autouse=True)
    def library(self):
        pytest.importorskip("calibration", exc_type=ImportError)

    def binned(self, confidence, correct, bins):
        from calibration import utils

        return utils.bin(list(zip(confidence, correct.astype(float), strict=True)), bins)

    def test_binned_errors(self, images) -> None:
        from calibration import utils

        *_, confidence, correct = images
        even = self.binned(confidence, correct, utils.get_equal_prob_bins(confidence, 15))
        assert utils.plugin_ce(even, power=1) == pytest.approx(
            metrics.expected_calibration_error(confidence, correct)
        )
        ours = metrics.root_mean_square_calibration_error(confidence, correct)
        assert utils.plugin_ce(even, power=2) == pytest.approx(ours)
        ours = metrics.root_mean_square_calibration_error(confidence, correct, debiased=True)
        filled = [data for data in even if len(data) > 1]
        assert utils.unbiased_l2_ce(filled) == pytest.approx(ours, rel=1e-3)
        mass = self.binned(confidence, correct, utils.get_equal_bins(confidence, 15))
        assert utils.plugin_ce(mass, power=1) == pytest.approx(
            metrics.adaptive_calibration_error(confidence, correct)
        )

    def test_selective(self, images) -> None:
        from calibration import utils

        *_, confidence, correct = images
        area, _ = utils.get_selective_stats(confidence, correct)
        assert 1 - area == pytest.approx(selective.aurc(confidence, correct))


class TestMapie:
    @pytest.fixture(autouse=True)
    def library(self):
        pytest.importorskip("mapie", exc_type=ImportError)

    def test_cumulative_error(self, images) -> None:
        from mapie.metrics.calibration import cumulative_differences

        *_, confidence, correct = images
        theirs = np.abs(cumulative_differences(correct.astype(int), confidence, random_state=1))
        ours = metrics.kolmogorov_smirnov_error(confidence, correct)
        assert theirs.max() == pytest.approx(ours, abs=1e-6)

    def test_known_difference(self) -> None:
        from mapie.metrics.calibration import expected_calibration_error

        confidence, correct = golden_inputs("A_distinct")
        # "15 bins" are 15 edges, so 14 bins.
        theirs = expected_calibration_error(correct, confidence, num_bins=15)
        assert theirs == pytest.approx(0.285)
        assert theirs == pytest.approx(metrics.expected_calibration_error(confidence, correct, 14))
        theirs = expected_calibration_error(correct, confidence, num_bins=16)
        assert theirs == pytest.approx(metrics.expected_calibration_error(confidence, correct, 15))
