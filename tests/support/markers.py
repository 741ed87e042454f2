"""Which markers a test gets without being marked by hand: `ranks`, `browser` and `slurm`.

A test is `ranks` if it does whole jobs: if it starts ranks, workers or Python again, or evaluates
networks. It is `browser` if it writes whole pages, or opens them. That is so if it names a function
or class of those below: the test itself, one of its fixtures or parameters, or a function or class
of the tests that one of these names.
"""

import inspect
import multiprocessing
import pty
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

import pytest

from flatcal_dist.calibration.comparison.writing import write_comparison
from flatcal_dist.calibration.report.writing import render_report, write_report
from flatcal_dist.evaluation import job, reporting
from flatcal_dist.studies.page import write_study
from tests.support import cluster, jobs, ranks
from tests.support.quick_reports import be_quick, quick_reports

STARTERS = (ranks.FORKING, jobs.Job, subprocess, multiprocessing, pty)
EVALUATIONS = (job.evaluate_model, reporting.evaluate)
PAGES = (write_report, render_report, write_comparison, write_study)
ABOUT_PAGES = (quick_reports, be_quick)  # name the functions that write pages, and write none
# Files whose tests have the package do so: W&B's processes, workers of loaders, `flatcal evaluate`.
FILES = (
    "tests/tracking/test_wandb.py",
    *(f"tests/data/test_{name}.py" for name in ("delivery", "loader", "streaming")),
    *(f"tests/evaluation/test_{name}.py" for name in ("job", "predicting", "sharpness")),
)
TESTS = str(Path(__file__).parents[1])


def needs(item: pytest.Item) -> Iterator[str]:
    """Yield the names of the markers that this test gets."""
    seen: dict[int, Any] = {id(one): one for one in ABOUT_PAGES}
    for one in _beginnings(item):
        _visit(one, seen)
    if item.nodeid.startswith(FILES) or _any_of((*STARTERS, *EVALUATIONS), seen):
        yield "ranks"
    if id(cluster.cluster) in seen:
        yield "slurm"
    if "browser" in getattr(item, "fixturenames", ()) or _any_of(PAGES, seen):
        yield "browser"


def _any_of(known: tuple[Any, ...], seen: dict[int, Any]) -> bool:
    return any(id(one) in seen for one in known)


def _beginnings(item: pytest.Item) -> Iterator[Any]:
    """Yield the test's function, the values of its parameters, and its fixtures' functions."""
    yield getattr(item, "function", None)
    callspec = getattr(item, "callspec", None)
    yield from callspec.params.values() if callspec else ()
    information = getattr(item, "_fixtureinfo", None)
    for definitions in information.name2fixturedefs.values() if information else ():
        yield from (definition.func for definition in definitions)


def _visit(one: Any, seen: dict[int, Any]) -> None:
    """Add an object, and all that its code names, to `seen`, by identity."""
    if id(one) in seen:
        return
    seen[id(one)] = one
    one = inspect.unwrap(one) if callable(one) else one
    module = sys.modules.get(str(getattr(one, "__module__", "")))
    if not str(getattr(module, "__file__", "")).startswith(TESTS):
        return
    if isinstance(one, type):
        for attribute in vars(one).values():
            _visit(attribute, seen)
    elif isinstance(one, FunctionType):
        for value in _named(one.__code__, one.__globals__):
            _visit(value, seen)


def _named(code: CodeType, names: dict[str, Any]) -> Iterator[Any]:
    """Yield the global values that a piece of code names, also as attributes of a module."""
    known = [names[name] for name in code.co_names if name in names]
    yield from known
    for module in known:
        if isinstance(module, ModuleType):
            yield from (vars(module)[name] for name in code.co_names if name in vars(module))
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _named(inner, names)
