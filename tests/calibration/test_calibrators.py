import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from scipy.special import softmax as scipy_softmax

from flatcal_dist.calibration.calibrators.of_logits import (
    BOUNDS,
    EnsembleTemperatureScaling,
    TemperatureScaling,
    VectorScaling,
)
from flatcal_dist.calibration.metrics.calibration_errors import negative_log_likelihood
from tests.support.synthetic import make_logits


def one_logit(classes: int, logit: float, accuracy: float) -> tuple[np.ndarray, np.ndarray]:
    """400 images with logits (logit, 0, ..., 0), of which a share is of class 0."""
    logits = np.zeros((400, classes))
    logits[:, 0] = logit
    return logits, (np.arange(400) >= accuracy * 400).astype(np.int64)


@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
@pytest.mark.parametrize(
    ("classes", "logit", "accuracy"), [(2, 2, 0.75), (3, 3, 0.75), (1000, 10, 0.75), (10, 1, 0.3)]
)
def test_closed_form(classes: int, logit: float, accuracy: float, scale: float) -> None:
    logits, labels = one_logit(classes, logit, accuracy)
    expected = scale * logit / np.log(accuracy * (classes - 1) / (1 - accuracy))
    fitted = TemperatureScaling().fit(scale * logits, labels)
    assert fitted.temperature == pytest.approx(expected, rel=1e-12)
    assert np.allclose(fitted.transform(logits), logits / expected, rtol=1e-11)


@pytest.mark.parametrize("seed", range(5))
def test_minimum_of_the_nll(seed: int) -> None:
    _, labels, logits = make_logits(200, 6, seed=seed, scale=3.0)
    fitted = TemperatureScaling().fit(logits, labels).temperature
    found = minimize_scalar(
        lambda u: negative_log_likelihood(logits * np.exp(u), labels),
        bounds=(-5, 5),
        method="bounded",
        options={"xatol": 1e-9},
    )
    assert fitted == pytest.approx(np.exp(-found.x), rel=1e-5)
    before, after = (negative_log_likelihood(logits / t, labels) for t in (1.0, fitted))
    assert after < before
    assert ((logits / fitted).argmax(1) == logits.argmax(1)).all()


def test_separable_is_clamped_with_a_warning() -> None:
    logits = np.eye(4) * 3
    with pytest.warns(RuntimeWarning, match="largest logit"):
        assert TemperatureScaling().fit(logits, np.arange(4)).temperature == BOUNDS[0]
    with pytest.warns(RuntimeWarning, match="no higher"):
        fitted = TemperatureScaling().fit(logits, (np.arange(4) + 1) % 4)
    assert fitted.temperature == BOUNDS[1]
    logits, labels = one_logit(2, 1e5, 0.75)
    with pytest.warns(RuntimeWarning, match="beyond the bounds"):
        assert TemperatureScaling().fit(logits, labels).temperature == BOUNDS[1]


def test_equal_logits_leave_the_temperature_at_one() -> None:
    assert TemperatureScaling().fit(np.zeros((5, 3)), [0, 1, 2, 0, 1]).temperature == 1.0


def test_transform_before_fit() -> None:
    with pytest.raises(RuntimeError, match="fit"):
        TemperatureScaling().transform(np.zeros((1, 2)))


def test_half_precision_logits_are_fitted_in_float64() -> None:
    _, labels, logits = make_logits(200, 6)
    half = logits.astype(np.float16)
    expected = TemperatureScaling().fit(half.astype(np.float64), labels).temperature
    assert TemperatureScaling().fit(half, labels).temperature == expected


def test_standard_error_is_that_of_repeated_sampling() -> None:
    """The spread of log T over 200 draws of images is what one draw claims, to 15 %."""
    draws = (make_logits(200, 6, images_seed=s) for s in range(200))
    fits = [TemperatureScaling().fit(logits, labels) for _, labels, logits in draws]
    spread = np.std([np.log(f.temperature) for f in fits])
    claimed = np.mean([f.standard_error for f in fits])
    assert claimed == pytest.approx(spread, rel=0.15)
    low, high = fits[0].interval()
    assert low < fits[0].temperature < high
    with pytest.warns(RuntimeWarning):
        assert TemperatureScaling().fit(np.eye(3), np.arange(3)).interval() is None


@pytest.mark.parametrize("start", [1e-3, 0.1, 30.0, 1e3])
def test_where_the_search_begins_does_not_matter(start: float) -> None:
    _, labels, logits = make_logits(200, 6)
    expected = TemperatureScaling().fit(logits, labels).temperature
    begun = TemperatureScaling().fit(logits, labels, TemperatureScaling.at(start)).temperature
    assert begun == pytest.approx(expected, rel=1e-10)
    again = TemperatureScaling().fit(logits, labels, TemperatureScaling.at(1.1)).temperature
    assert begun == again, "to the last bit"


def mixture_by_expectation_maximisation(p: np.ndarray) -> np.ndarray:
    weights = np.full(p.shape[1], 1 / p.shape[1])
    for _ in range(20000):
        share = p * weights
        weights = (share / share.sum(1, keepdims=True)).mean(0)
    return weights


def test_ensemble_weights_minimise_the_nll() -> None:
    _, labels, logits = make_logits(400, 5, scale=4.0)
    noisy = np.where(np.arange(400) % 10 == 0, (labels + 1) % 5, labels)
    fitted = EnsembleTemperatureScaling().fit(logits, noisy)
    assert fitted.weights.sum() == pytest.approx(1)
    assert (fitted.weights > 0).all()
    t = TemperatureScaling().fit(logits, noisy).temperature
    assert fitted.temperature == t
    z, rows = logits.astype(np.float64), np.arange(400)
    of_label = [scipy_softmax(z / s, axis=1)[rows, noisy] for s in (t, 1.0)]
    p = np.stack([*of_label, np.full(400, 1 / 5)], axis=1)
    best = -np.log(p @ mixture_by_expectation_maximisation(p)).mean()
    transformed = fitted.transform(logits)
    nll = negative_log_likelihood(transformed, noisy)
    assert nll == pytest.approx(best, abs=1e-6)
    assert nll <= negative_log_likelihood(z / t, noisy) + 1e-9
    assert np.exp(transformed).sum(1) == pytest.approx(1)
    expected = fitted.weights @ np.stack(
        [scipy_softmax(z[0] / t), scipy_softmax(z[0]), np.full(5, 0.2)]
    )
    assert np.exp(transformed[0]) == pytest.approx(expected)
    assert (transformed.argmax(1) == logits.argmax(1)).all()


def test_vector_scaling_finds_the_bias_of_a_class_and_is_stationary() -> None:
    _, labels, logits = make_logits(4000, 5)
    logits[:, 3] += 1.5
    fitted = VectorScaling(sd=1.0).fit(logits, labels)
    assert fitted.bias[3] == fitted.bias.min()
    assert fitted.bias[3] - np.delete(fitted.bias, 3).mean() < -0.8
    t = TemperatureScaling().fit(logits, labels)
    nll = [negative_log_likelihood(f.transform(logits), labels) for f in (t, fitted)]
    assert nll[1] < nll[0] - 0.02

    def penalised(x: np.ndarray) -> float:
        z = logits * (x[:5] / fitted.temperature) + x[5:]
        away = np.sum((x[:5] - 1) ** 2) + np.sum(x[5:] ** 2)
        return negative_log_likelihood(z, labels) + away / (2 * 4000)

    x = np.concatenate([fitted.weight, fitted.bias])
    for k in range(10):
        step = np.zeros(10)
        step[k] = 1e-4
        slope = (penalised(x + step) - penalised(x - step)) / 2e-4
        assert abs(slope) < 1e-5


def test_a_strong_prior_makes_vector_scaling_temperature_scaling() -> None:
    _, labels, logits = make_logits(100, 5)
    strict = VectorScaling(sd=1e-4).fit(logits, labels)
    scaled = TemperatureScaling().fit(logits, labels).transform(logits)
    assert strict.transform(logits) == pytest.approx(scaled, abs=1e-3)
    with pytest.raises(ValueError, match="sd must be positive"):
        VectorScaling(sd=0)


@pytest.mark.parametrize(
    "calibrator", [TemperatureScaling, EnsembleTemperatureScaling, VectorScaling]
)
def test_unfitted_calibrators_refuse_to_transform(calibrator: type) -> None:
    with pytest.raises(RuntimeError, match="fit"):
        calibrator().transform([[0.0, 1.0]])


@given(st.integers(0, 10**6), st.floats(0.05, 20))
@settings(deadline=None, max_examples=25)
def test_temperature_keeps_the_argmax_and_lowers_the_nll_it_is_fitted_on(seed, scale) -> None:
    _, labels, logits = make_logits(60, 4, scale=scale, images_seed=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        fitted = TemperatureScaling().fit(logits, labels)
    moved = fitted.transform(logits)
    assert (moved.argmax(1) == logits.argmax(1)).all()
    before, after = (negative_log_likelihood(z, labels) for z in (logits, moved))
    assert after <= before + 1e-12


def test_half_precision_logits_are_fitted_in_float64_by_all() -> None:
    _, labels, logits = make_logits(200, 6)
    half = logits.astype(np.float16)
    for calibrator in (EnsembleTemperatureScaling, VectorScaling):
        expected = calibrator().fit(half.astype(np.float64), labels).transform(half)
        assert (calibrator().fit(half, labels).transform(half) == expected).all()
