"""Scores that compare the features of an image with those of training images.

Features are the input of the last layer of a network. Distances are computed in float64 from the
features as they are.
"""

import numpy as np
from numpy.typing import ArrayLike
from scipy.linalg import eigh

from flatcal_dist.calibration.checks import FloatArray
from flatcal_dist.calibration.confidence.score import (
    Evidence,
    Reference,
    Score,
    checked_features,
    given,
)

SMALLEST = 1e-12  # added to a distance, as in the code of Jiang et al.


def trust_score(features: ArrayLike, prediction: ArrayLike, reference: Reference) -> FloatArray:
    """Return the trust score of each image [N].

    It is the distance to the nearest training image of another class, divided by the distance to
    the nearest training image of the predicted class. No training image is filtered out (alpha =
    0). Source: Jiang et al., To Trust Or Not To Trust A Classifier (NeurIPS 2018), section 3.

    Args:
        features: The features of the images [N, D].
        prediction: The predicted class of each image int [N].
        reference: The training images.

    Returns:
        The scores [N]. 0 if there is no training image of the predicted class.

    Raises:
        ValueError: Features are not finite or differ in length, or training images are of fewer
            than two classes.
    """
    x, y = checked_features(features, reference), np.asarray(prediction)
    classes = np.unique(reference.labels)
    if len(classes) < 2:
        raise ValueError("a trust score needs training images of at least two classes")
    from sklearn.neighbors import NearestNeighbors  # the import takes a second of each start

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
    """Return minus the squared Mahalanobis distance [N] of features [N, D] to the nearest mean.

    Each class has the mean of its training images. All classes share one covariance, that of the
    training images about the mean of their class. Directions in which training images do not differ
    are left out, as in scikit-learn's EmpiricalCovariance. Source: Lee et al., A Simple Unified
    Framework for Detecting Out-of-Distribution Samples (NeurIPS 2018), section 2.1.

    ValueError if features are not finite or differ in length, or if the training images of each
    class do not differ at all.
    """
    x = checked_features(features, reference)
    classes, place = np.unique(reference.labels, return_inverse=True)
    known = reference.features.astype(np.float64)
    means = np.stack([known[place == k].mean(axis=0) for k in range(len(classes))])
    known -= means[place]
    variances, directions = eigh(known.T @ known / len(known))
    # The same threshold as in scipy.linalg.pinvh.
    varies = variances > len(variances) * np.finfo(np.float64).eps * variances[-1]
    if not varies.any():
        raise ValueError("the features of all training images of a class are the same")
    from sklearn.neighbors import NearestNeighbors

    # Scaled to variance 1 in each direction, the distance is the Euclidean one.
    scaled = directions[:, varies] / np.sqrt(variances[varies])
    nearest = NearestNeighbors(n_neighbors=1).fit(means @ scaled)
    return -(nearest.kneighbors(x @ scaled)[0][:, 0] ** 2)


def _trust(evidence: Evidence) -> FloatArray:
    features, reference = given(evidence.features), given(evidence.reference)
    return trust_score(features, given(evidence.prediction), reference)


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
        lambda evidence: mahalanobis(given(evidence.features), given(evidence.reference)),
    ),
)
