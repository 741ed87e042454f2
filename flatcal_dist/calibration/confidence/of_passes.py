"""Scores from several answers about one image: passes with dropout, or several networks."""

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import log_softmax, logsumexp

from flatcal_dist.calibration.checks import FloatArray
from flatcal_dist.calibration.confidence.score import Score, given
from flatcal_dist.calibration.softmax import score_images

LOWEST = -1e6  # the exponential of this number, and of all below it, is 0


def mean_log_probabilities(logits: ArrayLike) -> FloatArray:
    """Return the logarithms [N, K] of the mean probabilities of T answers with logits [T, N, K].

    They are NaN for an image with a logit that is not finite.
    """
    return _mean_log(_log_probabilities(logits))


def entropy_of_mean(logits: ArrayLike) -> FloatArray:
    """Return the entropy [N], in nats, of the mean probabilities of T answers [T, N, K].

    It is NaN for an image with a logit that is not finite.
    """
    log_p: FloatArray = np.maximum(mean_log_probabilities(logits), LOWEST)
    known = np.isfinite(log_p).all(axis=1)
    found = np.full(len(log_p), np.nan)
    if known.any():
        labels = np.zeros(int(known.sum()), np.int64)
        found[known] = score_images(log_p[known], labels).entropy
    return found


def disagreement(logits: ArrayLike) -> FloatArray:
    """Return the mean divergence [N], in nats, of T answers with logits [T, N, K] from their mean.

    It is KL(p_t || mean p), averaged over t. This equals the mutual information of answer and
    class, which is the entropy of the mean less the mean entropy. It is 0 if all answers agree, and
    NaN for an image with a logit that is not finite.
    """
    log_p = _log_probabilities(logits)
    log_q = _mean_log(log_p)
    apart = log_p - log_q
    # p log(p / q) - p + q has the same sum over classes, and its terms are never negative. So no
    # small term is lost in larger ones.
    terms = np.exp(log_q) * (apart * np.exp(apart) - np.expm1(apart))
    return np.maximum(terms.sum(axis=2).mean(axis=0), 0.0)


def _log_probabilities(logits: ArrayLike) -> FloatArray:
    z = np.asarray(logits, dtype=np.float64)
    if z.ndim != 3 or not z.shape[0]:
        raise ValueError(f"expected logits [T, N, K] of T >= 1 answers, got shape {list(z.shape)}")
    finite = np.all(np.isfinite(z), axis=(0, 2))
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
        lambda evidence: -entropy_of_mean(given(evidence.passes)),
    ),
    Score(
        "mc_dropout_agreement",
        "MC dropout, agreement",
        "minus the mutual information of dropout masks and class (BALD)",
        "Gal, Islam and Ghahramani (ICML 2017)",
        "passes",
        lambda evidence: -disagreement(given(evidence.passes)),
    ),
    Score(
        "ensemble_agreement",
        "Ensemble agreement",
        "minus the mean divergence of the networks' probabilities from their mean",
        "Lakshminarayanan et al. (NeurIPS 2017)",
        "networks",
        lambda evidence: -disagreement(given(evidence.networks)),
    ),
)
