"""Which steps are measured, where a rule does not perturb in each of them."""

from types import SimpleNamespace

import pytest

from flatcal_dist.sharpness import SAM
from flatcal_dist.training.loop import Trainer

TOTAL = 23


@pytest.mark.parametrize("every", [1, 2, 3, 5, 7])
@pytest.mark.parametrize("records", [1, 2, 4, 10, 50])
def test_the_last_perturbation_before_each_record_is_measured(every, records):
    train = SimpleNamespace(log_every_steps=records)
    trainer = SimpleNamespace(
        step=SimpleNamespace(rule=SAM(0.1, every=every)),
        config=SimpleNamespace(train=train),
        total_steps=TOTAL,
    )
    due = []
    for trainer.done in range(TOTAL):
        if Trainer._sharpness_is_due(trainer):
            due.append(trainer.done)
    windows = [range(a, min(a + records, TOTAL)) for a in range(0, TOTAL, records)]
    perturbing = [[s for s in window if s % every == 0] for window in windows]
    assert due == [steps[-1] for steps in perturbing if steps]
