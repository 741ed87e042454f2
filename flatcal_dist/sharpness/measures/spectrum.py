"""The largest eigenvalue and the trace of a symmetric matrix, from its products with vectors."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from scipy.linalg import eigh_tridiagonal
from torch import Tensor

Times = Callable[[Tensor], Tensor]  # the product of the matrix with a vector


@dataclass(frozen=True)
class Eigenvalue:
    """The largest eigenvalue, in the order of numbers: not the largest in size.

    Attributes:
        value: The eigenvalue, as v'Hv of a unit vector v.
        residual: The length of Hv - value * v. An eigenvalue lies within this distance of `value`.
        products: The number of products with the matrix.
        converged: Whether the residual is within the tolerance.
    """

    value: float
    residual: float
    products: int
    converged: bool


@dataclass(frozen=True)
class Estimate:
    """A mean over random samples, with its standard error. One sample has no standard error."""

    value: float
    standard_error: float | None
    samples: int


def largest_eigenvalue(
    times: Times, like: Tensor, *, seed: int = 0, tolerance: float = 1e-3, most: int = 50
) -> Eigenvalue:
    """Return the largest eigenvalue by the Lanczos iteration (Golub and Van Loan, section 10.3).

    All vectors are kept and made orthogonal twice, so no eigenvalue comes twice. This takes the
    memory of up to `most` copies of the weights. A last product measures the residual.

    Args:
        times: The product with the matrix. All ranks get the same product.
        like: A vector of the right size, type and device.
        seed: The seed of the first vector.
        tolerance: The residual that is accepted, relative to the eigenvalue.
        most: The largest number of iterations.
    """
    basis = [_unit(random_normal(like, torch.Generator().manual_seed(seed)))]
    diagonal: list[float] = []
    beside: list[float] = []
    steps = min(most, like.numel())
    while True:
        product = times(basis[-1])
        inner = dot(basis[-1], product)
        for _ in range(2):
            for vector in basis:
                product = product - dot(vector, product) * vector
        inner, length = _of_rank_0([inner, math.sqrt(dot(product, product))], like.device)
        diagonal.append(inner)
        values, vectors = eigh_tridiagonal(np.array(diagonal), np.array(beside))
        top, coordinates = float(values[-1]), vectors[:, -1]
        scale = max(abs(top), float(np.abs(values).max()) * torch.finfo(like.dtype).eps * 10)
        expected = length * abs(float(coordinates[-1]))
        if expected <= 0.5 * tolerance * scale or len(diagonal) == steps:
            break
        beside.append(length)
        basis.append(product / length)
    ritz = _unit(sum((c * v for c, v in zip(coordinates.tolist(), basis, strict=True)), like * 0))
    product = times(ritz)
    value = dot(ritz, product)
    rest = product - value * ritz
    value, residual = _of_rank_0([value, math.sqrt(dot(rest, rest))], like.device)
    return Eigenvalue(value, residual, len(diagonal) + 1, residual <= tolerance * abs(value))


def trace(times: Times, like: Tensor, *, seed: int = 0, samples: int = 32) -> Estimate:
    """Return the trace, as the mean of v'Hv over random vectors v of signs (Hutchinson, 1990).

    Args:
        times: The product with the matrix.
        like: A vector of the right size, type and device.
        seed: The seed of the vectors.
        samples: The number of vectors.
    """
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(samples):
        signs = torch.randint(0, 2, (like.numel(),), generator=generator) * 2 - 1
        vector = signs.to(like)
        found.append(dot(vector, times(vector)))
    return mean_of(found)


def mean_of(values: list[float]) -> Estimate:
    """Return the mean of independent values with its standard error."""
    n = len(values)
    error = float(np.std(values, ddof=1)) / math.sqrt(n) if n > 1 else None
    return Estimate(math.fsum(values) / n, error, n)


def random_normal(like: Tensor, generator: torch.Generator) -> Tensor:
    """Return a vector of normal numbers. It is the same on each device and rank."""
    return torch.randn(like.numel(), generator=generator).to(like)


def dot(a: Tensor, b: Tensor) -> float:
    """Return the inner product of two vectors, summed in double precision."""
    return float(torch.dot(a.double(), b.double()))


def _unit(vector: Tensor) -> Tensor:
    return vector / math.sqrt(dot(vector, vector))


def _of_rank_0(values: list[float], device: torch.device) -> list[float]:
    """Return the numbers of rank 0, so that all ranks decide alike."""
    if not (dist.is_initialized() and dist.get_world_size() > 1):
        return values
    shared = torch.tensor(values, dtype=torch.float64, device=device)
    dist.broadcast(shared, 0)
    return shared.tolist()
