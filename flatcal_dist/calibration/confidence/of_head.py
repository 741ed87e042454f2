"""ConfidNet: a head on the features that learns how probable the true class is.

Source: Corbière et al., Addressing Failure Prediction by Learning Model Confidence (NeurIPS 2019),
section 2, and https://github.com/valeoai/ConfidNet. There, training images are augmented, a
validation set chooses among 500 epochs, and a copy of the network is trained further afterwards.
Here the network stays as it is, images are not augmented, and the last weights of the head count.
"""

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from flatcal_dist.calibration.checks import FloatArray
from flatcal_dist.calibration.confidence.score import (
    Evidence,
    Reference,
    Score,
    checked_features,
    given,
)
from flatcal_dist.calibration.softmax import log_softmax

if TYPE_CHECKING:
    from torch import Tensor, nn

WIDTH, HIDDEN = 400, 4
RATE, BATCH = 1e-4, 128  # of Adam
EPOCHS, STEPS = 500, 5_000  # training ends at the first of the two


def true_class_probability(logits: ArrayLike, labels: ArrayLike) -> FloatArray:
    """Return the probability [N] of the true class, from logits [N, K] and labels int [N]."""
    log_p = log_softmax(np.asarray(logits, dtype=np.float64))
    return np.exp(log_p[np.arange(len(log_p)), np.asarray(labels)])


def confidnet(features: ArrayLike, fitted_on: Reference, seed: int = 0) -> FloatArray:
    """Return the probability of the true class [N] that a head predicts from features.

    The head is fitted on images that are not judged. A network that has learned its training images
    by heart gives nearly all of them probability 1, and then the head learns little from them.
    Images that the network was not trained on (`data.holdout`) teach more.

    Args:
        features: The features of the images [N, D].
        fitted_on: The images that the head is fitted on, with their logits.
        seed: The seed of the first weights and of the order of the images.

    Raises:
        ValueError: Features are not finite or differ in length, or there are no images to fit on.
    """
    import torch  # a report is made without it, and to import it takes seconds

    x = checked_features(features, fitted_on)
    if not len(fitted_on.labels):
        raise ValueError("there are no images to fit its head on")
    probability = true_class_probability(given(fitted_on.logits), fitted_on.labels)
    with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        seen, target, judged = (
            torch.tensor(array, dtype=torch.float32, device=device)
            for array in (fitted_on.features, probability, x)
        )
        head = _fit(_head(x.shape[1]).to(device), seen, target)
        with torch.no_grad():
            return head(judged).sigmoid()[:, 0].double().cpu().numpy()


def _head(features: int) -> "nn.Sequential":
    """D - 400 - 400 - 400 - 400 - 1, with ReLU between the layers."""
    from torch import nn

    layers: list[nn.Module] = []
    for inputs in (features, *[WIDTH] * (HIDDEN - 1)):
        layers += [nn.Linear(inputs, WIDTH), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(WIDTH, 1))


def _fit(head: "nn.Sequential", features: "Tensor", target: "Tensor") -> "nn.Sequential":
    """Minimise the squared error of the sigmoid of the head (equation 5 of the paper)."""
    import torch

    optimizer = torch.optim.Adam(head.parameters(), lr=RATE, fused=True)
    each_epoch = -(-len(features) // BATCH)
    left = min(EPOCHS * each_epoch, STEPS)
    while left > 0:
        for chosen in torch.randperm(len(features)).split(BATCH)[:left]:
            loss = (head(features[chosen]).sigmoid()[:, 0] - target[chosen]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        left -= each_epoch
    return head


def _confidnet(evidence: Evidence) -> FloatArray:
    return confidnet(given(evidence.features), given(evidence.fitted_on))


SCORES = (
    Score(
        "confidnet",
        "ConfidNet",
        "the probability of the true class that a head on the features predicts",
        "Corbière et al. (NeurIPS 2019), network frozen",
        "head",
        _confidnet,
    ),
)
