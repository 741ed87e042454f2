"""The verdict of a report in plain language; every sentence follows from numbers and intervals."""

from typing import Any

from .display import number, percent, points
from .statistics import Interval
from .summary import interval_of

FEW_IMAGES = 50
FEW_OF_A_KIND = 10
SHOWN = 0.05  # p-value below which miscalibration counts as shown


def verdict(m: dict[str, Any]) -> list[str]:
    """Sentences for the metrics.json dictionary of one run, the most important first."""
    wrong = round(m["images"] * (1 - m["accuracy"]))
    if m["images"] < FEW_IMAGES:
        return [
            f"{m['images']} images are too few for a verdict; the numbers below are those of "
            "these images and say little of others."
        ]
    sentences = [_gap(m), _ece(m), *_temperature(m), _failure(m)]
    fewest = min(wrong, m["images"] - wrong)
    if fewest < FEW_OF_A_KIND:
        kind = "wrong" if wrong == fewest else "correct"
        sentences.append(
            f"Only {fewest} predictions are {kind}: read all that tells wrong from correct "
            "with caution."
        )
    return sentences


def _limits(interval: Interval) -> str:
    _, low, high = points(interval.value, interval.low, interval.high)
    return f"95 % interval {low} to {high}"


def _gap(m: dict[str, Any]) -> str:
    gap = interval_of(m, "signed_gap")
    if gap.low is None:
        return f"Mean confidence minus accuracy is {points(gap.value)[0]} points."
    if not gap.excludes_zero:
        return (
            "Neither over- nor under-confidence is shown overall: mean confidence minus accuracy "
            f"is {points(gap.value, gap.low, gap.high)[0]} points ({_limits(gap)})."
        )
    word, size = ("over", 1) if gap.value > 0 else ("under", -1)
    ends = sorted((size * gap.low, size * gap.high))
    value, low, high = points(size * gap.value, *ends)
    return (
        f"The network is {word}-confident by {value} points (95 % interval {low} to {high}): "
        f"its mean confidence is {percent(m['mean_confidence'], 1)}, "
        f"its accuracy {percent(m['accuracy'], 1)}."
    )


def _ece(m: dict[str, Any]) -> str:
    null = m["ece_null"]
    ece, mean, most = (f"{v} %" for v in points(m["ece"], null["mean"], null["quantile_95"]))
    seen = f"ECE is {ece}; a perfectly calibrated network would show {mean} on this many images"
    if null["p_value"] < SHOWN:
        return f"{seen}, and seldom more than {most}, so it is miscalibrated."
    return f"{seen}, often up to {most}, so these images do not show it to be miscalibrated."


def _temperature(m: dict[str, Any]) -> list[str]:
    after, t = m["after_temperature"], number(m["temperature"], 2)
    nll, ece = (Interval(**after["difference"][name]) for name in ("nll", "ece"))
    if nll.excludes_zero:
        low, high = sorted((abs(nll.low), abs(nll.high)))
        verb = "lowers" if nll.value < 0 else "raises"
        change = f"{verb} NLL by {number(abs(nll.value))} ({number(low)} to {number(high)})"
    else:
        change = "shows no change in NLL"
    ends = "from {} % to {} %".format(*points(m["ece"], after["ece"]))
    if ece.excludes_zero:
        agree = nll.excludes_zero and (nll.value < 0) == (ece.value < 0)
        verb = "lowers" if ece.value < 0 else "raises"
        move = f" {'and' if agree else 'but'} {verb} ECE {ends}"
    else:
        move = f"; ECE goes {ends}, no change shown"
    first = (
        f"Temperature scaling with T = {t}, fitted without the images it is scored on, "
        f"{change}{move}{_left(after)}."
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


def _left(after: dict[str, Any]) -> str:
    if after["ece_null"]["p_value"] < SHOWN:
        return "; that is still more than a calibrated network would show"
    return "; a calibrated network could show as much"


def _failure(m: dict[str, Any]) -> str:
    auroc = interval_of(m, "auroc")
    if auroc.value is None:
        kind = "correct" if m["accuracy"] == 1 else "wrong"
        return f"Every prediction is {kind}, so that failures cannot be told apart."
    text = (
        f"Confidence ranks a correct image above a wrong one in {percent(auroc.value, 1)} of pairs"
    )
    if auroc.low is not None:
        text += f" ({percent(auroc.low, 1)} to {percent(auroc.high, 1)})"
        if auroc.low <= 0.5 <= auroc.high:
            text += ", which chance could do"
    coverage = m["coverage_at_95_accuracy"]
    if m["accuracy"] >= 0.95:
        return f"{text}; all of these images can be answered at 95 % accuracy."
    if coverage == 0:
        return f"{text}; no threshold on confidence reaches 95 % accuracy on these images."
    threshold = percent(m["confidence_at_95_accuracy"], 1)
    return (
        f"{text}; {percent(coverage, 0)} of these images can be answered at 95 % accuracy, "
        f"those with a confidence of {threshold} or more."
    )
