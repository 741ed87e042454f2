"""The part of `metrics.json` that holds the sharpness of the loss at the weights of a network."""

from typing import Literal

from pydantic import Field

from flatcal_dist.calibration.report.parts import Count, Part, Positive


class Estimate(Part):
    """A mean with its standard error, which is null for a single sample."""

    value: float
    standard_error: Positive | None
    samples: Count


class Eigenvalue(Part):
    """The largest eigenvalue of the Hessian. An eigenvalue lies within `residual` of `value`."""

    value: float
    residual: Positive
    products: Count
    converged: bool


class Rise(Part):
    """By how much the loss rises in an ascent to first order, see `sharpness.measures`."""

    rule: Literal["sam", "asam"]
    rho: Positive
    images: Count = Field(description="how many images share a perturbation")
    groups: Count
    rise: Estimate


class Sharpness(Part):
    """The sharpness of the mean cross-entropy, in evaluation mode and without weight decay."""

    images: Count
    weights: Count
    loss: Positive
    gradient_norm: Positive
    eigenvalue: Eigenvalue
    trace: Estimate
    rises: list[Rise]
    distances: list[float] = Field(description="Euclidean distances from the weights")
    along_ascent: list[float] = Field(description="loss at the distances along the gradient")
    along_random: list[list[float]] = Field(
        description="loss at the distances along each random direction"
    )
