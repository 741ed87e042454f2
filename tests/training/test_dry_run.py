"""Every configuration of ImageNet starts on every engine: real networks of three channels."""

import pytest

from tests.support.engines import ENGINES
from tests.support.launching import ROOT, launch

CONFIGS = sorted(path.stem for path in (ROOT / "configs/imagenet").glob("*.yaml"))
# Both networks, low precision, channels_last, clipping; each kind of engine.
SOME = [("resnet50_csam", "zero2"), ("resnet50_sam", "fsdp2"), ("vit_s16_csam", "zero3")]


def check(config: str, engine: str, folder) -> None:
    done = launch(
        "imagenet_csam",
        "--dry-run",
        "--config",
        ROOT / f"configs/imagenet/{config}.yaml",
        f"train.engine={engine}",
        "data.image_size=64",  # many processors are slow in bf16
        *(["model.options={img_size: 64}"] if config.startswith("vit") else []),
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
