"""How values are printed: units, true minus signs, intervals, lists of names."""

from collections.abc import Sequence
from dataclasses import dataclass

from .statistics import Interval

UNDEFINED = "not defined"
MINUS = "−"


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


def show(value: float | None, unit: Unit, *, difference: bool = False, suffix: bool = True) -> str:
    """A value in its unit; a difference has a sign and, between percentages, is in points."""
    if value is None:
        return UNDEFINED
    decimals, ending = unit.decimals, unit.suffix
    if difference and unit.difference_decimals is not None:
        decimals = unit.difference_decimals
    if difference and unit.difference_suffix is not None:
        ending = unit.difference_suffix
    text = number(unit.factor * value, decimals, difference or unit.signed)
    return text + ending if suffix else text


def between(
    low: float | None, high: float | None, unit: Unit, *, difference: bool = False
) -> str | None:
    """`83.1 to 85.2`, without the unit; None when undefined."""
    if low is None or high is None:
        return None
    ends = (show(v, unit, difference=difference, suffix=False) for v in (low, high))
    return " to ".join(ends)


def show_interval(interval: Interval, unit: Unit, *, difference: bool = False) -> str | None:
    return between(interval.low, interval.high, unit, difference=difference)


def points(value: float, *others: float | None) -> tuple[str, ...]:
    """Percentage points to one decimal, two where one would hide the sign of any of them."""
    values = [value, *(o for o in others if o is not None)]
    decimals = 2 if min(abs(v) for v in values) < 0.001 else 1
    return tuple(number(100 * v, decimals) for v in values)


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
