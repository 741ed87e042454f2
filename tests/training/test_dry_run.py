"""Every configuration starts on every engine: real networks of three channels."""

import pytest

from tests.support.engines import ENGINES
from tests.support.launching import ROOT, launch

FOLDERS = ("imagenet", "tiny_imagenet", "cifar10", "cifar100")
CONFIGS = [
    f"{folder}/{path.stem}"
    for folder in FOLDERS
    for path in sorted((ROOT / f"configs/{folder}").glob("*.yaml"))
]
SOME = [("imagenet/vit_s16_csam", "zero3")]  # low precision, clipping; ResNet-50 in tests/recipes
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
    assert done.returncode == 0, done.stdout
    assert "dry run: nothing was written" in done.stdout
    assert not list(folder.iterdir())


@pytest.mark.parametrize(("config", "engine"), SOME)
def test_a_configuration_starts_on_its_engine(config, engine, tmp_path):
    check(config, engine, tmp_path)


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
