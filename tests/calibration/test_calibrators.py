import numpy as np
import pytest
from scipy.optimize import minimize_scalar

from flatcal_dist.calibration.calibrators import (
    BOUNDS,
    TemperatureScaling,
)
from flatcal_dist.calibration.metrics import negative_log_likelihood

from .synthetic import make_logits


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
    assert fitted.transform(logits) == pytest.approx(logits / expected)


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
