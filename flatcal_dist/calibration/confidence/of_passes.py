"""Scores of several answers about one image: passes with dropout, or several networks."""

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import log_softmax, logsumexp

from flatcal_dist.calibration.checks import FloatArray
from flatcal_dist.calibration.confidence.score import Score
from flatcal_dist.calibration.softmax import score_images

LOWEST = -1e6  # its exponential is 0, as that of all below


def mean_log_probabilities(logits: ArrayLike) -> FloatArray:
    """Logarithms [N, K] of the mean over T answers of the probabilities of logits [T, N, K].

    NaN for an image of which a logit is not finite.
    """
    return _mean_log(_log_probabilities(logits))


def entropy_of_mean(logits: ArrayLike) -> FloatArray:
    """Entropy [N], nats, of the mean over T answers of the probabilities of logits [T, N, K].

    NaN where a logit is not finite.
    """
    log_p = np.maximum(mean_log_probabilities(logits), LOWEST)
    known = np.isfinite(log_p).all(axis=1)
    found = np.full(len(log_p), np.nan)
    if known.any():
        labels = np.zeros(int(known.sum()), np.int64)
        found[known] = score_images(log_p[known], labels).entropy
    return found


def disagreement(logits: ArrayLike) -> FloatArray:
    """Mean divergence [N], nats, of T answers from their mean, of logits [T, N, K].

    That is KL(p_t || mean p) averaged over t, which is also the mutual information of answer and
    class: the entropy of the mean less the mean entropy. 0 where all agree, and NaN where a logit
    is not finite.
    """
    log_p = _log_probabilities(logits)
    log_q = _mean_log(log_p)
    apart = log_p - log_q
    # p log(p / q) - p + q of each class has the same sum, and no term is lost in larger ones.
    terms = np.exp(log_q) * (apart * np.exp(apart) - np.expm1(apart))
    return np.maximum(terms.sum(axis=2).mean(axis=0), 0.0)


def _log_probabilities(logits: ArrayLike) -> FloatArray:
    z = np.asarray(logits, dtype=np.float64)
    if z.ndim != 3 or not z.shape[0]:
        raise ValueError(f"expected logits [T, N, K] of T >= 1 answers, got shape {list(z.shape)}")
    finite = np.isfinite(z).all(axis=(0, 2))
    return log_softmax(np.where(finite[None, :, None], z, np.nan), axis=2)


def _mean_log(log_p: FloatArray) -> FloatArray:
    return logsumexp(log_p, axis=0) - np.log(len(log_p))


SCORES = (
    Score(
        "mc_dropout",
        "MC dropout",
        "minus the entropy of the mean probabilities of several passes with dropout",
        "Gal and Ghahramani (ICML 2016)",
        "passes",
        lambda evidence: -entropy_of_mean(evidence.passes),
    ),
    Score(
        "mc_dropout_agreement",
        "MC dropout, agreement",
        "minus the mutual information of dropout masks and class (BALD)",
        "Gal, Islam and Ghahramani (ICML 2017)",
        "passes",
        lambda evidence: -disagreement(evidence.passes),
    ),
    Score(
        "ensemble_agreement",
        "Ensemble agreement",
        "minus the mean divergence of the networks' probabilities from their mean",
        "Lakshminarayanan et al. (NeurIPS 2017)",
        "networks",
        lambda evidence: -disagreement(evidence.networks),
    ),
)
