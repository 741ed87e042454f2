import pytest

from flatcal_dist.calibration.records.records import Records
from tests.support.synthetic import make_records


@pytest.fixture(scope="session")
def records() -> Records:
    return make_records(400)
