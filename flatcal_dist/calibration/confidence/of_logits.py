"""Confidence scores: what else than the largest probability can tell right answers from wrong."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from flatcal_dist.calibration.calibrators.crossfit import A_FIFTH, HoldOut
from flatcal_dist.calibration.calibrators.of_logits import TemperatureScaling
from flatcal_dist.calibration.checks import BoolArray, FloatArray, image_ids, logits_and_labels
from flatcal_dist.calibration.confidence.score import Evidence, Score
from flatcal_dist.calibration.metrics import selective
from flatcal_dist.calibration.softmax import ImageScores, chunks, score_images
from flatcal_dist.calibration.statistics.bootstrap import RESAMPLES, Interval, rank_bootstrap

POWERS = tuple(range(1, 11))  # of the norm, tried in tuning


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


def logit_margin(logits: ArrayLike) -> FloatArray:
    """Difference of the two largest of logits [N, K]; shape [N]. K is at least 2.

    It is the logarithm of the ratio of the two largest probabilities, and does not saturate.
    Source: Liang, Peng and Sun, Selective Classification Under Distribution Shifts (TMLR 2024),
    where it is called the raw logit margin, RL_conf-M.
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


def _tempered(evidence: Evidence) -> FloatArray:
    labels = np.zeros(len(evidence.logits), np.int64)
    return score_images(evidence.logits, labels, evidence.tuning.temperature).log_confidence


def _pnorm_or_msp(evidence: Evidence) -> FloatArray:
    power = evidence.tuning.power
    if power is None:
        return evidence.images.log_confidence
    return max_logit_pnorm(evidence.logits, power)


SCORES = (  # of logits; the first is what all others are compared to
    Score(
        "msp", "MSP", "largest softmax probability", "Hendrycks and Gimpel (ICLR 2017)",
        "probabilities", lambda e: e.images.log_confidence,
    ),
    Score(
        "msp_temperature", "MSP after temperature",
        "largest softmax probability after temperature scaling", "Guo et al. (ICML 2017)",
        "probabilities", _tempered,
    ),
    Score(
        "margin", "Margin", "difference of the two largest probabilities",
        "Scheffer et al. (IDA 2001)", "probabilities", lambda e: e.images.margin,
    ),
    Score(
        "logit_margin", "Logit margin", "difference of the two largest logits",
        "Liang et al. (TMLR 2024)", "probabilities", lambda e: logit_margin(e.logits),
    ),
    Score(
        "entropy", "Entropy", "minus the entropy of the probabilities",
        "Lakshminarayanan et al. (NeurIPS 2017)", "probabilities", lambda e: -e.images.entropy,
    ),
    Score(
        "doctor", "DOCTOR", "DOCTOR: sum of the squared probabilities",
        "Granese et al. (NeurIPS 2021), D_alpha", "probabilities", lambda e: e.images.doctor,
    ),
    Score(
        "energy", "Energy", "minus the free energy: log sum exp of the logits",
        "Liu et al. (NeurIPS 2020), T = 1", "logits", lambda e: e.images.energy,
    ),
    Score(
        "max_logit", "Max logit", "largest logit", "Hendrycks et al. (ICML 2022)",
        "logits", lambda e: e.images.max_logit,
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
    """The scores of logits [N, K] that `images` tells of, by key; each [N], higher is surer."""
    evidence = Evidence(logits=logits, images=images, tuning=tuning)
    return {score.key: score.compute(evidence) for score in SCORES}


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
    """Compare all scores of logits [N, K] with labels [N] of images `ids` (unique).

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
