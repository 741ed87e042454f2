"""Markers that tests get by themselves, and the exhaustive ones that are left out."""

import copy
import subprocess
from collections.abc import Callable

import pytest

from tests.conftest import pytest_collection_modifyitems
from tests.support.launching import launch


def a_helper_that_launches() -> None:
    launch("imagenet_csam")


def test_a_test_that_starts_nothing(request: pytest.FixtureRequest) -> None:
    marks = {mark.name for mark in request.node.iter_markers()}
    assert not marks & {"ranks", "slurm", "browser", "exhaustive"}


@pytest.mark.parametrize("how", [a_helper_that_launches, lambda: subprocess.run(["true"])])
def test_a_parameter_that_starts_processes(
    how: Callable[[], None], request: pytest.FixtureRequest
) -> None:
    assert request.node.get_closest_marker("ranks")


@pytest.mark.parametrize(
    ("expression", "kept"),
    [("", 1), ("not ranks", 1), ("exhaustive", 2), ("exhaustive and not ranks", 2)],
)
def test_the_exhaustive_ones_stay_where_they_are_named(
    expression: str, kept: int, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two tests, one of which is exhaustive; the expression itself is applied by pytest."""
    monkeypatch.setattr(request.config.option, "markexpr", expression)
    monkeypatch.setattr(request.config.hook, "pytest_deselected", lambda items: None)
    other = copy.copy(request.node)
    other.own_markers = [pytest.mark.exhaustive.mark]
    items = [request.node, other]
    pytest_collection_modifyitems(request.config, items)
    assert len(items) == kept
