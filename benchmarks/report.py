"""What a report costs: 50,000 images of 1,000 classes, from logits to the page, beside peers.

    python benchmarks/report.py [--images 50000] [--classes 1000] [--peers DIR] [--json FILE]

Each part runs in a process of its own on the same fp32 logits, read from a file into memory, with
one thread per library unless the environment says otherwise. Seconds are wall clock and, beside
them, of the processor; memory is the highest resident size less that with the logits loaded. Peers
compute what they have of our metrics, each by its own definition: torch-uncertainty and netcal,
from the environment or from DIR (`pip install --target DIR`); without them they are left out.
Nothing is asserted.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

RESAMPLES = 1000


def report(ids: list[str], labels: np.ndarray, logits: np.ndarray, folder: Path) -> str:
    """Records, cross-fitted temperature, metrics, 1,000 resamples, figures, page."""
    from flatcal_dist.calibration.records.records import Records
    from flatcal_dist.calibration.report.writing import write_report

    records = Records.from_logits(ids, labels, logits)
    m = write_report(records, folder / "report", resamples=RESAMPLES)
    return f"ECE {m.ece:.4f}, AURC {m.aurc:.4f}, T {m.temperature:.3f}"


def from_records(ids: list[str], labels: np.ndarray, logits: np.ndarray, folder: Path) -> str:
    """All metrics of the records that the report left, before and after temperature."""
    from flatcal_dist.calibration.records.records import Records
    from flatcal_dist.calibration.report.summary import point_metrics

    records = Records.load(folder / "report" / "records.parquet")
    clock = Clock()
    found = [point_metrics(scores) for scores in (records.before, records.after)]
    return f"{len(found[0])} metrics, twice; reading left out: {clock}"


def torch_uncertainty(ids: list[str], labels: np.ndarray, logits: np.ndarray, folder: Path) -> str:
    """NLL, Brier, ECE, adaptive and smooth ECE, AURC, AUGRC, risk and coverage; once."""
    import torch
    from torch_uncertainty import metrics as tu

    probabilities, target = torch.from_numpy(logits).softmax(-1), torch.from_numpy(labels)
    k = logits.shape[1]
    chosen = {
        "nll": tu.CategoricalNLL(),
        "brier": tu.BrierScore(num_classes=k),
        "ece": tu.CalibrationError(task="multiclass", num_classes=k, num_bins=15),
        "adaptive": tu.AdaptiveCalibrationError(task="multiclass", num_classes=k, num_bins=15),
        "smooth": tu.SmoothCalibrationError(),
        "aurc": tu.AURC(),
        "augrc": tu.AUGRC(),
        "coverage": tu.CovAt5Risk(),
        "risk": tu.RiskAt80Cov(),
    }
    values = {}
    for name, metric in chosen.items():
        metric.update(probabilities, target)
        values[name] = float(metric.compute())
    return f"ECE {values['ece']:.4f}, AURC {values['aurc']:.4f}; {len(values)} metrics"


def netcal(ids: list[str], labels: np.ndarray, logits: np.ndarray, folder: Path) -> str:
    """ECE, ACE and MCE of the softmax; once."""
    from netcal.metrics import ACE, ECE, MCE
    from scipy.special import softmax

    probabilities = softmax(logits, axis=1)
    values = [metric(15).measure(probabilities, labels) for metric in (ECE, ACE, MCE)]
    return f"ECE {values[0]:.4f}; {len(values)} metrics"


def netcal_temperature(ids: list[str], labels: np.ndarray, logits: np.ndarray, folder: Path) -> str:
    """Temperature scaling alone, without cross-fitting."""
    from netcal.scaling import TemperatureScaling
    from scipy.special import softmax

    fitted = TemperatureScaling().fit(softmax(logits, axis=1), labels)
    return f"weight {float(np.ravel(fitted.weights)[0]):.3f}"


PARTS: dict[str, Callable] = {
    "ours: complete report": report,
    "ours: metrics from records": from_records,
    "torch-uncertainty: metrics": torch_uncertainty,
    "netcal: metrics": netcal,
    "netcal: temperature": netcal_temperature,
}


class Clock:
    """Wall-clock and processor seconds since it was made."""

    def __init__(self) -> None:
        self.started = time.perf_counter(), time.process_time()

    @property
    def seconds(self) -> tuple[float, float]:
        return time.perf_counter() - self.started[0], time.process_time() - self.started[1]

    def __str__(self) -> str:
        return "{:.1f} s, {:.1f} s of the processor".format(*self.seconds)


def make_logits(images: int, classes: int, folder: Path) -> None:
    """Over-confident logits of a network that is right three times out of four."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, classes, images)
    logits = np.lib.format.open_memmap(
        folder / "logits.npy", mode="w+", dtype=np.float32, shape=(images, classes)
    )
    for start in range(0, images, 2000):
        part = slice(start, min(start + 2000, images))
        z = rng.standard_normal((len(labels[part]), classes), dtype=np.float32)
        z[np.arange(len(z)), labels[part]] += 5 + 2.2 * rng.standard_normal(len(z))
        logits[part] = 3.3 * z
    logits.flush()
    np.save(folder / "labels.npy", labels)


def measure(part: str, folder: Path) -> None:
    """Run one part in this process and print what it took as JSON."""
    logits, labels = np.load(folder / "logits.npy"), np.load(folder / "labels.npy")
    ids = [f"ILSVRC2012_val_{i + 1:08d}" for i in range(len(labels))]
    before, clock = _peak(), Clock()
    found = PARTS[part](ids, labels, logits, folder)
    wall, processor = clock.seconds
    print(json.dumps(
        {"part": part, "seconds": wall, "processor_seconds": processor,
         "megabytes": (_peak() - before) / 1e6, "found": found}
    ))  # fmt: skip


def _peak() -> int:
    """Highest resident size of this process so far, bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--peers", type=Path, help="folder of packages to measure beside ours")
    parser.add_argument("--json", type=Path, help="write the measurements there, too")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:
        measure(arguments.part, arguments.folder)
        return
    results = []
    environment = {"OMP_NUM_THREADS": "1"} | os.environ
    if arguments.peers:
        paths = [os.environ.get("PYTHONPATH", ""), str(arguments.peers.resolve())]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_logits(arguments.images, arguments.classes, folder)
        print(f"{'':<28}{'seconds':>9}{'processor':>11}{'MB above logits':>17}   found")
        for part in PARTS:
            command = [sys.executable, __file__, "--part", part, "--folder", name]
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            if done.returncode:
                print(f"{part:<28} left out: {done.stderr.strip().splitlines()[-1]}")
                continue
            result = json.loads(done.stdout.splitlines()[-1])
            results.append(result)
            print(
                f"{part:<28}{result['seconds']:>9.1f}{result['processor_seconds']:>11.1f}"
                f"{result['megabytes']:>17.0f}   {result['found']}", flush=True,
            )  # fmt: skip
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
