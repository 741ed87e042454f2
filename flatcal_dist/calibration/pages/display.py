"""How values are printed: units, true minus signs, intervals, lists of names."""

from collections.abc import Sequence
from dataclasses import dataclass

from flatcal_dist.calibration.statistics.intervals import Interval

UNDEFINED = "not defined"
MINUS = "−"
MOST_DECIMALS = 6  # that a value gets in order to show its sign
MOST_IN_PROSE = 3


@dataclass(frozen=True)
class Unit:
    """A value is printed times `factor`, to `decimals`, then `suffix`; likewise a difference."""

    factor: float
    decimals: int
    suffix: str = ""
    difference_decimals: int | None = None
    difference_suffix: str | None = None
    signed: bool = False


PERCENT = Unit(100, 2, " %", difference_suffix=" points")
POINTS = Unit(100, 2, " points", signed=True)
GAP = Unit(100, 2, signed=True)  # points, where a column's head says so
THOUSANDTHS = Unit(1000, 1)
PLAIN = Unit(1, 3, difference_decimals=4)


def number(value: float | None, decimals: int = 3, sign: bool = False) -> str:
    """A number with a true minus sign and no minus zero."""
    if value is None:
        return UNDEFINED
    text = f"{abs(value):,.{decimals}f}"
    if float(text.replace(",", "")) == 0:
        return text
    return (MINUS if value < 0 else "+" if sign else "") + text


def percent(value: float | None, decimals: int = 2) -> str:
    """A fraction as per cent, `84.25 %`; more decimals where these would make a whole of less."""
    if value is None:
        return UNDEFINED
    while value < 1 and decimals < 6 and round(100 * value, decimals) == 100:
        decimals += 1
    return f"{number(100 * value, decimals)} %"


def temperature(value: float) -> str:
    """A temperature to two decimals, to three digits below a tenth: never `0.00`."""
    return number(value, 2) if value >= 0.1 else f"{value:.3g}"


def show(value: float | None, unit: Unit, *, suffix: bool = True) -> str:
    """A value in its unit."""
    if value is None:
        return UNDEFINED
    text = number(unit.factor * value, unit.decimals, unit.signed)
    return text + unit.suffix if suffix else text


def between(low: float | None, high: float | None, unit: Unit) -> str | None:
    """`83.1 to 85.2`, without the unit; None when undefined."""
    if low is None or high is None:
        return None
    return " to ".join(show(v, unit, suffix=False) for v in (low, high))


def show_interval(interval: Interval, unit: Unit) -> str | None:
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
    """A difference, and its interval without the unit (None when undefined).

    Between percentages a difference is in points. Both have as many decimals as it takes to show
    the sign of each number, up to `MOST_DECIMALS`. sign: write a plus before what is positive.
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
    """The decimals, `least` or more, with which none of the values that are not 0 reads as 0.

    What would read as 0 with `most` of them, too, is left to do so.
    """
    visible = [abs(v) for v in values if round(abs(v), most) > 0]
    decimals, smallest = least, min(visible, default=1.0)
    while round(smallest, decimals) == 0:
        decimals += 1
    return decimals


def points(value: float, *others: float | None) -> tuple[str, ...]:
    """Percentage points to one decimal, or up to three where one would hide the sign of any."""
    scaled = [100 * v for v in (value, *others) if v is not None]
    decimals = telling_decimals(1, scaled, MOST_IN_PROSE)
    return tuple(number(v, decimals) for v in scaled)


def counted(count: int, noun: str) -> str:
    """`1 image`, `2,004 images`."""
    return f"{count:,} {noun}{'s' * (count != 1)}"


def enumerate_names(names: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def duration(seconds: float | None) -> str:
    """`2 h 05 min`, `12 min`, `48 s`."""
    if seconds is None:
        return ""
    if seconds < 120:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min"
