"""launch/environment.sh: tested versions, newest ones, and when it installs again."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from itertools import chain
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
# Makes environments that hold this script again, writes down what pip is asked for, and is Python.
FAKE = f"""#!/usr/bin/env bash
case "$1 ${{2:-}}" in
"-m venv") mkdir -p "$3/bin"; touch "$3/pyvenv.cfg"; cp "$0" "$3/bin/python" ;;
"-m pip") echo "${{@:3}}" >> "$PIP_LOG"; [[ "$*" != *"${{PIP_FAILS:-nothing}}"* ]] ;;
*) exec {sys.executable} "$@" ;;
esac
"""


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Source the script of a copy of the project and call it; what pip was asked for."""
    project = tmp_path / "project"
    (project / "launch").mkdir(parents=True)
    for name in ("pyproject.toml", "launch/environment.sh", "launch/constraints.txt"):
        shutil.copy(ROOT / name, project / name)
    python, log = tmp_path / "python", tmp_path / "pip.log"
    python.write_text(FAKE)
    python.chmod(0o755)
    monkeypatch.delenv("FLATCAL_VENV", raising=False)

    def call(*arguments: str, fails: str | None = None) -> tuple[list[str], str]:
        log.write_text("")
        make = " ".join(["make_environment", *arguments])
        command = f"set -eu; source {project}/launch/environment.sh; {make}"
        environment = os.environ | {"PYTHON": str(python), "PIP_LOG": str(log)}
        if fails:
            environment["PIP_FAILS"] = fails
        done = subprocess.run(
            ["bash", "-c", command], env=environment, capture_output=True, text=True, check=False
        )
        assert (done.returncode != 0) == bool(fails), done.stderr
        return log.read_text().replace(str(project), "PROJECT").splitlines(), done.stderr

    call.project = project
    return call


TESTED = [
    "install --quiet --constraint PROJECT/launch/constraints.txt --upgrade pip",
    "install --quiet --constraint PROJECT/launch/constraints.txt "
    "--build-constraint PROJECT/launch/constraints.txt --editable PROJECT[dev]",
]


def test_the_tested_versions_are_installed_once(install):
    assert install("tested", "dev")[0] == TESTED
    assert install("tested", "dev")[0] == []
    assert install("tested")[0] == [call.replace("[dev]", "") for call in TESTED]
    assert install("tested")[0] == []


@pytest.mark.parametrize("name", ["pyproject.toml", "launch/constraints.txt"])
def test_either_file_asks_for_another_installation(install, name):
    install("tested", "dev")
    with (install.project / name).open("a") as file:
        file.write("# another\n")
    assert install("tested", "dev")[0] == TESTED


def test_the_newest_versions_are_asked_for_each_time_and_left_again(install):
    install("tested")
    install("tested", "dev")
    for _ in range(2):
        newest = install("latest", "dev")[0]
        assert newest[1] == (
            "install --quiet --upgrade --upgrade-strategy eager --editable PROJECT[dev]"
        )
        assert "constraint" not in " ".join(newest)
    assert install("tested", "dev")[0] == TESTED
    assert len(install("tested")[0]) == 2, "the other extra's mark was of before as well"


def test_an_installation_that_failed_is_tried_again(install):
    assert "--latest takes the newest" in install("tested", "dev", fails="--editable")[1]
    assert install("tested", "dev")[0] == TESTED


def constraints() -> dict[str, Requirement]:
    lines = (ROOT / "launch/constraints.txt").read_text().splitlines()
    named = [Requirement(line) for line in lines if not line.startswith("#")]
    return {canonicalize_name(requirement.name): requirement for requirement in named}


def test_every_dependency_has_a_tested_version_within_its_bounds():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    tested = constraints()
    for requirement in map(Requirement, chain(project["dependencies"], *extras)):
        if requirement.name == project["name"]:
            continue
        [exact] = tested[canonicalize_name(requirement.name)].specifier
        assert exact.operator == "=="
        assert requirement.specifier.contains(exact.version), requirement
    assert {"pip", "setuptools"} <= tested.keys(), "what installs and builds is tested too"


def test_the_file_names_versions_only():
    """No address and no path: another machine has other ones."""
    for line in (ROOT / "launch/constraints.txt").read_text().splitlines():
        assert line.startswith("#") or re.fullmatch(r"[\w.-]+==[\w.!+]+", line), line
