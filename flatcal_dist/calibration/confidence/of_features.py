"""Scores that compare the features of an image with those of training images.

Features are what the last layer of a network makes its logits of. Distances are of features as
they are, in float64.
"""

import numpy as np
from numpy.typing import ArrayLike
from scipy.linalg import eigh
from sklearn.neighbors import NearestNeighbors

from flatcal_dist.calibration.checks import FloatArray, IntArray
from flatcal_dist.calibration.confidence.score import Evidence, Reference, Score

SMALLEST = 1e-12  # distance, as in the code of Jiang et al.


def trust_score(features: ArrayLike, prediction: ArrayLike, reference: Reference) -> FloatArray:
    """Distance to the nearest training image of another class, over that of the predicted class.

    Features [N, D] and predicted classes int [N] give [N]. No training image is filtered out
    (alpha = 0). 0 where there is no training image of the predicted class. Source: Jiang et al., To
    Trust Or Not To Trust A Classifier (NeurIPS 2018), section 3. ValueError if features are not
    finite, differ in length, or there are fewer than two classes of training images.
    """
    x, y = _features(features, reference), np.asarray(prediction)
    classes = np.unique(reference.labels)
    if len(classes) < 2:
        raise ValueError("a trust score needs training images of at least two classes")
    own, other = np.full(len(x), np.inf), np.full(len(x), np.inf)
    for k in classes:
        nearest = NearestNeighbors(n_neighbors=1)
        nearest.fit(reference.features[reference.labels == k].astype(np.float64))
        distance = nearest.kneighbors(x)[0][:, 0]
        mine = y == k
        own[mine] = distance[mine]
        other[~mine] = np.minimum(other[~mine], distance[~mine])
    return other / (own + SMALLEST)


def mahalanobis(features: ArrayLike, reference: Reference) -> FloatArray:
    """Minus the squared Mahalanobis distance to the nearest class mean; shape [N].

    The means are those of the training images of each class, and the covariance is shared: that of
    all training images about the mean of their class. Directions in which the training images do
    not differ are left out, as by scikit-learn's EmpiricalCovariance. Source: Lee et al., A Simple
    Unified Framework for Detecting Out-of-Distribution Samples (NeurIPS 2018), section 2.1.
    ValueError if features [N, D] are not finite or differ in length, or if training images of a
    class do not differ at all.
    """
    x = _features(features, reference)
    classes, place = np.unique(reference.labels, return_inverse=True)
    known = reference.features.astype(np.float64)
    means = np.stack([known[place == k].mean(axis=0) for k in range(len(classes))])
    known -= means[place]
    variances, directions = eigh(known.T @ known / len(known))
    varies = (
        variances > len(variances) * np.finfo(np.float64).eps * variances[-1]
    )  # as pinvh has it
    if not varies.any():
        raise ValueError("the features of all training images of a class are the same")
    # In these directions, of variance 1 each, the distance is the plain one.
    scaled = directions[:, varies] / np.sqrt(variances[varies])
    nearest = NearestNeighbors(n_neighbors=1).fit(means @ scaled)
    return -(nearest.kneighbors(x @ scaled)[0][:, 0] ** 2)


def _features(features: ArrayLike, reference: Reference) -> FloatArray:
    x = np.asarray(features, dtype=np.float64)
    if x.ndim != 2 or x.shape[1:] != reference.features.shape[1:]:
        raise ValueError(
            f"features have shape {list(x.shape)}, those of the training images "
            f"{list(reference.features.shape)}: expected [N, D] and [M, D]"
        )
    for array, whose in ((x, "the images"), (reference.features, "the training images")):
        if not np.isfinite(array).all():
            raise ValueError(f"features of {whose} hold NaN or infinite values")
    return x


def _trust(evidence: Evidence) -> FloatArray:
    prediction: IntArray = evidence.prediction
    return trust_score(evidence.features, prediction, evidence.reference)


SCORES = (
    Score(
        "trust_score",
        "Trust score",
        "distance to training images of other classes over that to the predicted class",
        "Jiang et al. (NeurIPS 2018), k = 1, alpha = 0",
        "features",
        _trust,
    ),
    Score(
        "mahalanobis",
        "Mahalanobis",
        "minus the Mahalanobis distance to the nearest class mean of training images",
        "Lee et al. (NeurIPS 2018), last features",
        "features",
        lambda evidence: mahalanobis(evidence.features, evidence.reference),
    ),
)
