"""What images under shift allow to say, in plain language."""

from typing import Any

from flatcal_dist.calibration.calibrators.of_logits import is_fitted
from flatcal_dist.calibration.pages.display import number, percent, points
from flatcal_dist.calibration.report.model import Report
from flatcal_dist.calibration.statistics.intervals import beyond_zero


def at_worst(m: Report, shift: dict[str, Any] | None) -> str | None:
    """Return what happens at the highest severity, or else on the set with the largest gap.

    The result is None if no images under shift were evaluated.
    """
    if shift is None:
        return None
    if shift["corruptions"]:
        group = shift["corruptions"][0]
        worst = str(group["severities"][-1])
        before, after = (group[side]["by_severity"][worst] for side in ("before", "after"))
        effect = group["effect"]["by_severity"][worst]
        where = f"On {group['name']} at severity {worst}"
    elif shift["sets"]:
        row = max(shift["sets"], key=lambda r: abs(r["before"]["signed_gap"]))
        before, after, effect = row["before"], row["after"], row["effect"]
        where = f"On {row['name']}"
    else:
        return None
    accuracy = percent(before["accuracy"], 1) + _limits(before, "accuracy")
    text = (
        f"{where}, accuracy is {accuracy} against {percent(m.accuracy, 1)} on the clean images. "
        f"As trained, {_beside(before)}; on the clean images it is {_points(m.signed_gap)}."
    )
    if not is_fitted(shift["clean"]["temperature"]):
        return f"{text} The clean images give no temperature that could be used here."
    return (
        f"{text} With the temperature of the clean images {_beside(after)}"
        f"{_turned(before, after)}; {_moved(effect)}"
    )


def _limits(side: dict[str, Any], name: str) -> str:
    interval = side["intervals"][name]
    if interval["low"] is None:
        return ""
    return f" ({percent(interval['low'], 1)} to {percent(interval['high'], 1)})"


def _points(gap: float) -> str:
    return f"{points(abs(gap))[0]} points {'above' if gap > 0 else 'below'} it"


def _beside(side: dict[str, Any]) -> str:
    """How far mean confidence lies above or below accuracy, with an interval."""
    gap, interval = side["signed_gap"], side["intervals"]["signed_gap"]
    text = f"mean confidence is {points(abs(gap))[0]} points {'above' if gap > 0 else 'below'}"
    if interval["low"] is None:
        return f"{text} accuracy"
    ends = (number(100 * v, 1, sign=True) for v in (interval["low"], interval["high"]))
    return f"{text} accuracy ({' to '.join(ends)})"


def sign_of_gap(side: dict[str, Any]) -> int:
    """Return 1 if over-confidence is shown, -1 if under-confidence is shown, else 0."""
    interval = side["intervals"]["signed_gap"]
    if interval["low"] is None:
        return 0
    return int(interval["low"] > 0) - int(interval["high"] < 0)


def _turned(before: dict[str, Any], after: dict[str, Any]) -> str:
    """A change of the gap's sign, which a distance does not show."""
    first, second = sign_of_gap(before), sign_of_gap(after)
    if first * second == -1:
        kinds = ("over-confidence", "under-confidence")
        was, now = kinds if first > 0 else kinds[::-1]
        warning = ", which is the dangerous side" if second > 0 else ""
        return f": {was} has become {now}{warning}"
    if before["signed_gap"] * after["signed_gap"] < 0:
        return ": the gap has changed its sign"
    return ""


def _moved(effect: dict[str, Any]) -> str:
    """Whether the clean temperature is shown to bring mean confidence nearer to accuracy."""
    d = effect["distance"]
    if beyond_zero(d["low"], d["high"]):
        word = "nearer to accuracy" if d["value"] < 0 else "further away from accuracy"
        size, *ends = points(*(abs(d[k]) for k in ("value", "low", "high")))
        ends = sorted(ends, key=lambda text: float(text.replace(",", "")))
        return f"this is {word}, by {size} points ({ends[0]} to {ends[1]})."
    return "it is shown to be neither nearer to accuracy nor further away."


def corruptions(m: Report, shift: dict[str, Any] | None) -> str | None:
    """Return which corruptions are worst over all severities. None if there are fewer than two."""
    if shift is None or not shift["corruptions"]:
        return None
    group = shift["corruptions"][0]
    before, after = (group[side]["by_corruption"] for side in ("before", "after"))
    if len(before) < 2:
        return None
    worst = min(before, key=lambda c: before[c]["accuracy"])
    text = (
        f"Of {len(before)} corruptions of {group['name']}, {_name(worst)} leaves the least "
        f"accuracy, {percent(before[worst]['accuracy'], 1)}{_limits(before[worst], 'accuracy')}, "
        "over its severities."
    )
    sure = max(before, key=lambda c: before[c]["signed_gap"])
    if sign_of_gap(before[sure]) > 0:
        text += f" Over-confidence is largest under {_name(sure)}: {_beside(before[sure])}."
    if not is_fitted(shift["clean"]["temperature"]):
        return text
    effect = {c: e["ece"] for c, e in group["effect"]["by_corruption"].items()}
    raised = [c for c, d in effect.items() if d["low"] is not None and d["low"] > 0]
    if raised:
        most = max(raised, key=lambda c: effect[c]["value"])
        ends = points(before[most]["ece"], after[most]["ece"])
        text += (
            f" The clean temperature raises ECE under {len(raised)} of them, most under "
            f"{_name(most)}, from {ends[0]} % to {ends[1]} %."
        )
    return text


def _name(corruption: str) -> str:
    return corruption.replace("_", " ")
