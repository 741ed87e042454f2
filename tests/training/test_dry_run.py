"""Every configuration starts on every engine: real networks of three channels."""

import json

import pytest

from flatcal_dist.studies.elements import elements
from flatcal_dist.studies.file import SEED, load_study
from tests.support.engines import ENGINES
from tests.support.launching import ROOT, launch

FOLDERS = ("imagenet", "tiny_imagenet", "cifar10", "cifar100")
CONFIGS = [
    f"{folder}/{path.stem}"
    for folder in FOLDERS
    for path in sorted((ROOT / f"configs/{folder}").glob("*.yaml"))
]
SOME = [("cifar10/resnet18_csam", "zero3")]  # ResNet-50 with DDP: tests/recipes/test_recipes.py
PAPERS = sorted(
    path.stem
    for path in (ROOT / "configs/studies").glob("*.yaml")
    if path.stem.partition("_")[0] in ("zhu2022", "tan2026", "guo2017", "foret2021")
)
PER_MICRO_BATCH = ("resnet50_sam_foret", "sam_per_accelerator")
METHODS = sorted(path.stem for path in (ROOT / "configs/methods").glob("*.yaml"))


def check(config: str, engine: str, folder, *words) -> None:
    done = launch(
        "imagenet_csam",
        "--dry-run",
        "--config",
        ROOT / f"configs/{config}.yaml",
        *words,
        f"train.engine={engine}",
        # Many processors are slow in bf16.
        *(["data.image_size=64"] if config.startswith("imagenet") else []),
        *(["model.options={img_size: 64}"] if "vit" in config else []),
        launcher=f"cpu_{engine}",
        cwd=folder,
    )
    assert not list(folder.iterdir())
    named = [str(word) for word in (config, *words)]
    if engine != "ddp" and any(name in word for word in named for name in PER_MICRO_BATCH):
        assert done.returncode == 1  # on the others with the reason, in one line
        assert "per_micro_batch" in done.stdout.splitlines()[-1]
        return
    assert done.returncode == 0, done.stdout
    assert "dry run: nothing was written" in done.stdout


@pytest.mark.parametrize(("config", "engine"), SOME)
def test_a_configuration_starts_on_its_engine(config, engine, tmp_path):
    check(config, engine, tmp_path)


@pytest.mark.parametrize("objective", ["crl", "cs_kd", "mmce"])
def test_the_time_of_a_run_is_its_steps_times_the_time_of_one(objective, digits_shards, tmp_path):
    """Objectives that know their samples have room for those of the measured steps."""
    timing = tmp_path / "timing.json"
    done = launch(
        "imagenet_csam", "--dry-run", "--timing", timing, "--config",
        ROOT / "configs/digits/csam.yaml", "sharpness={rule: sam, rho: 0.05}",
        f"objective.name={objective}", f"data.train={digits_shards}", "data.prepare=null",
        f"data.validation={digits_shards}", "train.epochs=3",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    found = json.loads(timing.read_text())
    assert found["steps"] == 3 * (800 // 64)
    assert found["seconds"] == pytest.approx(found["steps"] * found["step_seconds"])
    assert 0 < found["step_seconds"] < 60
    assert f"wrote {timing} alone" in done.stdout


@pytest.mark.exhaustive
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("config", CONFIGS)
def test_every_configuration_starts_on_every_engine(config, engine, tmp_path):
    check(config, engine, tmp_path)


@pytest.mark.exhaustive
@pytest.mark.parametrize("method", METHODS)
def test_every_method_starts_on_cifar(method, tmp_path):
    file = ROOT / f"configs/methods/{method}.yaml"
    check("cifar10/resnet18_sgd", "zero2", tmp_path, "--config", file)


@pytest.mark.exhaustive
@pytest.mark.parametrize("paper", PAPERS)
def test_every_cell_of_a_paper_s_grid_starts(paper, tmp_path):
    """Each method with each network, at a small size where the images are ImageNet's."""
    study = load_study(ROOT / f"configs/studies/{paper}.yaml")
    cells = [element for element in elements(study) if element.point[SEED] == 0]
    assert cells
    for cell in cells:
        small = ["data.image_size=64"] if "imagenet" in paper and "tiny" not in paper else []
        small += ["model.options={img_size: 64}"] if "vit" in paper else []
        words = ("--dry-run", "--config", study.base, *cell.arguments, *small)
        done = launch("imagenet_csam", *words, processes=1, cwd=tmp_path)
        assert done.returncode == 0, (cell.name, done.stdout)
        assert not list(tmp_path.iterdir())
