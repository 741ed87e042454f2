"""`flatcal evaluate --sharpness`: the same figures on any number of ranks, in file and page."""

import json
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.nn.functional import cross_entropy

from flatcal_dist import cli
from flatcal_dist.calibration.report.model import SCHEMA, read_metrics
from flatcal_dist.calibration.report.writing import render_report
from flatcal_dist.calibration.report_page.sharpness import digits
from flatcal_dist.config import ConfigError, to_yaml
from flatcal_dist.evaluation import reporting
from flatcal_dist.evaluation.passes import Ensemble
from flatcal_dist.evaluation.sharpness import chosen_groups
from flatcal_dist.sharpness.measures import Options
from tests.evaluation.small_networks import join, logits_by_hand, network, settings
from tests.support.quick_reports import quick_reports
from tests.support.ranks import on_ranks

# Networks that were never trained have no skill for a temperature to be fitted to.
pytestmark = pytest.mark.filterwarnings("ignore:no finite temperature")

ASKED = ["--sharpness", "--sharpness-m", "8", "--sharpness-rho", "0.2"]


def make_run(folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.yaml").write_text(to_yaml(settings(10)))
    save_file(network(10).state_dict(), folder / "model.safetensors")
    return folder


def evaluate(run: Path, trees: Path, output: Path, *more: str) -> Path:
    words = ["evaluate", run, "--data", trees / "photographs", "--output", output, *more]
    cli.main([str(word) for word in words])
    return output


def on_the_command(rank: int, world_size: int, run: Path, trees: Path, output: Path) -> None:
    join(rank, world_size)
    evaluate(run, trees, output, *ASKED)


@pytest.fixture(scope="module")
def reports(trees, tmp_path_factory) -> tuple[Path, Path, Path]:
    """Reports of one process, of two ranks, and without sharpness."""
    base = tmp_path_factory.mktemp("sharpness")
    run = make_run(base / "run")
    with quick_reports(draw=True, calibrators=False):
        alone = evaluate(run, trees, base / "alone", *ASKED)
    on_ranks(2, on_the_command, run, trees, base / "two")
    return alone, base / "two", evaluate(run, trees, base / "without")


def numbers(value) -> list:
    if isinstance(value, dict | list):
        inner = value.values() if isinstance(value, dict) else value
        return [number for one in inner for number in numbers(one)]
    return [value] if isinstance(value, float | int) else []


def test_two_ranks_measure_what_one_process_measures(reports):
    """In single precision, whose rounding an eigenvector multiplies: 1e-4."""
    alone, two, _ = (read_metrics(folder / "metrics.json").sharpness for folder in reports)
    assert alone.images == 32, "four groups of 8 of the 39 images"
    assert [one.images for one in alone.rises] == [32, 8, 32, 8]
    for name, value in alone.model_dump().items():
        other = two.model_dump()[name]
        scale = max(map(abs, numbers(value)))
        if name in ("rises", "eigenvalue"):  # differences of losses, and a residual near zero
            scale = max(scale, alone.loss)
        assert numbers(other) == pytest.approx(numbers(value), rel=1e-4, abs=1e-4 * scale), name


def test_the_loss_is_that_of_the_images_by_hand(reports, trees):
    files = sorted((trees / "photographs").glob("*/*"))
    chosen = np.concatenate(chosen_groups(39, Options(m=8)))
    assert len(set(chosen.tolist())) == 32
    folders = sorted({file.parent.name for file in files})
    labels = torch.tensor([folders.index(files[i].parent.name) for i in chosen])
    logits = torch.from_numpy(logits_by_hand([files[i] for i in chosen], 10))
    found = read_metrics(reports[0] / "metrics.json").sharpness
    assert found.loss == pytest.approx(float(cross_entropy(logits, labels)), rel=1e-4)


def test_the_page_shows_it_or_says_that_it_was_not_measured(reports):
    alone, _, without = reports
    page = (alone / "index.html").read_text()
    assert '<section id="sharpness"' in page
    assert "Sharpness, groups of 8" in page
    assert "Adaptive sharpness, all images together" in page
    assert "If the weights move by 0.2 in the direction in which the loss rises most" in page
    assert {"sharpness.png", "sharpness.svg"} <= {f.name for f in (alone / "figures").iterdir()}
    assert "not measured (flatcal evaluate --sharpness)" not in page
    bare = (without / "index.html").read_text()
    assert "sharpness-title" not in bare
    assert "not measured (flatcal evaluate --sharpness)" in bare


def test_the_file_fits_its_schema_and_older_files_are_read(reports, tmp_path):
    for folder in reports:
        written = json.loads((folder / "metrics.json").read_text())
        jsonschema.validate(written, json.loads(SCHEMA.read_text()))
    assert written.pop("sharpness") is None
    file = reports[2] / "metrics.json"
    file.write_text(json.dumps(written))
    assert read_metrics(file).sharpness is None
    render_report(reports[2])


def test_groups_are_whole_and_stay_within_the_cap():
    groups = chosen_groups(1000, Options(images=100, m=30))
    assert [len(group) for group in groups] == [30, 30, 30]
    assert len(set(np.concatenate(groups).tolist())) == 90
    (few,) = chosen_groups(7, Options(m=30))
    assert sorted(few.tolist()) == list(range(7)), "fewer than m images are one group"


def test_options_without_sharpness_are_refused(trees, tmp_path):
    run = make_run(tmp_path / "run")
    with pytest.raises(SystemExit) as refused:
        evaluate(run, trees, tmp_path / "o", "--sharpness-m", "8")
    assert "--sharpness-m goes with --sharpness" in str(refused.value)
    with pytest.raises(SystemExit):
        evaluate(run, trees, tmp_path / "o", "--sharpness", "--sharpness-rho", "-1")


def test_an_ensemble_is_refused_before_work(tmp_path):
    several = Ensemble([network(10), network(10)])
    with pytest.raises(ConfigError, match="sharpness is measured for one network"):
        reporting.report(settings(10), several, None, None, tmp_path, sharpness=Options())


def test_numbers_are_written_with_three_digits():
    written = {1316.2: "1,320", 0.012345: "0.0123", 3.2e-7: "3.2e−7", -4e8: "−4e8", 263.4: "263"}
    assert {value: digits(value) for value in written} == written
