"""The verdict of a report in plain language; every sentence follows from numbers and intervals."""

from dataclasses import dataclass
from typing import Any

from flatcal_dist.calibration.calibrators.of_logits import BOUNDS, is_fitted
from flatcal_dist.calibration.pages.display import (
    MOST_IN_PROSE,
    counted,
    number,
    percent,
    points,
    temperature,
)
from flatcal_dist.calibration.report.model import Report, Side
from flatcal_dist.calibration.shift import verdict as shift_verdict
from flatcal_dist.calibration.statistics.intervals import Interval

FEW_IMAGES = 50
FEW_OF_A_KIND = 10
FEW_OF_A_CLASS = 20  # images, below which single classes are not spoken of
SHOWN = 0.05  # p-value below which miscalibration counts as shown


@dataclass(frozen=True)
class Finding:
    """A topic, and what the numbers allow to say of it."""

    topic: str
    text: str


def verdict(m: Report, shift: dict[str, Any] | None = None) -> list[Finding]:
    """Findings of the metrics.json of one run (and its shift.json), the most important first."""
    wrong = round(m.images * (1 - m.accuracy))
    if m.images < FEW_IMAGES:
        verb = "is" if m.images == 1 else "are"
        text = (
            f"{counted(m.images, 'image')} {verb} too few for a verdict; the numbers below are "
            f"those of {'this image' if m.images == 1 else 'these images'} and say little of "
            "others."
        )
        return [Finding("Too few images", text)]
    findings = [
        Finding("Confidence", f"{_gap(m)} {_ece(m)}"),
        Finding("Temperature", " ".join(_temperature(m))),
        Finding("Failures", _failure(m)),
    ]
    fewest = min(wrong, m.images - wrong)
    if 0 < fewest < FEW_OF_A_KIND:
        kind = "wrong" if wrong == fewest else "correct"
        text = (
            f"Only {fewest} {'prediction is' if fewest == 1 else 'predictions are'} {kind}: read "
            "all that tells wrong from correct with caution."
        )
        findings.append(Finding("Caution", text))
    others = (
        ("Classes", _classes(m)),
        ("Labels", _labels(m)),
        ("Shift", shift_verdict.at_worst(m, shift)),
        ("Corruptions", shift_verdict.corruptions(m, shift)),
    )
    return findings + [Finding(topic, text) for topic, text in others if text]


def _limits(interval: Interval) -> str:
    _, low, high = points(interval.value, interval.low, interval.high)
    return f"95 % interval {low} to {high}"


def _gap(m: Report) -> str:
    gap = m.interval("signed_gap")
    if gap.low is None:
        return f"Mean confidence minus accuracy is {points(gap.value)[0]} points."
    if not gap.excludes_zero or round(100 * gap.value, MOST_IN_PROSE) == 0:
        return (
            "Neither over- nor under-confidence is shown overall: mean confidence minus accuracy "
            f"is {points(gap.value, gap.low, gap.high)[0]} points ({_limits(gap)})."
        )
    word, size = ("over", 1) if gap.value > 0 else ("under", -1)
    ends = sorted((size * gap.low, size * gap.high))
    value, low, high = points(size * gap.value, *ends)
    return (
        f"The network is {word}-confident by {value} points (95 % interval {low} to {high}): "
        f"its mean confidence is {percent(m.mean_confidence, 1)}, "
        f"its accuracy {percent(m.accuracy, 1)}."
    )


def _ece(m: Report) -> str:
    null = m.ece_null
    ece, mean, most = (f"{v} %" for v in points(m.ece, null.mean, null.quantile_95))
    seen = f"ECE is {ece}; a perfectly calibrated network would show {mean} on this many images"
    if null.p_value < SHOWN:
        return f"{seen}, and seldom more than {most}, so it is miscalibrated."
    return f"{seen}, often up to {most}, so these images do not show it to be miscalibrated."


def _temperature(m: Report) -> list[str]:
    after, t = m.after_temperature, temperature(m.temperature)
    if not is_fitted(m.temperature):
        return [_no_temperature(m)]
    nll, ece = (after.difference[name] for name in ("nll", "ece"))
    if nll.excludes_zero:
        low, high = sorted((abs(nll.low), abs(nll.high)))
        verb = "lowers" if nll.value < 0 else "raises"
        change = f"{verb} NLL by {number(abs(nll.value))} ({number(low)} to {number(high)})"
    else:
        change = "shows no change in NLL"
    ends = "from {} % to {} %".format(*points(m.ece, after.ece))
    if ece.excludes_zero:
        agree = nll.excludes_zero and (nll.value < 0) == (ece.value < 0)
        verb = "lowers" if ece.value < 0 else "raises"
        move = f" {'and' if agree else 'but'} {verb} ECE {ends}"
    else:
        move = f"; ECE goes {ends}, no change shown"
    first = (
        f"Temperature scaling with T = {t}, fitted without the images it is scored on, "
        f"{change}{move}{_left(after)}.{_gap_after(m)}"
    )
    if not (nll.excludes_zero and nll.value < 0):
        if not nll.excludes_zero and ece.excludes_zero and ece.value < 0:
            return [first, f"Dividing the logits by {t} is shown to mend ECE and nothing else."]
        return [first, "There is no case here for changing the temperature."]
    if ece.excludes_zero and ece.value > 0:
        return [
            first,
            f"The two disagree: dividing the logits by {t} pays where the probabilities of all "
            "classes are used, not where only the confidence of the answer is; one temperature "
            "does not mend this network.",
        ]
    return [first, f"Where confidences are used as probabilities, divide the logits by {t}."]


def _no_temperature(m: Report) -> str:
    """Where the fit ran to the end of its range: what it returned must not be taken for advice."""
    way = "lower" if m.temperature == BOUNDS[0] else "higher"
    return (
        f"No temperature can be fitted: the {way}, the less NLL, to the end of the search. All "
        "figures after temperature scaling are those of that end: use none of them."
    )


def _left(after: Side) -> str:
    if after.ece_null.p_value < SHOWN:
        return "; that is still more than a calibrated network would show"
    return "; a calibrated network could show as much"


def _gap_after(m: Report) -> str:
    """What becomes of the signed gap, where it is shown to move."""
    change = m.after_temperature.difference["signed_gap"]
    if not change.excludes_zero:
        return ""
    after = m.after_temperature.interval("signed_gap")
    ends = [number(100 * v, 1, sign=True) for v in (m.signed_gap, after.value)]
    text = f" The gap of mean confidence to accuracy goes from {ends[0]} to {ends[1]} points"
    if after.low is None:
        return f"{text}."
    low, high = (number(100 * v, 1, sign=True) for v in (after.low, after.high))
    return f"{text} ({low} to {high})."


def _failure(m: Report) -> str:
    auroc = m.interval("auroc")
    if auroc.value is None:
        kind = "correct" if m.accuracy == 1 else "wrong"
        return f"Every prediction is {kind}, so that failures cannot be told apart."
    text = (
        f"Confidence ranks a correct image above a wrong one in {percent(auroc.value, 1)} of pairs"
    )
    if auroc.low is not None:
        text += f" ({percent(auroc.low, 1)} to {percent(auroc.high, 1)})"
        if auroc.low <= 0.5 <= auroc.high:
            text += ", which chance could do"
    coverage = m.coverage_at_95_accuracy
    if m.accuracy >= 0.95:
        return f"{text}; all of these images can be answered at 95 % accuracy."
    if coverage == 0:
        return f"{text}; no threshold on confidence reaches 95 % accuracy on these images."
    point = next(p for p in m.operating_points.by_accuracy if p.accuracy_wanted == 0.95)
    text += (
        f"; {percent(coverage, 0)} of these images{_of_others(m)} can be answered at 95 % "
        "accuracy, those with a "
        f"confidence of {percent(m.confidence_at_95_accuracy, 1)} or more{_after_scaling(m)}."
    )
    held_out = point.held_out
    if held_out.low is None:
        return text
    return text + (
        " Chosen in this way on a part of the images, thresholds gave "
        f"{percent(held_out.accuracy, 1)} ({percent(held_out.low, 1)} to "
        f"{percent(held_out.high, 1)}) on the others."
    )


def _of_others(m: Report) -> str:
    share = m.interval("coverage_at_95_accuracy")
    if share.low is None:
        return ""
    return f" ({percent(share.low, 0)} to {percent(share.high, 0)} of others like them)"


def _after_scaling(m: Report) -> str:
    after = m.after_temperature
    if after.confidence_at_95_accuracy is None or not is_fitted(m.temperature):
        return ""
    return (
        f" (after temperature scaling {percent(after.coverage_at_95_accuracy, 0)}, from "
        f"{percent(after.confidence_at_95_accuracy, 1)} on)"
    )


def _classes(m: Report) -> str | None:
    """The worst classes, of those that hold images enough; None where most of them do not.

    Each interval is wrong in one case of twenty, half of them on either side.
    """
    table = m.per_class
    number = len(table.number)
    enough = [i for i in range(number) if table.images[i] >= FEW_OF_A_CLASS]
    count = len(enough)
    if count < 2 or 2 * count < number:
        return None
    over = sum(table.gap_low[i] > 0 for i in enough)
    under = sum(table.gap_high[i] < 0 for i in enough)
    text = (
        f"{over} of {count:,} classes are over-confident and {under} under-confident by intervals "
        f"that leave out zero; chance alone would give {_about(0.025 * count)} of each."
    )
    if over > 0.05 * count:
        i = max(enough, key=lambda j: table.gap_low[j])
        gap, low, high = points(
            *(getattr(table, k)[i] for k in ("signed_gap", "gap_low", "gap_high"))
        )
        text += f" The most over-confident is {class_name(m, table.number[i])}, by {gap} points"
        text += f" ({low} to {high})."
    if under > 0.05 * count:
        i = min(enough, key=lambda j: table.gap_high[j])
        gap, low, high = points(
            *(-getattr(table, k)[i] for k in ("signed_gap", "gap_high", "gap_low"))
        )
        text += f" The most under-confident is {class_name(m, table.number[i])}, by {gap} points"
        text += f" ({low} to {high})."
    return f"{text} {_least_accurate(m, enough)}"


def _least_accurate(m: Report, enough: list[int]) -> str:
    """The worst class, with what its images are taken for."""
    table = m.per_class
    i = min(enough, key=lambda j: (table.accuracy[j], j))
    if table.accuracy[i] == 1:
        return "No image of any of them is answered wrongly."
    # Wilson's interval, from the one of the gap: mean confidence minus it.
    low, high = (table.mean_confidence[i] - gap for gap in (table.gap_high[i], table.gap_low[i]))
    text = (
        f"The least accurate class is {class_name(m, table.number[i])}: "
        f"{percent(table.accuracy[i], 1)} of its {counted(table.images[i], 'image')} are "
        f"right ({percent(low, 1)} to {percent(high, 1)})"
    )
    if table.confused_with[i] is None:
        return f"{text}."
    other = class_name(m, table.confused_with[i])
    return f"{text}; {percent(table.confused_share[i], 0)} are taken for {other}."


def _about(count: float) -> str:
    return "less than one" if count < 1 else f"some {number(count, 0)}"


def class_name(m: Report, number: int) -> str:
    """The name of a class, or `class 7`."""
    names = m.about.class_names
    return names[number] if names and number < len(names) else f"class {number}"


def _labels(m: Report) -> str | None:
    known = [e.consistent for e in m.confident_errors if e.consistent is not None]
    if not known:
        return None
    return (
        f"Of the {len(known)} most confident errors whose images were looked at again, the second "
        f"look accepts the answer of {sum(known)}: there the label is doubtful, not the network."
    )
