import pytest

from flatcal_dist.calibration.records import Records

from .synthetic import make_records


@pytest.fixture(scope="session")
def records() -> Records:
    return make_records(400)
