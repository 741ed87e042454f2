"""What one entry says of a metric; `entries` lists them, and all else follows from that list."""

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
    """All images with one set of scores: what a metric is a function of.

    bins: of ECE and its relatives. classwise: by key the metrics of all probabilities, which are
    summed up while the logits are there; empty where they were not.
    """

    scores: Scores
    bins: int = 15
    classwise: Mapping[str, float | None] = field(default_factory=dict)

    @cached_property
    def confidence(self) -> FloatArray:
        return self.scores.confidence

    @property
    def correct(self) -> BoolArray:
        return self.scores.correct

    @cached_property
    def groups(self) -> TieGroups:
        return tie_groups(self.scores.log_confidence, self.scores.correct)

    @cached_property
    def corp(self) -> CorpDecomposition:
        return corp_decomposition(self.confidence, self.correct)


@dataclass(frozen=True)
class Sums:
    """What validation adds up over batches and ranks, instead of gathering images.

    images and correct: how many; nll, brier, entropy, and entropy_correct (of correct images):
    sums over images. gaps: sums of confidence minus correctness in the bins of ECE. groups: images
    by cells of confidence, which count as ties.
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
    """One metric: its value and interval, what it is called, and how it is to be read.

    Args:
        key: its name in metrics.json, in every table and, with a prefix, in W&B.
        name: its name for readers.
        unit: how its values are printed.
        better: which values are better; None where neither are.
        meaning: what it tells, for the table of the page.
        value: its value on all images, None where undefined.
        statistic: its value on resamples, and its interval; None: it has no interval.
        source: the paper that defines it.
        running: its value from sums, while training validates; None: it is not followed there.
        limits: the least and largest value that it can have; None: no limit.
        may_lack: whether it can be undefined.
        compared: whether comparisons of runs test it.
        listed: whether the page and its tables show it, or metrics.json and metrics.csv alone.
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
        return {"higher": "↑", "lower": "↓", "zero": "→\u00a00", None: ""}[self.better]

    @property
    def direction(self) -> str:
        """The arrow in words."""
        words = {"zero": "closer to zero is better", None: ""}
        return words.get(self.better, f"{self.better} is better")

    def judge(self, difference: float) -> str:
        """`better` or `worse`; `higher` or `lower` of what is neither."""
        direction = "higher" if difference > 0 else "lower"
        if self.better not in ("higher", "lower"):
            return direction
        return "better" if direction == self.better else "worse"


@dataclass(frozen=True)
class Group:
    """Metrics that stand together in tables, in their order."""

    name: str
    metrics: tuple[Metric, ...]

    @property
    def listed(self) -> tuple[Metric, ...]:
        return tuple(metric for metric in self.metrics if metric.listed)
