"""ConfidNet's head, against the authors' loss and layers written out."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.special import softmax
from sklearn.metrics import roc_auc_score

from flatcal_dist.calibration.confidence import of_head
from flatcal_dist.calibration.confidence.of_head import confidnet, true_class_probability
from flatcal_dist.calibration.confidence.score import Reference


def images(count: int, seed: int) -> tuple[Reference, np.ndarray]:
    """Images of three classes, and which of them are right: a feature says whether labels are."""
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(count, 6)).astype(np.float32)
    logits = 4 * rng.normal(size=(count, 3)).astype(np.float32)
    misled = features[:, 0] > 0.5
    labels = np.where(misled, logits.argsort(axis=1)[:, 1], logits.argmax(axis=1))
    return Reference(features, labels, logits), ~misled


def written_out(known: Reference, judged: np.ndarray, seed: int, epochs: int) -> np.ndarray:
    """The layers uncertainty1 to uncertainty5, SelfConfidMSELoss and Adam of the authors' code."""
    torch.manual_seed(seed)
    sizes = [known.features.shape[1], 400, 400, 400, 400, 1]
    layers = [torch.nn.Linear(a, b) for a, b in pairwise(sizes)]
    adam = torch.optim.Adam([p for layer in layers for p in layer.parameters()], lr=1e-4)
    x, z = torch.from_numpy(known.features), torch.from_numpy(known.logits)
    hot = torch.eye(z.shape[1])[torch.from_numpy(known.labels)]

    def uncertainty(x: torch.Tensor) -> torch.Tensor:
        for layer in layers[:-1]:
            x = torch.relu(layer(x))
        return layers[-1](x)

    for _ in range(epochs):
        for some in torch.randperm(len(x)).split(128):
            confidence = torch.sigmoid(uncertainty(x[some])).squeeze()
            probs = torch.softmax(z[some], dim=1)
            loss = torch.mean((confidence - (probs * hot[some]).sum(dim=1)) ** 2)
            adam.zero_grad()
            loss.backward()
            adam.step()
    with torch.no_grad():
        return torch.sigmoid(uncertainty(torch.from_numpy(judged)))[:, 0].numpy()


def test_it_is_the_authors_head_and_loss(monkeypatch) -> None:
    monkeypatch.setattr(of_head, "EPOCHS", 4)
    known, judged = images(300, 0)[0], images(50, 1)[0].features
    before = torch.random.get_rng_state()
    with torch.inference_mode():
        found = confidnet(judged, known, seed=3)
    assert torch.equal(before, torch.random.get_rng_state()), "the caller's random numbers stay"
    expected = written_out(known, judged, 3, 4)
    assert found == pytest.approx(expected, abs=1e-5)  # rounding of float32 in 12 steps
    assert np.ptp(found) > 1e-3, "it says more than one thing"


def test_the_last_of_many_steps_ends_it(monkeypatch) -> None:
    monkeypatch.setattr(of_head, "EPOCHS", 9)
    known, judged = images(300, 0)[0], images(50, 1)[0].features
    monkeypatch.setattr(of_head, "STEPS", 6)  # two epochs of three
    assert confidnet(judged, known) == pytest.approx(written_out(known, judged, 0, 2), abs=1e-5)


def test_it_finds_what_the_probability_does_not_see(monkeypatch) -> None:
    monkeypatch.setattr(of_head, "EPOCHS", 40)
    known, (judged, right) = images(1000, 0)[0], images(1000, 1)
    largest = softmax(judged.logits, axis=1).max(axis=1)
    head = confidnet(judged.features, known)
    assert roc_auc_score(right, head) > 0.95 > 0.7 > roc_auc_score(right, largest)


def test_the_probability_of_the_true_class() -> None:
    logits = np.log([[0.2, 0.3, 0.5], [0.9, 0.05, 0.05]])
    assert true_class_probability(logits, [1, 0]) == pytest.approx([0.3, 0.9])
    assert true_class_probability([[1e4, 0.0]], [1]) == pytest.approx([0.0])


@pytest.mark.parametrize(
    ("features", "known", "message"),
    [
        (np.ones((2, 3)), Reference(np.ones((0, 3)), np.ones(0, int), np.ones((0, 2))), "no image"),
        (np.ones((2, 3)), Reference(np.ones((4, 3)), np.ones(4, int)), "lacks"),
        (np.ones((2, 3)), Reference(np.ones((4, 2)), np.ones(4, int), np.ones((4, 2))), "shape"),
        (np.full((2, 3), np.nan), images(4, 0)[0], "shape"),
        (np.full((2, 6), np.nan), images(4, 0)[0], "NaN"),
    ],
)
def test_what_cannot_be_fitted(features, known, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        confidnet(features, known)
