"""The section of a page about the sharpness of the loss: its figure, sentence and table."""

from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from flatcal_dist.calibration.pages.display import MINUS, counted
from flatcal_dist.calibration.pages.drawing import style
from flatcal_dist.calibration.pages.palette import light
from flatcal_dist.calibration.report.sharpness import Estimate, Rise, Sharpness

RULES = {"sam": "", "asam": "Adaptive "}
MEANINGS = {
    "sam": "by how much the loss rises {rho} along the gradient (Foret et al., 2021)",
    "asam": "the same with steps in proportion to each weight, ρ {rho} (Kwon et al., 2021)",
}


@dataclass(frozen=True)
class Row:
    """A line of the table: a measure, what it means, its value, and how sure it is."""

    name: str
    meaning: str
    value: str
    sure: str


def digits(value: float) -> str:
    """Return a number to three digits, with a typographic minus sign."""
    if 1000 <= abs(value) < 1e6:
        return f"{float(f'{value:.3g}'):,.0f}".replace("-", MINUS)
    return f"{value:.3g}".replace("e+0", "e").replace("e-0", "e-").replace("-", MINUS)


def in_a_sentence(m: Sharpness) -> str:
    """Return in plain words by how much the loss rises near the weights."""
    rise = next(r for r in m.rises if r.rule == "sam" and r.groups == 1)
    around = _mean_at(m, rise.rho)
    text = (
        f"If the weights move by {digits(rise.rho)} in the direction in which the loss rises most, "
        f"the mean loss of {counted(m.images, 'image')} goes from {digits(m.loss)} to "
        f"{digits(m.loss + rise.rise.value)}"
    )
    if around is not None:
        text += f"; in a random direction of the same length, it goes to {digits(around)}"
    return (
        f"{text}. A smaller rise means a flatter loss. Flatness alone does not prove calibration."
    )


def describe_sharpness(m: Sharpness) -> str:
    """Return what the figure shows, for readers who do not see it."""
    first, last = m.distances[0], m.distances[-1]
    along = m.along_ascent
    text = (
        f"From {digits(first)} to {digits(last)} along the gradient the loss is "
        f"{digits(along[0])} at the one end, {digits(m.loss)} at the weights and "
        f"{digits(along[-1])} at the other end."
    )
    ends = [value for line in m.along_random for value in (line[0], line[-1])]
    if not ends:
        return text
    return (
        f"{text} At both ends of {counted(len(m.along_random), 'random direction')} it is "
        f"{digits(min(ends))} to {digits(max(ends))}."
    )


def sharpness_rows(m: Sharpness) -> list[Row]:
    """Return the lines of the table."""
    top, weight = m.eigenvalue, m.trace
    residual = f"residual {digits(top.residual)} after {counted(top.products, 'product')}"
    if not top.converged:
        residual += ", not converged: a larger eigenvalue may exist"
    return [
        Row(
            "Largest eigenvalue of the Hessian", "curvature in the sharpest direction (Lanczos)",
            digits(top.value), residual,
        ),
        Row(
            "Trace of the Hessian", "the sum of the curvatures in all directions (Hutchinson)",
            digits(weight.value), _error(weight, "random vector"),
        ),
        *map(_rise, m.rises),
        Row("Norm of the gradient", "of the mean loss", digits(m.gradient_norm), ""),
    ]  # fmt: skip


def draw_sharpness(m: Sharpness) -> Figure:
    """Draw the loss along the gradient and along random directions, and a part of it enlarged.

    The left panel has all distances. The right panel shows the distances up to rho alone.
    """
    with style():
        figure = Figure(figsize=(9.6, 4.0), layout="constrained")
        wide, near = figure.subplots(1, 2)
        rho = next(r.rho for r in m.rises if r.rule == "sam")
        chosen = [i for i, t in enumerate(m.distances) if abs(t) <= rho * 1.001]
        _lines(wide, m, range(len(m.distances)))
        _lines(near, m, chosen)
        wide.set(title="Loss around the weights", ylabel="Mean cross-entropy, nats")
        near.set(title=f"Up to ρ = {rho:g}")
        handles, labels = wide.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2)
        return figure


def _lines(axes: Axes, m: Sharpness, chosen: range | list[int]) -> None:
    x = [m.distances[i] for i in chosen]
    for number, line in enumerate(m.along_random):
        axes.plot(
            x, [line[i] for i in chosen], color=light("blue"), linewidth=1.1, marker="s",
            markersize=3.5, linestyle=(0, (4, 2)), label="_" if number else "random directions",
        )  # fmt: skip
    axes.plot(
        x, [m.along_ascent[i] for i in chosen], color=light("vermillion"), marker="o",
        markersize=4.5, label="along the gradient",
    )  # fmt: skip
    axes.axvline(0, color=light("muted"), linewidth=0.8, linestyle=(0, (1, 2)))
    axes.set_xlabel("Distance from the weights")


def _mean_at(m: Sharpness, distance: float) -> float | None:
    """Return the mean loss at this distance on both sides of the random directions, if known."""
    places = [i for i, t in enumerate(m.distances) if abs(abs(t) - distance) <= 1e-9]
    values = [line[i] for line in m.along_random for i in places]
    return sum(values) / len(values) if values else None


def _rise(one: Rise) -> Row:
    together = "all images together" if one.groups == 1 else f"groups of {one.images}"
    name = f"{RULES[one.rule]}sharpness, {together}".capitalize()
    meaning = MEANINGS[one.rule].format(rho=digits(one.rho))
    sure = _error(one.rise, "group") if one.groups > 1 else ""
    return Row(name, meaning, digits(one.rise.value), sure)


def _error(estimate: Estimate, what: str) -> str:
    if estimate.standard_error is None:
        return f"one {what}"
    error, samples = digits(estimate.standard_error), counted(estimate.samples, what)
    return f"± {error} (standard error, {samples})"
