import numpy as np
import pytest
from scipy.stats import binom

from flatcal_dist.calibration.after_training.conformal import (
    KINDS,
    Rule,
    Sets,
    conformal_sets,
    threshold_of,
)
from flatcal_dist.calibration.calibrators.crossfit import fold_of
from flatcal_dist.calibration.softmax import log_softmax
from tests.support.synthetic import DEGENERATE, degenerate, make_logits


def literal_score(rule: Rule, p: np.ndarray, k: int, u: float) -> float:
    """The score of class k, written out as in the papers."""
    if rule.kind == "lac":
        return 1 - p[k]
    order = sorted(range(len(p)), key=lambda j: (-p[j], j))
    place = order.index(k)  # from 0
    mass = sum(p[j] for j in order[:place])
    return mass + u * p[k] + rule.penalty * max(0, place + 1 - rule.free)


@pytest.mark.parametrize(
    "rule", [Rule("lac", 1.3), Rule("aps", 0.7), Rule("raps", 2.0, 0.1, 2)], ids=lambda r: r.kind
)
def test_scores_and_sizes_are_the_papers(rule: Rule) -> None:
    z = np.random.default_rng(0).normal(0, 2, (40, 6))
    z[:5, 2] = z[:5, 4]  # ties
    u, y = np.random.default_rng(1).random(40), np.arange(40) % 6
    p = np.exp(log_softmax(z / rule.temperature))
    found, sizes = rule.of_labels(z, y, u), rule.sizes(z, u, 0.83)
    for i in range(40):
        scores = [literal_score(rule, p[i], k, u[i]) for k in range(6)]
        assert found[i] == pytest.approx(scores[y[i]], abs=1e-12)
        assert sizes[i] == sum(score <= 0.83 for score in scores)


def test_the_threshold_is_the_quantile_of_one_more_image() -> None:
    assert threshold_of([3, 1, 2, 4, 5, 6, 7, 8, 9], 0.9) == 9
    assert threshold_of(np.arange(1, 20), 0.9) == 18
    assert threshold_of(np.arange(8), 0.9) == np.inf  # 8 images cannot tell 90 %
    assert threshold_of([], 0.9) == np.inf


@pytest.mark.parametrize("wanted", [0.8, 0.9])
def test_coverage_lies_within_its_binomial_interval(wanted: float) -> None:
    """Independent images; the labels follow other probabilities than the network says.

    The threshold comes from three times as many images as it is judged on, which adds a third to
    the binomial variance of a part. The intervals allow for it: 99.9 % with 3/4 of the images.
    """
    ids, labels, logits = make_logits(4500, 8, scale=4.0)
    found = conformal_sets(ids, labels, logits, wanted)
    low, high = binom.interval(0.999, int(4500 * 3 / 4), wanted) / np.array(4500 * 3 / 4)
    for kind in KINDS:
        assert low < found[kind].covered.mean() < high
        assert 1 <= found[kind].size.mean() < 6
    for f in range(5):  # and in each part, with the same allowance
        part = fold_of(ids) == f
        low, high = binom.interval(0.9999, int(part.sum() * 3 / 4), wanted) / (part.sum() * 3 / 4)
        assert all(low < found[kind].covered[part].mean() < high for kind in KINDS)


@pytest.mark.filterwarnings("ignore:no finite temperature:RuntimeWarning")  # wrong labels tune
def test_labels_of_a_part_do_not_change_its_sets() -> None:
    ids, labels, logits = make_logits(400, 6)
    part = fold_of(ids) == 3
    changed = np.where(part, (labels + 1) % 6, labels)
    before, after = (conformal_sets(ids, y, logits) for y in (labels, changed))
    for kind in KINDS:
        assert (before[kind].size[part] == after[kind].size[part]).all()
        assert (before[kind].size != after[kind].size).any()


def test_the_order_of_images_does_not_matter() -> None:
    ids, labels, logits = make_logits(300, 5)
    order = np.random.default_rng(0).permutation(300)
    there = conformal_sets(ids, labels, logits)
    turned = conformal_sets([ids[i] for i in order], labels[order], logits[order])
    assert all((there[k].size[order] == turned[k].size).all() for k in KINDS)


@pytest.mark.filterwarnings("ignore:no finite temperature:RuntimeWarning")
@pytest.mark.parametrize("case", DEGENERATE)
def test_degenerate_images(case: str) -> None:
    ids, labels, logits = degenerate(case, images=200, few=3)
    classes = logits.shape[1]
    for sets in conformal_sets(ids, labels, logits).values():
        assert isinstance(sets, Sets)
        assert ((sets.size >= 0) & (sets.size <= classes)).all()
        assert sets.covered.mean() > 0.82
        if case == "few":  # nothing can be said, so that every class is in the set
            assert (sets.size == classes).all()


def test_refused() -> None:
    ids, labels, logits = make_logits(20, 4)
    with pytest.raises(ValueError, match="wanted must lie between 0 and 1, got 1"):
        conformal_sets(ids, labels, logits, 1)
    with pytest.raises(ValueError, match="ids must be unique"):
        conformal_sets([*ids[:-1], ids[0]], labels, logits)
