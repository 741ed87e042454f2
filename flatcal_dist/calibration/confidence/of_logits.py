"""Confidence scores that are computed from logits, and their comparison."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from flatcal_dist.calibration.calibrators.crossfit import A_FIFTH, HoldOut
from flatcal_dist.calibration.calibrators.of_logits import TemperatureScaling
from flatcal_dist.calibration.checks import BoolArray, FloatArray, image_ids, logits_and_labels
from flatcal_dist.calibration.confidence.score import Evidence, Score, given
from flatcal_dist.calibration.metrics import selective
from flatcal_dist.calibration.softmax import ImageScores, chunks, score_images
from flatcal_dist.calibration.statistics.bootstrap import RESAMPLES, Interval, rank_bootstrap

POWERS = tuple(range(1, 11))  # powers of the norm that tuning tries


@dataclass(frozen=True)
class Tuning:
    """What two scores take from images on which they are not judged.

    Args:
        temperature: The temperature of "msp_temperature".
        power: The power p of "max_logit_pnorm" with the least AURC. None if no power beats the
            largest probability, which then takes its place, as its authors advise.
        images: The number of images that were used.
        split: How these images were chosen.
    """

    temperature: float
    power: int | None
    images: int
    split: HoldOut


def max_logit_pnorm(logits: ArrayLike, power: int) -> FloatArray:
    """Return max_k (z_k - mean z) / |z - mean z|_p for each row of logits [N, K]; shape [N].

    It is 0 if all logits are equal. Source: Cattelan and Silva, How to Fix a Broken Confidence
    Estimator (UAI 2024), section 4.
    """
    return _pnorms(np.asarray(logits), (power,))[0]


def _pnorms(z: np.ndarray, powers: Sequence[int]) -> FloatArray:
    """The score for each power [P, N]."""
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
        for power in range(1, max(powers) + 1):  # a product is quicker than a power
            raised *= centred
            if power in powers:
                norm = scale * np.where(seen, raised.sum(axis=1), 1.0) ** (1 / power)
                found[powers.index(power), rows] = np.where(seen, top / norm, 0.0)
    return found


def logit_margin(logits: ArrayLike) -> FloatArray:
    """Return the difference of the two largest logits [N, K] of each image; shape [N], K >= 2.

    It is the logarithm of the ratio of the two largest probabilities, and does not saturate.
    Source: Liang, Peng and Sun, Selective Classification Under Distribution Shifts (TMLR 2024),
    who call it the raw logit margin, RL_conf-M.
    """
    z = np.asarray(logits)
    found = np.empty(len(z))
    for rows in chunks(*z.shape):
        two = np.partition(z[rows].astype(np.float64), -2, axis=1)
        found[rows] = two[:, -1] - two[:, -2]
    return found


def tune(
    ids: Sequence[str],
    logits: ArrayLike,
    labels: ArrayLike,
    split: HoldOut = A_FIFTH,
) -> Tuning:
    """Choose temperature and power on the images that `split` chooses.

    If it chooses none, the temperature is 1 and there is no power.

    Args:
        ids: The ids of the images [N], each of them once.
        logits: The logits [N, K].
        labels: The labels int [N].
        split: Chooses the images.

    Raises:
        ValueError: An id repeats, or `checks.logits_and_labels` refuses the input.
    """
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
        warnings.simplefilter("ignore", RuntimeWarning)  # T is clamped if images are too few
        scaling.fit(z, y)
    temperature = 1.0 if scaling.standard_error is None else scaling.temperature
    return Tuning(temperature, POWERS[best] if beaten else None, len(rows), split)


def _tempered(evidence: Evidence) -> FloatArray:
    logits = given(evidence.logits)
    labels = np.zeros(len(logits), np.int64)
    return score_images(logits, labels, given(evidence.tuning).temperature).log_confidence


def _pnorm_or_msp(evidence: Evidence) -> FloatArray:
    power = given(evidence.tuning).power
    if power is None:
        return given(evidence.images).log_confidence
    return max_logit_pnorm(given(evidence.logits), power)


SCORES = (  # all others are compared to the first one
    Score(
        "msp", "MSP", "largest softmax probability", "Hendrycks and Gimpel (ICLR 2017)",
        "probabilities", lambda e: given(e.images).log_confidence,
    ),
    Score(
        "msp_temperature", "MSP after temperature",
        "largest softmax probability after temperature scaling", "Guo et al. (ICML 2017)",
        "probabilities", _tempered,
    ),
    Score(
        "margin", "Margin", "difference of the two largest probabilities",
        "Scheffer et al. (IDA 2001)", "probabilities", lambda e: given(e.images).margin,
    ),
    Score(
        "logit_margin", "Logit margin", "difference of the two largest logits",
        "Liang et al. (TMLR 2024)", "probabilities", lambda e: logit_margin(given(e.logits)),
    ),
    Score(
        "entropy", "Entropy", "minus the entropy of the probabilities",
        "Lakshminarayanan et al. (NeurIPS 2017)", "probabilities",
        lambda e: -given(e.images).entropy,
    ),
    Score(
        "doctor", "DOCTOR", "DOCTOR: sum of the squared probabilities",
        "Granese et al. (NeurIPS 2021), D_alpha", "probabilities", lambda e: given(e.images).doctor,
    ),
    Score(
        "energy", "Energy", "minus the free energy: log sum exp of the logits",
        "Liu et al. (NeurIPS 2020), T = 1", "logits", lambda e: given(e.images).energy,
    ),
    Score(
        "max_logit", "Max logit", "largest logit", "Hendrycks et al. (ICML 2022)",
        "logits", lambda e: given(e.images).max_logit,
    ),
    Score(
        "max_logit_pnorm", "MaxLogit-pNorm",
        "largest logit over the p-norm of the logits, all less their mean",
        "Cattelan and Silva (UAI 2024)", "probabilities", _pnorm_or_msp,
    ),
)  # fmt: skip


def confidence_scores(
    logits: np.ndarray, images: ImageScores, tuning: Tuning
) -> dict[str, FloatArray]:
    """Return all scores of logits by key, each [N].

    Args:
        logits: The logits [N, K].
        images: What a softmax says about these logits.
        tuning: What was tuned on images that are not judged.
    """
    evidence = Evidence(logits=logits, images=images, tuning=tuning)
    return {score.key: score.compute(evidence) for score in SCORES}


@dataclass(frozen=True)
class ScoreRow:
    """Failure prediction by one score.

    Args:
        name: The key of the score.
        values: The metrics of `entries.RANKS` by key, with intervals.
        difference: The differences from the first score, on the same resamples. None for the first.
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
    """Return failure prediction by each of several scores, in the given order.

    Args:
        scores: The scores of the same images [N], by key.
        correct: Which images are right [N].
        resamples: The number of resamples.
        seed: The seed of the resamples.
    """
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
    """A table of scores, what was tuned for it, and the number of images that it rests on."""

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
    """Compare all scores of logits.

    Temperature and power are tuned on the images that `split` holds out. All scores are judged on
    the other images. Besides the logits and a copy of the held-out share, this takes a few MB.

    Args:
        ids: The ids of the images [N], each of them once.
        logits: The logits [N, K].
        labels: The labels int [N].
        split: Chooses the images that are held out.
        resamples: The number of resamples.
        seed: The seed of the resamples.

    Raises:
        ValueError: `checks.logits_and_labels` refuses the input, or all images are held out.
    """
    z, y = logits_and_labels(logits, labels)
    tuning = tune(ids, z, y, split)
    images = score_images(z, y)
    judged = judged_images(ids, tuning)
    table = {name: s[judged] for name, s in confidence_scores(z, images, tuning).items()}
    rows = score_table(table, images.correct[judged], resamples=resamples, seed=seed)
    return ScoreComparison(rows, tuning, int(judged.sum()))


def judged_images(ids: Sequence[str], tuning: Tuning) -> BoolArray:
    """Return which images [N] were not used in tuning. ValueError if none is left."""
    judged = ~tuning.split.chosen([str(i) for i in ids])
    if not judged.any():
        raise ValueError(f"all {len(judged)} images were held out for tuning: none is left")
    return judged
