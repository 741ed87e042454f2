"""How values are printed: units, minus signs, intervals, lists of names."""

from collections.abc import Sequence
from dataclasses import dataclass

from flatcal_dist.calibration.statistics.intervals import Interval

UNDEFINED = "not defined"
MINUS = "−"
MOST_DECIMALS = 6  # the most decimals that a value has to show its sign
MOST_IN_PROSE = 3  # the most decimals in sentences


@dataclass(frozen=True)
class Unit:
    """How a value is printed: times `factor`, to `decimals`, then `suffix`.

    Args:
        factor: What values are multiplied by.
        decimals: The number of decimals.
        suffix: What follows a value.
        difference_decimals: The number of decimals of a difference. Default: `decimals`.
        difference_suffix: What follows a difference. Default: `suffix`.
        signed: Whether a plus stands before a positive value.
    """

    factor: float
    decimals: int
    suffix: str = ""
    difference_decimals: int | None = None
    difference_suffix: str | None = None
    signed: bool = False


PERCENT = Unit(100, 2, " %", difference_suffix=" points")
POINTS = Unit(100, 2, " points", signed=True)
GAP = Unit(100, 2, signed=True)  # points, in a column whose head says so
THOUSANDTHS = Unit(1000, 1)
PLAIN = Unit(1, 3, difference_decimals=4)


def number(value: float | None, decimals: int = 3, sign: bool = False) -> str:
    """Return a number with a typographic minus sign, and without a sign if it reads as zero.

    Args:
        value: The number. None reads as undefined.
        decimals: The number of decimals.
        sign: Whether a plus stands before a positive number.
    """
    if value is None:
        return UNDEFINED
    text = f"{abs(value):,.{decimals}f}"
    if float(text.replace(",", "")) == 0:
        return text
    return (MINUS if value < 0 else "+" if sign else "") + text


def percent(value: float | None, decimals: int = 2) -> str:
    """Return a fraction in per cent: `84.25 %`. Less than 1 never reads as `100 %`."""
    if value is None:
        return UNDEFINED
    while value < 1 and decimals < 6 and round(100 * value, decimals) == 100:
        decimals += 1
    return f"{number(100 * value, decimals)} %"


def temperature(value: float) -> str:
    """Return a temperature to two decimals, or to three digits below 0.1."""
    return number(value, 2) if value >= 0.1 else f"{value:.3g}"


def show(value: float | None, unit: Unit, *, suffix: bool = True) -> str:
    """Return a value in its unit.

    Args:
        value: The value. None reads as undefined.
        unit: The unit.
        suffix: Whether the suffix of the unit follows.
    """
    if value is None:
        return UNDEFINED
    text = number(unit.factor * value, unit.decimals, unit.signed)
    return text + unit.suffix if suffix else text


def between(low: float | None, high: float | None, unit: Unit) -> str | None:
    """Return an interval without its unit: `83.1 to 85.2`.

    Args:
        low: The lower end.
        high: The upper end.
        unit: The unit of both ends.

    Returns:
        The text. None if an end is undefined.
    """
    if low is None or high is None:
        return None
    return " to ".join(show(v, unit, suffix=False) for v in (low, high))


def show_interval(interval: Interval, unit: Unit) -> str | None:
    """Return an interval without its unit. None if there is no interval."""
    return between(interval.low, interval.high, unit)


def show_difference(
    value: float | None,
    low: float | None,
    high: float | None,
    unit: Unit,
    *,
    suffix: bool = True,
    sign: bool = True,
) -> tuple[str, str | None]:
    """Return a difference, and its interval without the unit.

    A difference between percentages is in points. All numbers have as many decimals as it takes to
    show the sign of each, up to `MOST_DECIMALS`.

    Args:
        value: The difference.
        low: The lower end of its interval.
        high: The upper end of its interval.
        unit: The unit of the values that are compared.
        suffix: Whether the suffix of the unit follows the difference.
        sign: Whether a plus stands before a positive number.

    Returns:
        The difference, and its interval, which is None if an end is undefined.
    """
    if value is None:
        return UNDEFINED, None
    ends = [] if low is None or high is None else [low, high]
    scaled = [unit.factor * v for v in (value, *ends)]
    least = unit.decimals if unit.difference_decimals is None else unit.difference_decimals
    text, *limits = (number(v, telling_decimals(least, scaled), sign) for v in scaled)
    ending = unit.suffix if unit.difference_suffix is None else unit.difference_suffix
    return text + ending * suffix, " to ".join(limits) if limits else None


def telling_decimals(least: int, values: Sequence[float], most: int = MOST_DECIMALS) -> int:
    """Return the number of decimals with which no value but 0 reads as 0.

    Args:
        least: The least number of decimals.
        values: The values.
        most: The largest number of decimals. A value that reads as 0 with them is ignored.
    """
    visible = [abs(v) for v in values if round(abs(v), most) > 0]
    decimals, smallest = least, min(visible, default=1.0)
    while round(smallest, decimals) == 0:
        decimals += 1
    return decimals


def points(value: float, *others: float | None) -> tuple[str, ...]:
    """Return percentage points to one decimal, or up to three to show the sign of each number."""
    scaled = [100 * v for v in (value, *others) if v is not None]
    decimals = telling_decimals(1, scaled, MOST_IN_PROSE)
    return tuple(number(v, decimals) for v in scaled)


def counted(count: int, noun: str) -> str:
    """Return a number with its noun: `1 image`, `2,004 images`."""
    return f"{count:,} {noun}{'s' * (count != 1)}"


def enumerate_names(names: Sequence[str]) -> str:
    """Return a list as text: `a`, `a and b`, `a, b and c`."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def duration(seconds: float | None) -> str:
    """Return a duration as text: `2 h 05 min`, `12 min`, `48 s`."""
    if seconds is None:
        return ""
    if seconds < 120:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min"
