"""What a record of metrics.jsonl holds: figures of one step, and the speed since the last one."""

import time
from collections.abc import Callable

from flatcal_dist.sharpness import StepResult


def sharpness_figures(result: StepResult, rho: float) -> dict[str, float | None]:
    """Return what only a step with a perturbation has; nothing for a step without one.

    A rule without an ascent pass has no loss at w, and so no sharpness.
    """
    figures: dict[str, float | None] = {}
    if result.perturbed_loss is not None:
        figures = {
            "train/perturbed_loss": result.perturbed_loss,
            "train/sharpness": result.perturbed_loss - result.loss,
            "optim/ascent_gradient_norm": result.ascent_gradient_norm,
        }
    elif result.cosine is None:
        return {}
    return figures | {
        "optim/gradient_cosine": result.cosine,
        "optim/rho": rho,
        "optim/effective_rho": result.effective_rho,
        "optim/seen_along": result.seen_along,
        "optim/seen_cosine": result.seen_cosine,
    }


class Speed:
    """The speed of steps since the last reading.

    The caller counts `steps`, and adds to `since` the time that is not part of any step.
    """

    def __init__(self) -> None:
        self.steps, self.waited = 0, 0.0
        self.since = self.waiting_since = time.monotonic()

    def begin(self) -> None:
        """Start to measure; the first step waits for its data."""
        self.steps, self.waited = 0, 0.0
        self.since = self.waiting_since = time.monotonic()

    def waits_for_data(self) -> None:
        """Say that a step waits for its data from now on."""
        self.waiting_since = time.monotonic()

    def has_data(self) -> None:
        """Say that the data of the step is there."""
        self.waited += time.monotonic() - self.waiting_since

    def read(self, samples: int) -> dict[str, float]:
        """Return the speed, for steps of so many samples, and start to measure again."""
        now = time.monotonic()
        elapsed = now - self.since
        values = {
            "perf/images_per_second": self.steps * samples / elapsed,
            "perf/step_seconds": elapsed / self.steps,
            "perf/data_wait_fraction": self.waited / elapsed,
        }
        self.since, self.steps, self.waited = now, 0, 0.0
        return values


def measured_at(perturbs: Callable[[int], bool], step: int, every: int, total: int) -> bool:
    """Whether a step is the last one with a perturbation before the next regular record.

    Args:
        perturbs: Whether the step of a number perturbs.
        step: The number of the step, from 0.
        every: The number of steps between regular records.
        total: The number of steps of the run.
    """
    if not perturbs(step):
        return False
    record = min((step // every + 1) * every, total)
    return not any(perturbs(later) for later in range(step + 1, record))
