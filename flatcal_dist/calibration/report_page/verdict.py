"""The verdict of a report in plain language. Each sentence follows from numbers and intervals."""

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
from flatcal_dist.calibration.report.model import AfterTemperature, Report, Side
from flatcal_dist.calibration.shift import verdict as shift_verdict
from flatcal_dist.calibration.statistics.intervals import beyond_zero

FEW_IMAGES = 50
FEW_OF_A_KIND = 10
FEW_OF_A_CLASS = 20  # images, below which a class is not mentioned
SHOWN = 0.05  # the p-value below which miscalibration counts as shown


@dataclass(frozen=True)
class Finding:
    """A topic, and what the numbers say about it."""

    topic: str
    text: str


def verdict(m: Report, shift: dict[str, Any] | None = None) -> list[Finding]:
    """Return what metrics.json and shift.json of a run allow to say, the most important first."""
    wrong = round(m.images * (1 - m.accuracy))
    if m.images < FEW_IMAGES:
        verb = "is" if m.images == 1 else "are"
        text = (
            f"{counted(m.images, 'image')} {verb} too few for a verdict. The numbers hold for "
            f"{'this image' if m.images == 1 else 'these images'} and say little about others."
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


def _gap(m: Report) -> str:
    whole = m.interval("signed_gap").whole
    if whole is None:
        return f"Mean confidence minus accuracy is {points(m.signed_gap)[0]} points."
    gap, *ends = whole
    if not beyond_zero(*ends) or round(100 * gap, MOST_IN_PROSE) == 0:
        value, low, high = points(gap, *ends)
        return (
            "Neither over- nor under-confidence is shown overall: mean confidence minus accuracy "
            f"is {value} points (95 % interval {low} to {high})."
        )
    word, size = ("over", 1) if gap > 0 else ("under", -1)
    value, low, high = points(size * gap, *sorted(size * end for end in ends))
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
    if not usable_temperature(m):
        return [_folds_without_temperature(m)]
    nll, ece = (after.difference[name].direction for name in ("nll", "ece"))
    ends = "from {} % to {} %".format(*points(m.ece, after.ece))
    if ece:
        verb = "lowers" if ece < 0 else "raises"
        move = f" {'and' if nll == ece else 'but'} {verb} ECE {ends}"
    else:
        move = f"; ECE goes {ends}, no change shown"
    first = (
        f"Temperature scaling with T = {t}, fitted without the images it is scored on, "
        f"{_nll_change(after)}{move}{_left(after)}.{_gap_after(m)}"
    )
    if nll >= 0:
        if nll == 0 and ece < 0:
            return [first, f"Dividing the logits by {t} is shown to mend ECE and nothing else."]
        return [first, "There is no case here for changing the temperature."]
    if ece > 0:
        return [
            first,
            f"The two disagree: dividing the logits by {t} pays where the probabilities of all "
            "classes are used, not where only the confidence of the answer is; one temperature "
            "does not mend this network.",
        ]
    return [first, f"Where confidences are used as probabilities, divide the logits by {t}."]


def _nll_change(after: AfterTemperature) -> str:
    """What temperature scaling does to NLL."""
    change = after.difference["nll"]
    if change.whole is None or not change.direction:
        return "shows no change in NLL"
    size, *ends = (abs(v) for v in change.whole)
    low, high = sorted(ends)
    verb = "lowers" if change.direction < 0 else "raises"
    return f"{verb} NLL by {number(size)} ({number(low)} to {number(high)})"


def _no_temperature(m: Report) -> str:
    """What is said if the fit ran to the end of its range, so that nobody uses its result."""
    way = "lower" if m.temperature == BOUNDS[0] else "higher"
    return (
        f"No temperature can be fitted: NLL falls with a {way} temperature up to the end of the "
        "search. All figures after temperature scaling belong to that end: use none of them."
    )


def usable_temperature(m: Report) -> bool:
    """Tell whether a temperature was found for all images, and for those outside of each fold."""
    return all(is_fitted(one) for one in (m.temperature, *m.temperature_folds) if one is not None)


def _folds_without_temperature(m: Report) -> str:
    """What is said if the images outside of a fold have no finite temperature."""
    count = sum(one is not None and not is_fitted(one) for one in m.temperature_folds)
    return (
        f"All images together have the temperature T = {temperature(m.temperature)}, but without "
        f"the images of {count} of the {len(m.temperature_folds)} folds none can be fitted, as "
        "where only a few images are wrong. What temperature scaling does to other images cannot "
        "be said: use no figure after temperature scaling."
    )


def _left(after: Side) -> str:
    if after.ece_null.p_value < SHOWN:
        return "; that is still more than a calibrated network would show"
    return "; a calibrated network could show as much"


def _gap_after(m: Report) -> str:
    """What happens to the signed gap, if a change is shown."""
    change = m.after_temperature.difference["signed_gap"]
    if not change.excludes_zero:
        return ""
    after = m.after_temperature.interval("signed_gap")
    gaps = (m.signed_gap, m.after_temperature.signed_gap)
    was, now = (number(100 * v, 1, sign=True) for v in gaps)
    text = f" The gap of mean confidence to accuracy goes from {was} to {now} points"
    if after.ends is None:
        return f"{text}."
    low, high = (number(100 * v, 1, sign=True) for v in after.ends)
    return f"{text} ({low} to {high})."


def _failure(m: Report) -> str:
    auroc = m.interval("auroc")
    if m.auroc is None:
        kind = "correct" if m.accuracy == 1 else "wrong"
        return f"Every prediction is {kind}, so that failures cannot be told apart."
    text = f"Confidence ranks a correct image above a wrong one in {percent(m.auroc, 1)} of pairs"
    if auroc.ends is not None:
        low, high = auroc.ends
        text += f" ({percent(low, 1)} to {percent(high, 1)})"
        if low <= 0.5 <= high:
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
    if after.confidence_at_95_accuracy is None or not usable_temperature(m):
        return ""
    return (
        f" (after temperature scaling {percent(after.coverage_at_95_accuracy, 0)}, from "
        f"{percent(after.confidence_at_95_accuracy, 1)} on)"
    )


def _classes(m: Report) -> str | None:
    """The worst classes among those with enough images. None if most classes have too few.

    Each interval errs in one case of twenty, half of them on either side.
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
    """The class of the lowest accuracy, and what its images are taken for."""
    table = m.per_class
    i = min(enough, key=lambda j: (table.accuracy[j], j))
    if table.accuracy[i] == 1:
        return "No image of any of them is answered wrongly."
    # The interval of the gap is mean confidence minus Wilson's interval of the accuracy.
    low, high = (table.mean_confidence[i] - gap for gap in (table.gap_high[i], table.gap_low[i]))
    text = (
        f"The least accurate class is {class_name(m, table.number[i])}: "
        f"{percent(table.accuracy[i], 1)} of its {counted(table.images[i], 'image')} are "
        f"right ({percent(low, 1)} to {percent(high, 1)})"
    )
    answer = table.confused_with[i]
    if answer is None:
        return f"{text}."
    share = percent(table.confused_share[i], 0)
    return f"{text}; {share} are taken for {class_name(m, answer)}."


def _about(count: float) -> str:
    return "less than one" if count < 1 else f"some {number(count, 0)}"


def class_name(m: Report, number: int) -> str:
    """Return the name of a class, or `class 7`."""
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
