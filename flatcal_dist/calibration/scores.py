"""Confidence scores: what else than the largest probability can tell right answers from wrong."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from . import selective
from .calibrators import TemperatureScaling
from .checks import BoolArray, FloatArray, image_ids, logits_and_labels
from .crossfit import A_FIFTH, HoldOut
from .softmax import ImageScores, chunks, score_images
from .statistics import RESAMPLES, Interval, rank_bootstrap

POWERS = tuple(range(1, 11))  # of the norm, tried in tuning

NAMES = {
    "msp": "largest softmax probability",
    "msp_temperature": "largest softmax probability after temperature scaling",
    "margin": "difference of the two largest probabilities",
    "entropy": "minus the entropy of the probabilities",
    "doctor": "DOCTOR: sum of the squared probabilities",
    "energy": "minus the free energy: log sum exp of the logits",
    "max_logit": "largest logit",
    "max_logit_pnorm": "largest logit over the p-norm of the logits, all less their mean",
}
OF_LOGITS = ("energy", "max_logit")  # not to be had from probabilities
SOURCES = {
    "msp": "Hendrycks and Gimpel (ICLR 2017)",
    "msp_temperature": "Guo et al. (ICML 2017)",
    "margin": "Scheffer et al. (IDA 2001)",
    "entropy": "Lakshminarayanan et al. (NeurIPS 2017)",
    "doctor": "Granese et al. (NeurIPS 2021), D_alpha",
    "energy": "Liu et al. (NeurIPS 2020), T = 1",
    "max_logit": "Hendrycks et al. (ICML 2022)",
    "max_logit_pnorm": "Cattelan and Silva (UAI 2024)",
}


@dataclass(frozen=True)
class Tuning:
    """What two of the scores take from images that they are not judged on.

    temperature: of "msp_temperature". power: p of "max_logit_pnorm", the one with the least AURC;
    None where none beats the largest probability, which then stands in for it, as its authors
    advise. images: how many of the images, chosen by `split`, were used.
    """

    temperature: float
    power: int | None
    images: int
    split: HoldOut


def max_logit_pnorm(logits: ArrayLike, power: int) -> FloatArray:
    """max_k (z_k - mean z) / |z - mean z|_p for each row of logits [N, K]; shape [N].

    0 where all logits are equal. Source: Cattelan and Silva, How to Fix a Broken Confidence
    Estimator (UAI 2024), section 4.
    """
    return _pnorms(np.asarray(logits), (power,))[0]


def _pnorms(z: np.ndarray, powers: Sequence[int]) -> FloatArray:
    """The score for each power, [P, N]."""
    found = np.zeros((len(powers), len(z)))
    for rows in chunks(*z.shape):
        centred = z[rows].astype(np.float64)
        centred -= centred.mean(axis=1, keepdims=True)
        top = centred.max(axis=1)
        np.abs(centred, out=centred)
        largest = centred.max(axis=1)
        seen = largest > 0
        scale = np.where(seen, largest, 1.0)
        centred /= scale[:, None]
        raised = np.ones_like(centred)
        for power in range(1, max(powers) + 1):  # one product each is quicker than a power
            raised *= centred
            if power in powers:
                norm = scale * np.where(seen, raised.sum(axis=1), 1.0) ** (1 / power)
                found[powers.index(power), rows] = np.where(seen, top / norm, 0.0)
    return found


def tune(
    ids: Sequence[str],
    logits: ArrayLike,
    labels: ArrayLike,
    split: HoldOut = A_FIFTH,
) -> Tuning:
    """Choose temperature and power on the images `split` chooses; neutral if it chooses none."""
    z, y = logits_and_labels(logits, labels)
    rows = np.flatnonzero(split.chosen(image_ids(ids, len(z)).tolist()))
    if not len(rows):
        return Tuning(1.0, None, 0, split)
    z, y = z[rows], y[rows]
    images = score_images(z, y)
    risks = [selective.aurc(score, images.correct) for score in _pnorms(z, POWERS)]
    best = int(np.argmin(risks))
    beaten = risks[best] < selective.aurc(images.log_confidence, images.correct)
    scaling = TemperatureScaling()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # clamped: the few images ask for no T
        scaling.fit(z, y)
    temperature = 1.0 if scaling.standard_error is None else scaling.temperature
    return Tuning(temperature, POWERS[best] if beaten else None, len(rows), split)


def confidence_scores(
    logits: np.ndarray, images: ImageScores, tuning: Tuning
) -> dict[str, FloatArray]:
    """The scores of `NAMES` for logits [N, K] that `images` tells of; each [N], higher is surer."""
    labels = np.zeros(len(logits), np.int64)
    tempered = score_images(logits, labels, tuning.temperature).log_confidence
    power = tuning.power
    return {
        "msp": images.log_confidence,
        "msp_temperature": tempered,
        "margin": images.margin,
        "entropy": -images.entropy,
        "doctor": images.doctor,
        "energy": images.energy,
        "max_logit": images.max_logit,
        "max_logit_pnorm": images.log_confidence
        if power is None
        else max_logit_pnorm(logits, power),
    }


@dataclass(frozen=True)
class ScoreRow:
    """One score: failure prediction with intervals, and differences from the first score.

    values: the metrics of `statistics.RANKS` by name. difference: score minus the first one, on
    the same resamples; None for the first.
    """

    name: str
    values: dict[str, Interval]
    difference: dict[str, Interval] | None


def score_table(
    scores: Mapping[str, FloatArray],
    correct: ArrayLike,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> list[ScoreRow]:
    """Failure prediction by each of several scores [N] of the same images, in the order given."""
    samples = rank_bootstrap(list(scores.values()), correct, resamples, seed)
    names = samples.statistics
    return [
        ScoreRow(
            name,
            {metric: samples.interval(i, metric) for metric in names},
            {metric: samples.difference(i, 0, metric) for metric in names} if i else None,
        )
        for i, name in enumerate(scores)
    ]


@dataclass(frozen=True)
class ScoreComparison:
    """The table, the tuning behind it, and how many images it judges."""

    rows: list[ScoreRow]
    tuning: Tuning
    images: int


def compare_scores(
    ids: Sequence[str],
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    split: HoldOut = A_FIFTH,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> ScoreComparison:
    """Compare all scores of `NAMES` on logits [N, K] and labels [N] of images `ids` (unique).

    Temperature and power are tuned on the images that `split` holds out, and all scores are
    judged on the same others. Besides the logits and a copy of the held-out share, nothing takes
    more than a few MB. ValueError for what `checks.logits_and_labels` refuses, and if all images
    are held out.
    """
    z, y = logits_and_labels(logits, labels)
    tuning = tune(ids, z, y, split)
    images = score_images(z, y)
    judged = judged_images(ids, tuning)
    table = {name: s[judged] for name, s in confidence_scores(z, images, tuning).items()}
    rows = score_table(table, images.correct[judged], resamples=resamples, seed=seed)
    return ScoreComparison(rows, tuning, int(judged.sum()))


def judged_images(ids: Sequence[str], tuning: Tuning) -> BoolArray:
    """Which images [N] were not used in tuning. ValueError if none is left."""
    judged = ~tuning.split.chosen([str(i) for i in ids])
    if not judged.any():
        raise ValueError(f"all {len(judged)} images were held out for tuning: none is left")
    return judged
