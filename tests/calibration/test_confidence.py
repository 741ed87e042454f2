"""Scores of features and of several answers, against scikit-learn, SciPy and plain loops."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.special import expit, softmax
from scipy.stats import entropy
from sklearn.covariance import EmpiricalCovariance

from flatcal_dist.calibration.confidence.of_features import mahalanobis, trust_score
from flatcal_dist.calibration.confidence.of_passes import (
    disagreement,
    entropy_of_mean,
    mean_log_probabilities,
)
from flatcal_dist.calibration.confidence.score import Evidence, Reference
from flatcal_dist.calibration.confidence.sources import BY_KEY, ON_REQUEST, SCORES, requested
from flatcal_dist.evaluation.passes import Ensemble

RANDOM = np.random.default_rng(7)
LABELS = np.repeat([0, 2, 5], [30, 20, 10])  # class 1 and others have no training image
KNOWN = (RANDOM.normal(size=(60, 6)) + LABELS[:, None]).astype(np.float32)
SEEN = RANDOM.normal(2, 2, (25, 6)).astype(np.float32)
ANSWERS = RANDOM.normal(0, 3, (8, 40, 5))


def test_trust_score_is_the_ratio_of_two_distances() -> None:
    prediction = np.arange(25) % 3 * 2  # 0, 2 and 4, of which there is no training image
    found = trust_score(SEEN, prediction, Reference(KNOWN, LABELS))
    for x, k, value in zip(SEEN.astype(float), prediction, found, strict=True):
        distance = np.sqrt(((KNOWN.astype(float) - x) ** 2).sum(1))
        if k == 4:
            assert value == 0
            continue
        ratio = distance[k != LABELS].min() / distance[k == LABELS].min()
        assert value == pytest.approx(ratio, rel=1e-9)


def test_trust_score_of_a_training_image_is_finite() -> None:
    found = trust_score(KNOWN[:3], [0, 0, 2], Reference(KNOWN, LABELS))
    assert np.isfinite(found).all()
    assert (found[:2] > 1e5).all()
    assert found[2] < 1e-5, "it lies on an image of another class"


@pytest.mark.parametrize("dead", [0, 2])
def test_mahalanobis_is_scikit_learns(dead: int) -> None:
    """Also where some features never differ, and others are sums of others."""
    known, seen = (np.hstack([x, np.full((len(x), dead), 3.0)]) for x in (KNOWN, SEEN))
    if dead:
        known, seen = (np.hstack([x, x[:, :1] + x[:, 1:2]]) for x in (known, seen))
    centred, distances = known.astype(float).copy(), []
    for k in np.unique(LABELS):
        centred[k == LABELS] -= centred[k == LABELS].mean(0)
    shared = EmpiricalCovariance(assume_centered=True).fit(centred)
    for k in np.unique(LABELS):
        mean = known[k == LABELS].astype(float).mean(0)
        distances.append(shared.mahalanobis(seen - mean))
    found = mahalanobis(seen, Reference(known, LABELS))
    assert found == pytest.approx(-np.min(distances, axis=0), rel=1e-6)


def test_mahalanobis_needs_images_that_differ() -> None:
    with pytest.raises(ValueError, match="of a class are the same"):
        mahalanobis(SEEN, Reference(np.ones((60, 6)) * LABELS[:, None], LABELS))


@pytest.mark.parametrize("key", ["trust_score", "mahalanobis"])
@pytest.mark.parametrize(
    ("seen", "known", "message"),
    [
        (SEEN[:, :4], KNOWN, r"shape \[25, 4\], those of the training images \[60, 6\]"),
        (SEEN * np.nan, KNOWN, "features of the images hold NaN"),
        (SEEN, KNOWN * np.inf, "features of the training images hold NaN or infinite"),
    ],
)
def test_features_that_cannot_be_compared(key, seen, known, message) -> None:
    evidence = Evidence(
        features=seen, prediction=np.zeros(25, int), reference=Reference(known, LABELS)
    )
    with pytest.raises(ValueError, match=message):
        BY_KEY[key].compute(evidence)


def test_a_trust_score_needs_two_classes() -> None:
    with pytest.raises(ValueError, match="at least two classes"):
        trust_score(SEEN, np.zeros(25), Reference(KNOWN[:30], LABELS[:30]))


def test_scores_of_several_answers_are_their_formulas() -> None:
    p = softmax(ANSWERS, axis=2)
    mean = p.mean(0)
    assert np.exp(mean_log_probabilities(ANSWERS)) == pytest.approx(mean, rel=1e-12)
    assert entropy_of_mean(ANSWERS) == pytest.approx(entropy(mean, axis=1), rel=1e-12)
    information = entropy(mean, axis=1) - entropy(p, axis=2).mean(0)
    assert disagreement(ANSWERS) == pytest.approx(information, rel=1e-10)
    divergence = np.mean([entropy(one, mean, axis=1) for one in p], axis=0)
    assert disagreement(ANSWERS) == pytest.approx(divergence, rel=1e-10)
    evidence = Evidence(passes=ANSWERS, networks=ANSWERS)
    assert (BY_KEY["mc_dropout"].compute(evidence) == -entropy_of_mean(ANSWERS)).all()
    assert (BY_KEY["mc_dropout_agreement"].compute(evidence) == -disagreement(ANSWERS)).all()
    assert (BY_KEY["ensemble_agreement"].compute(evidence) == -disagreement(ANSWERS)).all()


@given(arrays(np.float32, (3, 2, 4), elements=st.floats(-1e4, 1e4, width=32)))
@settings(deadline=None)
def test_answers_of_any_size(answers) -> None:
    found = entropy_of_mean(answers)
    assert ((found >= 0) & (found <= np.log(4) + 1e-12)).all()
    apart = disagreement(answers)
    assert ((apart >= 0) & (apart <= np.log(3) + 1e-12)).all()
    same = np.repeat(answers[:1], 3, axis=0)
    assert disagreement(same) == pytest.approx(0, abs=1e-15)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_logit_that_is_not_finite_spoils_its_image_alone(bad: float) -> None:
    spoiled = ANSWERS.copy()
    spoiled[3, 7, 2] = bad
    others = np.arange(40) != 7
    for score in (entropy_of_mean, disagreement):
        found = score(spoiled)
        assert np.isnan(found[7])
        assert (found[others] == score(ANSWERS)[others]).all()
    assert np.isfinite(entropy_of_mean(np.array([[[3e38, -3e38]], [[-3e38, 3e38]]]))).all()


def test_the_entropy_of_sure_answers_keeps_its_digits() -> None:
    """With two classes it is known of what is left to 1, which is 1e-15 here, and 1e-26."""
    gaps = np.concatenate([RANDOM.uniform(32, 36, (7, 50)), RANDOM.uniform(50, 60, (7, 50))], 1)
    rest = expit(-gaps).mean(axis=0)
    expected = -rest * np.log(rest) - (1 - rest) * np.log1p(-rest)
    answers = np.stack([np.zeros_like(gaps), -gaps], axis=2)
    assert entropy_of_mean(answers) == pytest.approx(expected, rel=1e-9, abs=0)


def test_an_ensembles_answer_is_the_same_mean() -> None:
    import torch

    found = Ensemble.mean(torch.from_numpy(ANSWERS)).numpy()
    assert found == pytest.approx(mean_log_probabilities(ANSWERS), rel=1e-12)


def test_the_list_of_scores() -> None:
    keys = [score.key for score in SCORES]
    assert len(set(keys)) == len(keys)
    assert keys[0] == "msp", "what others are compared to"
    assert all(s.name and s.meaning and s.source for s in SCORES)
    of_passes = ("mc_dropout", "mc_dropout_agreement")
    assert ("trust_score", "mahalanobis", "confidnet", *of_passes) == ON_REQUEST
    asked = [score.key for score in requested(["mc_dropout", "trust_score"])]
    assert asked == ["trust_score", "mc_dropout"], "in the order of the list"


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("trust", "no confidence score is called 'trust'; you can ask for trust_score, mah"),
        ("energy", "every report holds energy, so it needs no request"),
        ("ensemble_agreement", "--ensemble` computes it"),
    ],
)
def test_scores_that_cannot_be_asked_for(key: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        requested(["trust_score", key])
