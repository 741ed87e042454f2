"""Names of flatcal_dist.config are imported at first use."""

import subprocess
import sys

import pytest

from flatcal_dist import config


def test_every_name_is_there_and_has_a_home():
    assert list(config._HOME) == config.__all__
    for name in config.__all__:
        assert getattr(config, name).__name__ == name
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        config.nothing  # noqa: B018


def test_what_needs_no_choice_needs_no_torch():
    code = (
        "import sys; from flatcal_dist.config import TrainConfig, ConfigError, parse_yaml, Section;"
        " sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
