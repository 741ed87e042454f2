"""What calibrators and conformal sets make of the evaluated images, for a report.

It needs the logits, which records do not hold. So it is computed where records are made.
"""

import warnings
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import bdtr

from flatcal_dist.calibration.after_training.conformal import FOLDS, WANTED, Sets, conformal_sets
from flatcal_dist.calibration.after_training.parts import (
    ByClass,
    CalibratorRow,
    ConformalSets,
    PostHoc,
    SetRow,
)
from flatcal_dist.calibration.calibrators.crossfit import (
    KEEPS_ANSWERS,
    CrossFit,
    fit_apart,
    fit_out_of_sample,
)
from flatcal_dist.calibration.checks import IntArray, image_ids, logits_and_labels
from flatcal_dist.calibration.metrics.entries import METRICS
from flatcal_dist.calibration.metrics.entry import Evaluated
from flatcal_dist.calibration.records.temperatures import Apart
from flatcal_dist.calibration.statistics.intervals import proportion_interval

ROWS = (
    "identity", "temperature", "vector", "matrix", "dirichlet",
    "one_vs_rest_isotonic", "one_vs_rest_histogram",
)  # fmt: skip
FIGURES = ("accuracy", "nll", "ece", "brier", "signed_gap", "aurc")
QUICK = ("identity", "temperature")  # fitted to any number of logits
MOST_LOGITS = 20_000_000  # images times classes; a fit to ImageNet's 50 million takes minutes
MOST_PARAMETERS = 20_000  # of a matrix: up to 140 classes
MOST_WORK = 200_000_000  # images times parameters of a matrix; CIFAR-100 has half of it

LEAST_OF_A_CLASS = 20  # images, below which the coverage of a class says too little


def post_hoc(
    ids: Sequence[str],
    labels: ArrayLike,
    logits: ArrayLike,
    *,
    folds: int = 5,
    seed: int = 0,
    apart: Apart | None = None,
) -> PostHoc:
    """Return the figures of calibrators, each image being scored by a fit that has not seen it.

    Calibrators whose fit would take minutes are left out, see `left_out`.

    Args:
        ids: The ids of the images [N], each of them once.
        labels: The labels int [N].
        logits: The logits [N, K].
        folds: The number of folds of the calibrators.
        seed: The seed of the folds.
        apart: Images that were kept apart to fit calibrators on. Without them calibrators are
            cross-fitted. Conformal sets are always cross-fitted.

    Raises:
        ValueError: An id occurs twice, or `checks.logits_and_labels` refuses the input.
    """
    names = image_ids(ids, len(np.asarray(logits)))
    z, y = logits_and_labels(logits, labels, names)
    order = np.argsort(names, kind="stable")  # so that no fit depends on the order of images
    names, z, y = names[order], z[order], y[order]
    how = apart or CrossFit(folds, seed)
    return PostHoc(
        folds=folds,
        fitted_apart=len(apart) if apart else 0,
        calibrators=[_calibrator(name, names.tolist(), z, y, how) for name in ROWS],
        conformal=_sets(names.tolist(), z, y, seed),
    )


def parameters(name: str, classes: int) -> int | None:
    """Return how many numbers a calibrator fits. None if it fits curves."""
    counts = {
        "identity": 0,
        "temperature": 1,
        "vector": 2 * classes + 1,
        "matrix": classes * (classes + 1) + 1,
        "dirichlet": classes * (classes + 1),
    }
    return counts.get(name)


def left_out(name: str, images: int, classes: int) -> str | None:
    """Return why a calibrator is not fitted to so many images and classes. None if it is."""
    if name in QUICK:
        return None
    if images * classes > MOST_LOGITS:
        return (
            f"{images:,} images of {classes:,} classes are more than {MOST_LOGITS:,} logits: only "
            "a temperature is fitted to so many"
        )
    if images < classes:
        return f"there are fewer images ({images:,}) than classes ({classes:,})"
    count = parameters(name, classes)
    if name in ("matrix", "dirichlet") and count is not None and count > MOST_PARAMETERS:
        return f"it has {count:,} parameters, and the limit is {MOST_PARAMETERS:,}"
    if name in ("matrix", "dirichlet") and count is not None and images * count > MOST_WORK:
        return (
            f"it has {count:,} parameters; with {images:,} images this is more than "
            f"{MOST_WORK:,} (images times parameters)"
        )
    return None


def _calibrator(
    name: str, ids: list[str], z: np.ndarray, y: IntArray, how: CrossFit | Apart
) -> CalibratorRow:
    fitted_on = len(how) if isinstance(how, Apart) else len(z)
    reason, figures = left_out(name, fitted_on, z.shape[1]), None
    if reason is None:
        with warnings.catch_warnings():  # the temperature of the records has warned already
            warnings.simplefilter("ignore", RuntimeWarning)
            fit = (
                fit_apart(name, how.logits, how.labels)
                if isinstance(how, Apart)
                else fit_out_of_sample(name, ids, z, y, how)
            )
            scores = fit.score(ids, z, y)
        evaluated = Evaluated(scores)
        figures = {key: METRICS[key].value(evaluated) for key in FIGURES}
    return CalibratorRow(
        name=name,
        keeps_answers=name in KEEPS_ANSWERS,
        parameters=parameters(name, z.shape[1]),
        left_out=reason,
        figures=figures,
    )


def _sets(ids: list[str], z: np.ndarray, y: IntArray, seed: int) -> ConformalSets:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        found = conformal_sets(ids, y, z, WANTED, seed)
    rows = [_set_row(name, sets, y, z.shape[1]) for name, sets in found.items()]
    return ConformalSets(wanted=WANTED, images=len(z), folds=FOLDS, rows=rows)


def _set_row(name: str, sets: Sets, y: IntArray, classes: int) -> SetRow:
    low, high = proportion_interval(sets.covered.sum(), len(y))
    return SetRow(
        name=name,
        coverage=float(sets.covered.mean()),
        low=float(low),
        high=float(high),
        mean_size=float(sets.size.mean()),
        empty=float((sets.size == 0).mean()),
        single=float((sets.size == 1).mean()),
        by_class=_by_class(sets, y, classes),
    )


def _distance_by_chance(images: int) -> float:
    """The mean distance of a share of so many images from `WANTED`, if each is WANTED by chance."""
    count = np.arange(images + 1)
    share = np.diff(bdtr(count, images, WANTED), prepend=0.0)
    return float(share @ np.abs(count / images - WANTED))


def _by_class(sets: Sets, y: IntArray, classes: int) -> ByClass | None:
    images = np.bincount(y, minlength=classes)
    many = images >= LEAST_OF_A_CLASS
    if not many.any():
        return None
    covered = np.bincount(y, weights=sets.covered, minlength=classes)[many] / images[many]
    number, often = np.unique(images[many], return_counts=True)
    chance = [_distance_by_chance(int(n)) for n in number]
    return ByClass(
        classes=int(many.sum()),
        least_images=LEAST_OF_A_CLASS,
        low=float(covered.min()),
        high=float(covered.max()),
        gap=float(np.abs(covered - WANTED).mean()),
        gap_by_chance=float(np.average(chance, weights=often)),
    )
