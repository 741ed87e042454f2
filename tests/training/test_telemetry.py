"""Which steps are measured, where a rule does not perturb in each of them; and what is logged."""

import pytest

from flatcal_dist.data import prepare_digits
from flatcal_dist.sharpness import SAM
from flatcal_dist.tracking.tracker import read_metrics
from flatcal_dist.training.figures import measured_at
from tests.support.jobs import Run

TOTAL = 23


@pytest.mark.parametrize("every", [1, 2, 3, 5, 7])
@pytest.mark.parametrize("records", [1, 2, 4, 10, 50])
def test_the_last_perturbation_before_each_record_is_measured(every, records):
    rule = SAM(0.1, every=every)
    due = [step for step in range(TOTAL) if measured_at(rule.perturbs_at, step, records, TOTAL)]
    windows = [range(a, min(a + records, TOTAL)) for a in range(0, TOTAL, records)]
    perturbing = [[s for s in window if s % every == 0] for window in windows]
    assert due == [steps[-1] for steps in perturbing if steps]


def test_a_run_logs_what_its_network_saw_of_the_perturbation(tmp_path):
    """In fp32 it is all of the length, in the right direction."""
    data = prepare_digits(tmp_path / "data")
    run = Run(tmp_path / "run", data, "ddp", "train.max_steps=2", "train.precision=fp32")
    run.finish(ranks=1)
    steps = [r for r in read_metrics(run.path / "metrics.jsonl") if "train/loss" in r]
    assert len(steps) == 2
    for record in steps:
        assert record["optim/rho"] == 0.05
        assert record["optim/seen_along"] / record["optim/rho"] == pytest.approx(1, abs=1e-3)
        assert record["optim/seen_cosine"] == pytest.approx(1, abs=1e-3)
