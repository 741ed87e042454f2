"""Refusals of values that an objective cannot be built with."""

import math


def refuse_outside(
    name: str, value: float, *, above: float = -math.inf, least: float = -math.inf
) -> None:
    """Check that a number is finite, greater than `above`, and not smaller than `least`.

    Args:
        name: What the number is called.
        value: The number.
        above: A bound that the number must exceed.
        least: A bound that the number may equal.

    Raises:
        ValueError: The number is outside of its range.
    """
    if math.isfinite(value) and value > above and value >= least:
        return
    bound = f"greater than {above:g}" if math.isfinite(above) else f"at least {least:g}"
    raise ValueError(f"{name} must be a finite number {bound}, got {value}")
