"""What an entry says about a metric. `entries` lists all metrics."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from flatcal_dist.calibration.checks import BoolArray, FloatArray
from flatcal_dist.calibration.metrics.corp import CorpDecomposition, corp_decomposition
from flatcal_dist.calibration.metrics.selective import TieGroups, tie_groups
from flatcal_dist.calibration.pages.display import Unit
from flatcal_dist.calibration.softmax import Scores
from flatcal_dist.calibration.statistics.resampled import Statistic


@dataclass(frozen=True)
class Evaluated:
    """All images with one set of scores. A metric is a function of it.

    Args:
        scores: The scores of the images.
        bins: The number of bins of ECE and related metrics.
        classwise: The metrics of all probabilities, by key. They are summed up while the logits are
            there; the mapping is empty otherwise.
    """

    scores: Scores
    bins: int = 15
    classwise: Mapping[str, float | None] = field(default_factory=dict)

    @cached_property
    def confidence(self) -> FloatArray:
        """The confidence of each image [N]."""
        return self.scores.confidence

    @property
    def correct(self) -> BoolArray:
        """Which images are right [N]."""
        return self.scores.correct

    @cached_property
    def groups(self) -> TieGroups:
        """The images grouped by equal confidence."""
        return tie_groups(self.scores.log_confidence, self.scores.correct)

    @cached_property
    def corp(self) -> CorpDecomposition:
        """The CORP decomposition of the confidence."""
        return corp_decomposition(self.confidence, self.correct)


@dataclass(frozen=True)
class Sums:
    """Sums that validation adds up over batches and ranks, so that it gathers no images.

    Args:
        images: The number of images.
        correct: The number of correct images.
        nll: The sum of the negative log-likelihood.
        brier: The sum of the Brier score.
        entropy: The sum of the entropy.
        entropy_correct: The sum of the entropy of correct images.
        gaps: The sum of confidence minus correctness in each bin of ECE.
        groups: The images by cells of confidence. Images of one cell count as ties.
    """

    images: float
    correct: float
    nll: float
    brier: float
    entropy: float
    entropy_correct: float
    gaps: FloatArray
    groups: TieGroups


@dataclass(frozen=True)
class Metric:
    """One metric: how it is computed, named and read.

    Args:
        key: The name in metrics.json, in every table and, with a prefix, in W&B.
        name: The name for readers.
        unit: How values are printed.
        better: Which values are better. None: neither high nor low ones.
        meaning: What the metric tells, for the table of the page.
        value: Computes the value on all images. None where it is undefined.
        statistic: Computes the value on resamples and the interval. None: there is no interval.
        source: The paper that defines the metric.
        running: Computes the value from sums, in validation during training. None: validation
            does not compute it.
        limits: The least and the largest possible value. None: there is no limit.
        may_lack: Whether the metric can be undefined.
        compared: Whether comparisons of runs test it.
        listed: Whether the page and its tables show it. If not, only metrics.json and metrics.csv
            hold it.
    """

    key: str
    name: str
    unit: Unit
    better: Literal["higher", "lower", "zero"] | None
    meaning: str
    value: Callable[[Evaluated], float | None]
    statistic: Statistic | None = None
    source: str = ""
    running: Callable[[Sums], float | None] | None = None
    limits: tuple[float | None, float | None] = (0.0, 1.0)
    may_lack: bool = False
    compared: bool = False
    listed: bool = True

    @property
    def arrow(self) -> str:
        """An arrow that shows which values are better."""
        return {"higher": "↑", "lower": "↓", "zero": "→\u00a00", None: ""}[self.better]

    @property
    def direction(self) -> str:
        """The arrow in words."""
        words = {"zero": "closer to zero is better", None: ""}
        return words.get(self.better, f"{self.better} is better")

    def judge(self, difference: float) -> str:
        """Return `better` or `worse`, or `higher` or `lower` for a metric without a direction."""
        direction = "higher" if difference > 0 else "lower"
        if self.better not in ("higher", "lower"):
            return direction
        return "better" if direction == self.better else "worse"


@dataclass(frozen=True)
class Group:
    """Metrics that stand together in tables."""

    name: str
    metrics: tuple[Metric, ...]

    @property
    def listed(self) -> tuple[Metric, ...]:
        """The metrics that the page shows."""
        return tuple(metric for metric in self.metrics if metric.listed)
