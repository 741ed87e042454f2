"""Which steps are measured, where a rule does not perturb in each of them."""

import pytest

from flatcal_dist.sharpness import SAM
from flatcal_dist.training.figures import measured_at

TOTAL = 23


@pytest.mark.parametrize("every", [1, 2, 3, 5, 7])
@pytest.mark.parametrize("records", [1, 2, 4, 10, 50])
def test_the_last_perturbation_before_each_record_is_measured(every, records):
    rule = SAM(0.1, every=every)
    due = [step for step in range(TOTAL) if measured_at(rule.perturbs_at, step, records, TOTAL)]
    windows = [range(a, min(a + records, TOTAL)) for a in range(0, TOTAL, records)]
    perturbing = [[s for s in window if s % every == 0] for window in windows]
    assert due == [steps[-1] for steps in perturbing if steps]
