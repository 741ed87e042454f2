"""Which markers a test gets without being marked by hand: `ranks`, `browser` and `slurm`.

A test is `ranks` if it starts other processes: ranks, workers, or Python again. That is so if it
names a starter below: the test itself, one of its fixtures or parameters, or a function or class of
the tests that one of these names.
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

from tests.support import cluster, jobs, ranks

STARTERS = (ranks.FORKING, jobs.Job, subprocess, multiprocessing, pty)
# Files whose tests have the package start processes: W&B's, and loader workers by spawning.
FILES = ("tests/tracking/test_wandb.py", "tests/data/test_delivery.py")
TESTS = str(Path(__file__).parents[1])


def needs(item: pytest.Item) -> Iterator[str]:
    """Yield the names of the markers that this test gets."""
    seen: dict[int, Any] = {}
    for one in _beginnings(item):
        _visit(one, seen)
    starts = any(id(starter) in seen for starter in STARTERS)
    if starts or item.nodeid.startswith(FILES):
        yield "ranks"
    if id(cluster.cluster) in seen:
        yield "slurm"
    if "browser" in getattr(item, "fixturenames", ()):
        yield "browser"


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
