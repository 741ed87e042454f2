"""What each figure shows, in words, for readers who do not see it."""

from typing import Any

from flatcal_dist.calibration.pages.display import counted, number, percent, points
from flatcal_dist.calibration.report.model import Report, Side
from flatcal_dist.calibration.report.parts import RiskCoverage

NOTICED = 0.01  # the share of the images below which a bin is not mentioned


def reliability(side: Side) -> str:
    """Return what a reliability diagram shows."""
    filled = side.filled_bins()
    gaps = [b.gap for b in filled]
    outside = sum(not b.calibrated_low <= b.accuracy <= b.calibrated_high for b in filled)
    images = sum(b.count for b in filled)
    large = [(g, b) for g, b in zip(gaps, filled, strict=True) if b.count >= NOTICED * images]
    gap, worst = max(large, key=lambda pair: abs(pair[0]))
    return (
        f"Confidence exceeds accuracy in {sum(g > 0 for g in gaps)} of the {len(filled)} bins that "
        f"hold images. {outside} lie outside of what a calibrated network would show. The largest "
        f"gap of a bin with 1 % of the images or more is {number(100 * gap, 1, sign=True)} points, "
        f"at confidences of {percent(worst.low, 0)} to {percent(worst.high, 0)}, with "
        f"{counted(worst.count, 'image')}. ECE {percent(side.ece)}, signed gap "
        f"{number(100 * side.signed_gap, 2, sign=True)} points."
    )


def confidence(side: Side) -> str:
    """Return what a histogram of confidence shows."""
    h, parts = side.histogram, []
    groups = (("correct", h.correct, h.mean_correct), ("wrong", h.wrong, h.mean_wrong))
    for name, counts, mean in groups:
        if sum(counts):
            sure = sum(counts[36:]) / sum(counts)
            parts.append(
                f"the {sum(counts):,} {name} predictions have a mean confidence of "
                f"{percent(mean, 1)}, and {percent(sure, 0)} of them one above 90 %"
            )
    return ("; ".join(parts) + ".").capitalize()


def risk_coverage(m: Report) -> str:
    """Return what the risk-coverage curves of a report show."""
    after = m.after_temperature
    risks = ", ".join(
        f"{percent(_risk_at(m.risk_coverage, c), 1)} at {percent(c, 0)} coverage"
        for c in (0.25, 0.5, 0.75, 1.0)
    )
    return (
        f"The risk as trained is {risks}. AURC times 1000: {number(1000 * m.aurc, 1)} as "
        f"trained, {number(1000 * after.aurc, 1)} after temperature scaling."
    )


def _risk_at(curve: RiskCoverage, coverage: float) -> float:
    i = min(range(len(curve.coverage)), key=lambda j: abs(curve.coverage[j] - coverage))
    return curve.risk[i]


def confusions(m: Report) -> str:
    """Return what a confusion matrix shows."""
    pairs, k = m.confusions.pairs, len(m.confusions.classes or [])
    text = f"{k} classes by {k} answers; {percent(m.accuracy, 1)} of all images are right."
    if not pairs:
        return f"{text} No class is taken for another."
    p = pairs[0]
    return (
        f"{text} The most frequent confusion is that {p.images} of {p.of} images of class "
        f"{p.label} are taken for class {p.answer}. The table lists the most frequent ones."
    )


def training(curves: dict[str, list[Any]]) -> str:
    """Return what curves over epochs show."""
    names = {
        "mean_entropy": "entropy", "mean_entropy_correct": "entropy of correct predictions",
        "mean_entropy_wrong": "entropy of wrong predictions", "accuracy": "accuracy",
        "auroc": "AUROC", "ece": "ECE",
    }  # fmt: skip
    moves = []
    for key, name in names.items():
        known = [v for v in curves.get(key, []) if v is not None]
        if known:
            moves.append(f"{name} goes from {number(known[0])} to {number(known[-1])}")
    ends = f"From epoch {curves['epoch'][0]:g} to {curves['epoch'][-1]:g}"
    return f"{ends}, {'; '.join(moves)}." if moves else f"{ends}."


def severity(group: dict[str, Any], clean: dict[str, Any]) -> str:
    """Return what curves over severities show, from a GROUP and the clean ROW of shift.json."""
    worst = str(group["severities"][-1])
    here, there = clean["before"], group["before"]["by_severity"][worst]
    gaps = points(here["signed_gap"], there["signed_gap"])
    return (
        f"From clean images to severity {worst}, as trained, accuracy goes from "
        f"{percent(here['accuracy'], 1)} to {percent(there['accuracy'], 1)}, ECE from "
        f"{percent(here['ece'], 1)} to {percent(there['ece'], 1)}, mean confidence minus accuracy "
        f"from {gaps[0]} to {gaps[1]} points."
    )


def heat_map(group: dict[str, Any], rows: list[dict[str, Any]], key: str, side: str) -> str:
    """Return what a heat map of corruptions and severities shows.

    Args:
        group: A GROUP of shift.json.
        rows: The ROWs of its subsets.
        key: The metric.
        side: `before` temperature scaling, or `after` it.
    """
    known = [(r[side][key], r) for r in rows if r[side][key] is not None]
    if not known:
        return "Not defined on these images."
    (low, least), (high, most) = (pick(known, key=lambda pair: pair[0]) for pick in (min, max))
    return (
        f"{len(group['corruptions'])} corruptions at {len(group['severities'])} severities: from "
        f"{percent(low, 1)} for {_subset(least)} to {percent(high, 1)} for {_subset(most)}. The "
        "table holds all of them."
    )


def _subset(row: dict[str, Any]) -> str:
    return f"{row['corruption'].replace('_', ' ')} at severity {row['severity']}"
