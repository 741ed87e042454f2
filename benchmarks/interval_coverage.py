"""How often do the intervals of a report hold the truth? A simulation on real logits.

    python benchmarks/interval_coverage.py
    python benchmarks/interval_coverage.py --logits FILE.npz --images 250 --draws 400

A population of real predictions stands for all images there are, so that the truth is known: the
figure of the whole population. Samples of it are drawn with replacement, each gets its intervals
as in a report, and the share of intervals that hold the truth is counted. A 95 % interval should
do so in 95 % of draws. Beside it stand the percentiles of the same resamples, and the width of our
interval over theirs. Two networks on the same images give differences, which are counted as well.

By default the population is scikit-learn's 1,797 digits, predicted out of fold by two multilayer
perceptrons, one of which learned from labels of which a fifth were wrong. FILE.npz has `logits`
[N, K] and `labels` [N], or several networks' logits [M, N, K].
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import StratifiedKFold
from sklearn.neural_network import MLPClassifier

from flatcal_dist.calibration.metrics.entries import STATISTICS
from flatcal_dist.calibration.softmax import Scores, score_images
from flatcal_dist.calibration.statistics.bootstrap import Bootstrap, bootstrap
from flatcal_dist.calibration.statistics.intervals import Interval, percentile


def digits() -> list[Scores]:
    """Out-of-fold predictions of two networks on the same images."""
    images, labels = load_digits(return_X_y=True)
    networks = []
    for noise, trained_on in ((0.0, 700), (0.2, 900)):
        random, logits = np.random.default_rng(0), np.zeros((len(labels), 10))
        folds = StratifiedKFold(3, shuffle=True, random_state=0)
        for train, test in folds.split(images, labels):
            chosen = random.permutation(train)[:trained_on]
            taught = labels[chosen].copy()
            wrong = random.random(len(taught)) < noise
            taught[wrong] = (taught[wrong] + random.integers(1, 10, wrong.sum())) % 10
            network = MLPClassifier((64,), max_iter=150, random_state=0)
            network.fit(images[chosen] / 16, taught)
            logits[test] = np.log(network.predict_proba(images[test] / 16) + 1e-300)
        networks.append(score_images(logits.astype(np.float32), labels))
    return networks


def from_file(path: Path) -> list[Scores]:
    with np.load(path) as file:
        logits, labels = file["logits"], file["labels"]
    return [score_images(network, labels) for network in logits.reshape(-1, *logits.shape[-2:])]


def drawn(scores: Scores, chosen: np.ndarray) -> Scores:
    return Scores(*(getattr(scores, field)[chosen] for field in Scores.__dataclass_fields__))


class Count:
    """Of one statistic: intervals that hold the truth, ours and percentiles, and their widths."""

    def __init__(self) -> None:
        self.ours: list[bool] = []
        self.percentiles: list[bool] = []
        self.widths: list[float] = []

    def add(self, truth: float, ours: Interval, plain: Interval) -> None:
        if ours.low is None or plain.low is None:
            return
        self.ours.append(ours.low - 1e-12 <= truth <= ours.high + 1e-12)
        self.percentiles.append(plain.low - 1e-12 <= truth <= plain.high + 1e-12)
        self.widths.append((ours.high - ours.low) / max(plain.high - plain.low, 1e-12))


def simulate(
    population: Sequence[Scores], images: int, draws: int, resamples: int
) -> tuple[dict[str, Count], dict[str, Count], float]:
    """Counts of the first network's figures, of differences to it, and its mean wrong images."""
    truth = bootstrap(population, resamples=1)
    random, wrong = np.random.default_rng(0), 0
    figures = {name: Count() for name in STATISTICS}
    differences = {name: Count() for name in STATISTICS}
    for seed in range(draws):
        chosen = random.integers(len(population[0].correct), size=images)
        samples = bootstrap([drawn(s, chosen) for s in population], resamples, seed)
        wrong += int((~population[0].correct[chosen]).sum())
        for name in STATISTICS:
            m = list(STATISTICS).index(name)
            value = STATISTICS[name].natural(truth.point[0, m])
            replicates = STATISTICS[name].natural(samples.replicates[:, 0, m])
            plain = percentile(STATISTICS[name].natural(samples.point[0, m]), replicates)
            figures[name].add(float(value), samples.interval(0, name), plain)
            if len(population) > 1:
                _add_difference(differences[name], name, truth, samples)
    return figures, differences, wrong / draws


def _add_difference(count: Count, name: str, truth: Bootstrap, samples: Bootstrap) -> None:
    m = list(STATISTICS).index(name)
    true, point, each = (
        STATISTICS[name].natural(part[..., 1, m]) - STATISTICS[name].natural(part[..., 0, m])
        for part in (truth.point, samples.point, samples.replicates)
    )
    count.add(float(true), samples.difference(1, 0, name), percentile(float(point), each))


def table(title: str, counts: dict[str, Count]) -> Table:
    result = Table("statistic", "ours", "percentiles", "width over theirs", "draws", title=title)
    for name, count in counts.items():
        if count.ours:
            shares = (f"{np.mean(hits):.2f}" for hits in (count.ours, count.percentiles))
            width = f"{np.median(count.widths):.2f}"
            result.add_row(name, *shares, width, str(len(count.ours)))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--logits", type=Path, help="npz file; default: digits")
    parser.add_argument("--images", type=int, nargs="+", default=[600, 1500])
    parser.add_argument("--draws", type=int, default=200)
    parser.add_argument("--resamples", type=int, default=400)
    arguments = parser.parse_args()
    population = from_file(arguments.logits) if arguments.logits else digits()
    console = Console(width=100)
    for images in arguments.images:
        started = time.perf_counter()
        figures, differences, wrong = simulate(
            population, images, arguments.draws, arguments.resamples
        )
        took = time.perf_counter() - started
        title = f"{images} images a draw, {wrong:.0f} wrong; {took:.0f} s"
        console.print(table(f"figures: {title}", figures))
        if len(population) > 1:
            console.print(table(f"differences: {title}", differences))


if __name__ == "__main__":
    main()
