"""What all tests share. The process that deals tests to workers reads this, too, and waits for it.

So what takes long to import is imported where it is used.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from flatcal_dist.calibration.records.records import Records

# A test must not fail because the machine is busy.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")


@pytest.fixture(scope="session")
def records() -> "Records":
    from tests.support.synthetic import make_records

    return make_records(400)


@pytest.fixture(scope="session")
def digits_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shards of the digits, written once. Leave them as they are: change a copy."""
    from flatcal_dist.data import prepare_digits

    return prepare_digits(tmp_path_factory.mktemp("data") / "new" / "digits")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark each test by what it needs, before `-m` chooses, and leave the exhaustive ones out.

    They stay where the expression of `-m` names them, or where a test is named by its id.
    """
    from hypothesis import HealthCheck, settings

    from tests.support.markers import needs

    # A test must not fail because the machine is busy.
    settings.register_profile(
        "patient", deadline=None, suppress_health_check=[HealthCheck.too_slow]
    )
    settings.load_profile("patient")
    for item in items:
        for marker in needs(item):
            item.add_marker(marker)
    _files_that_wait_first(items)
    if "exhaustive" in (config.option.markexpr or ""):
        return
    left_out = [item for item in items if item.get_closest_marker("exhaustive")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("exhaustive")]


def _files_that_wait_first(items: list[pytest.Item]) -> None:
    """Files with a cluster come first, then those with ranks: what is short fills the end."""
    places = {"slurm": 0, "ranks": 1, "browser": 1}
    of_file: dict[Path, int] = {}
    for item in items:
        place = min((p for name, p in places.items() if item.get_closest_marker(name)), default=2)
        of_file[item.path] = min(place, of_file.get(item.path, 2))
    items.sort(key=lambda item: of_file[item.path])
