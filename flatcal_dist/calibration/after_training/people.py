"""A network against what people say about the same images, who do not always agree."""

import numpy as np
from pydantic import Field
from scipy.special import xlogy

from flatcal_dist.calibration.checks import FloatArray
from flatcal_dist.calibration.metrics.calibration_errors import equal_width_index
from flatcal_dist.calibration.report.parts import Count, Number, Part, Rate
from flatcal_dist.calibration.softmax import log_softmax

BINS = 15


class AgainstPeople(Part):
    """A network as trained against the answers of people. Entropies are in nats."""

    images: Count
    agreement: Rate = Field(
        description="the mean share of people who give an image the network's answer"
    )
    best_agreement: Rate = Field(
        description="the agreement of always giving the answer that most people give"
    )
    accuracy: Rate = Field(description="how often the answer is the one that most people give")
    cross_entropy: Number = Field(description="of the network's probabilities under people's")
    entropy: Number = Field(description="of people's answers")
    divergence: Number = Field(
        description="of Kullback and Leibler, which is cross-entropy less entropy"
    )
    distance: Rate = Field(
        description="mean total variation distance between both: half the sum of differences"
    )
    ece: Rate = Field(description="of the confidence, with agreement in the place of being right")
    signed_gap: Number = Field(description="mean confidence less agreement")


def against_people(logits: np.ndarray, people: FloatArray) -> AgainstPeople:
    """Compare the probabilities of a network with the answers of people.

    Sources: Peterson et al., Human Uncertainty Makes Classification More Robust (ICCV 2019), for
    cross-entropy and accuracy; Baan et al., Stop Measuring Calibration When Humans Disagree (EMNLP
    2022), for the distance. With certain people the figures are those of a label.

    Args:
        logits: The logits [N, K].
        people: The shares of people who give each answer [N, K]. Each row has the sum 1.

    Raises:
        ValueError: The shapes differ.
    """
    if np.shape(logits) != np.shape(people):
        raise ValueError(
            f"logits have shape {list(np.shape(logits))}, the answers of people "
            f"{list(np.shape(people))}: expected the same [N, K]"
        )
    log_p = log_softmax(logits)
    p = np.exp(log_p)
    answer = np.asarray(logits).argmax(axis=1)
    rows = np.arange(len(p))
    confidence, agreed, most = p[rows, answer], people[rows, answer], people.max(axis=1)
    # 0 log 0 is 0: nobody gives the answer. The log of a probability that vanishes is finite here.
    cross = -(people * log_p).sum(axis=1).mean()
    entropy = -xlogy(people, people).sum(axis=1).mean()
    index = equal_width_index(confidence, BINS)
    gaps = np.bincount(index, weights=confidence - agreed, minlength=BINS)
    return AgainstPeople(
        images=len(p),
        agreement=float(agreed.mean()),
        best_agreement=float(most.mean()),
        accuracy=float((agreed == most).mean()),
        cross_entropy=float(cross),
        entropy=float(entropy),
        divergence=float(cross - entropy),
        distance=float(np.abs(p - people).sum(axis=1).mean() / 2),
        ece=float(np.abs(gaps).sum() / len(p)),
        signed_gap=float((confidence - agreed).mean()),
    )
