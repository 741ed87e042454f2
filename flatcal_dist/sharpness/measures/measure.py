"""All measures of sharpness of one network: curvature, ascents, and the loss along directions."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from flatcal_dist.sharpness.measures.loss import MeanLoss, MeasureError
from flatcal_dist.sharpness.measures.spectrum import (
    Eigenvalue,
    Estimate,
    dot,
    largest_eigenvalue,
    random_normal,
    trace,
)
from flatcal_dist.sharpness.rules.asam import ASAM
from flatcal_dist.sharpness.rules.base import Context, Rule, Shards
from flatcal_dist.sharpness.rules.sam import SAM

MULTIPLES = (-4.0, -2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0, 4.0)  # of rho: where curves are measured


@dataclass(frozen=True)
class Options:
    """What is measured.

    Args:
        images: The largest number of images. They are a random choice, the same each time.
        rho: The length of the ascent of SAM.
        adaptive_rho: The length of the ascent of ASAM, in its own norm.
        m: The number of images of a group for m-sharpness.
        directions: The number of random directions.
        samples: The number of random vectors for the trace.
        tolerance: The residual of the eigenvalue that is accepted, relative to the eigenvalue.
        seed: The seed of the choice of images and of all random vectors.
    """

    images: int = 1024
    rho: float = 0.05
    adaptive_rho: float = 0.5
    m: int = 128
    directions: int = 5
    samples: int = 32
    tolerance: float = 1e-3
    seed: int = 0


@dataclass(frozen=True)
class Rise:
    """By how much the loss rises in an ascent to first order.

    Attributes:
        rule: The rule that makes the perturbation: sam or asam.
        rho: Its length.
        images: The number of images that share a perturbation.
        groups: The number of groups of so many images.
        rise: The mean rise over the groups.
    """

    rule: str
    rho: float
    images: int
    groups: int
    rise: Estimate


@dataclass(frozen=True)
class Sharpness:
    """The sharpness of the mean cross-entropy at the weights of a network.

    Attributes:
        images: The number of images.
        weights: The number of weights.
        loss: The mean loss.
        gradient_norm: The length of its gradient.
        eigenvalue: The largest eigenvalue of its Hessian.
        trace: The trace of its Hessian.
        rises: The rises in ascents: of all images together, and of groups of m.
        distances: Distances from the weights; negative ones are on the other side.
        along_ascent: The loss at these distances along the gradient.
        along_random: The loss at these distances along each random direction.
    """

    images: int
    weights: int
    loss: float
    gradient_norm: float
    eigenvalue: Eigenvalue
    trace: Estimate
    rises: list[Rise]
    distances: list[float]
    along_ascent: list[float]
    along_random: list[list[float]]


def measure(loss: MeanLoss, options: Options) -> Sharpness:
    """Measure sharpness. All ranks call this function and get the same values.

    The random directions have the same length as the steps along the gradient (in the Euclidean
    norm of all weights), so both lines of a plot can be compared.

    Args:
        loss: The mean loss. Its groups are those of m-sharpness.
        options: What is measured.

    Raises:
        MeasureError: The network cannot be differentiated twice, or a value is not finite.
    """
    here, gradient = loss.value(), loss.gradient()
    norm, seed = math.sqrt(dot(gradient, gradient)), options.seed
    sam, asam = SAM(options.rho), ASAM(options.adaptive_rho)
    rises = [_of_all(loss, rule, gradient, here) for rule in (sam, asam)]
    rises += _of_groups(loss, [sam, asam])
    distances = [options.rho * multiple for multiple in MULTIPLES]
    generator = torch.Generator().manual_seed(seed)
    directions = [random_normal(gradient, generator) for _ in range(options.directions)]
    return Sharpness(
        images=loss.images,
        weights=loss.size,
        loss=here,
        gradient_norm=norm,
        eigenvalue=largest_eigenvalue(
            loss.hessian_times, gradient, seed=seed, tolerance=options.tolerance
        ),
        trace=trace(loss.hessian_times, gradient, seed=seed, samples=options.samples),
        rises=sorted(rises, key=lambda one: one.rule != "sam"),
        distances=distances,
        along_ascent=_along(loss, gradient, distances, here),
        along_random=[_along(loss, one, distances, here) for one in directions],
    )


def perturbation(loss: MeanLoss, rule: Rule, gradient: Tensor) -> Tensor:
    """Return the perturbation that a rule of training makes of a gradient. It is zero for zero."""
    if not bool(gradient.any()):
        return loss.zeros()
    parts = [part.float().clone() for part in loss.parts(gradient)]
    shards = Shards(loss.names, [weight.float() for weight in loss.weights], parts)
    rule.perturb_(shards, Context(rule.rho, None, lambda part: part))
    return loss.flat(shards.gradients)


def _of_all(loss: MeanLoss, rule: Rule, gradient: Tensor, here: float) -> Rise:
    """Return the rise if all images share one perturbation (n-sharpness)."""
    rise = loss.value(perturbation(loss, rule, gradient)) - here
    return Rise(rule.name, rule.rho, loss.images, 1, Estimate(rise, None, 1))


def _of_groups(loss: MeanLoss, rules: list[Rule]) -> list[Rise]:
    """Return the mean rise over groups, each with its own perturbation and its own loss.

    Source: m-sharpness (Foret et al., ICLR 2021, section 4.1).
    """
    sums = [0.0] * len(rules)
    squares = [0.0] * len(rules)
    for group in loss.groups:
        gradient, here = loss.gradient_of_group(group), loss.of_group(group)
        for i, rule in enumerate(rules):
            rise = loss.of_group(group, perturbation(loss, rule, gradient)) - here
            sums[i] += rise
            squares[i] += rise**2
    found = loss.summed([*sums, *squares])
    n, count = loss.group_count, len(rules)
    rises = []
    for rule, total, square in zip(rules, found[:count], found[count:], strict=True):
        if not math.isfinite(total):
            raise MeasureError(
                f"the loss {rule.rho:g} from the weights ({rule.name}) is not finite for a group "
                "of images: choose a smaller rho"
            )
        spread = max(0.0, square - total**2 / n) / (n - 1) if n > 1 else None
        error = None if spread is None else math.sqrt(spread / n)
        mean = Estimate(total / n, error, n)
        rises.append(Rise(rule.name, rule.rho, round(loss.images / n), n, mean))
    return rises


def _along(loss: MeanLoss, direction: Tensor, distances: list[float], here: float) -> list[float]:
    """Return the loss at distances along a direction. Without a direction the loss is constant."""
    length = math.sqrt(dot(direction, direction))
    if length == 0:
        return [here] * len(distances)
    unit = direction / length
    return [loss.value(t * unit) if t else here for t in distances]
