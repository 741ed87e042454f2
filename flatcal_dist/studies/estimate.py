"""How long the missing runs of a study will take: from its finished runs, or measured."""

import json
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from flatcal_dist.calibration.pages.display import duration
from flatcal_dist.errors import ConfigError
from flatcal_dist.files import read_json
from flatcal_dist.runs.directory import RunDirectory
from flatcal_dist.studies.elements import Element
from flatcal_dist.studies.file import SEED, Study
from flatcal_dist.studies.jobs import How, command, phase_of, surroundings

NOT_KNOWN = "not known: the training images are not here yet, or data.epoch_samples is not set"


def estimate(study: Study, found: Sequence[Element], how: How) -> None:
    """Print the time of each missing run and of all of them, and start none.

    A finished run of another seed tells the time. Otherwise the recipe's `--dry-run` builds the
    run, which shows that it can start, and some of its steps are timed.

    Raises:
        ConfigError: A run cannot be built. What the recipe said stands in the message.
    """
    known = {}
    for element in found:
        if phase_of(element) == "finished":
            state = RunDirectory(element.run).state()
            known[_arm(element)] = state.seconds if state else None
    total, unknown = 0.0, 0
    for element in found:
        if phase_of(element) == "finished":
            continue
        if _arm(element) not in known:
            known[_arm(element)] = _measured(study, element, how)
        seconds = known[_arm(element)]
        text = duration(seconds) if seconds is not None else NOT_KNOWN
        print(f"[{element.index}] {element.name}: {text}", flush=True)
        total, unknown = total + (seconds or 0.0), unknown + (seconds is None)
    but = f" but {unknown}" if unknown else ""
    print(
        f"about {duration(total / how.parallel)} for the missing runs{but}, {how.parallel} at a "
        "time, if they do not slow each other down; without start-up, validation and evaluation of "
        "runs that were only measured"
    )


def _arm(element: Element) -> str:
    """All that tells a run from the others, but the seed."""
    return json.dumps({key: value for key, value in element.point.items() if key != SEED})


def _measured(study: Study, element: Element, how: How) -> float | None:
    with tempfile.TemporaryDirectory() as folder:
        timing = Path(folder, "timing.json")
        words = [*command(study, element, how), "--dry-run", "--timing", str(timing)]
        done = subprocess.run(
            words,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=surroundings(),
        )
        if done.returncode:
            raise ConfigError(f"run {element.name} cannot start:\n{done.stdout.strip()}")
        seconds: float | None = read_json(timing)["seconds"]
        return seconds
