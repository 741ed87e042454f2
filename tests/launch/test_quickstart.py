"""launch/quickstart.sh ends in recipes/study.py: what that refuses, in words."""

from pathlib import Path

import pytest

from tests.support.launching import ROOT, script


def refused(*words: str | Path) -> str:
    done = script(ROOT / "recipes/study.py", "configs/studies/digits.yaml", *words, cwd=ROOT)
    assert done.returncode in (1, 2)
    assert "Traceback" not in done.stdout
    return done.stdout.splitlines()[-1]


@pytest.mark.parametrize("option", ["--seeds", "--processes", "--parallel"])
@pytest.mark.parametrize("value", ["0", "-1", "x"])
def test_a_number_that_is_none_is_refused(option, value, tmp_path):
    said = refused("--directory", tmp_path / "study", f"{option}={value}")
    assert f"{option}: '{value}' is not a number of 1 or more" in said
    assert not (tmp_path / "study").exists()


def test_a_directory_that_cannot_be_used_is_named(tmp_path):
    (tmp_path / "letter").write_text("dear all")
    for name in ("letter", "letter/x"):
        assert f"{tmp_path}/{name}" in refused("--directory", tmp_path / name)


def test_runs_of_another_configuration_are_named(tmp_path):
    (tmp_path / "sgd-seed0").mkdir(parents=True)
    (tmp_path / "sgd-seed0/config.yaml").write_text("run: {seed: 7}\n")
    assert "or move this run away to make it again" in refused("--directory", tmp_path)
