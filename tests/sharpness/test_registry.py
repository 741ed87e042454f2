"""The rows of the engines agree with what the engines, the configuration and the launchers say."""

from pathlib import Path
from typing import get_args

import pytest
import yaml

from flatcal_dist.config.sections import TrainConfig
from flatcal_dist.ranks import distributed
from flatcal_dist.ranks.launcher import LaunchError
from flatcal_dist.sharpness import SAM, SharpnessAwareStep
from flatcal_dist.sharpness.engines.registry import ENGINES, launched_engine
from tests.support.engines import UNLIKE, everywhere, make_engine

LAUNCHERS = Path(__file__).parents[2] / "configs/accelerate"


def test_the_configuration_offers_these_engines():
    assert get_args(TrainConfig.model_fields["engine"].annotation) == tuple(ENGINES)


def facts(rank, world_size, kind):
    """What an engine is: its class, whether its state is cut, and whether names are the user's."""
    engine = make_engine(kind)
    SharpnessAwareStep(engine, SAM(0.1))
    whole = sum(w.numel() for w in engine.full_weights().values())  # on rank 0
    mine = sum(w.numel() for w in engine.masters().values())
    return type(engine), whole, mine, [name for name, _ in engine.named.named_parameters()]


@pytest.mark.parametrize("kind", UNLIKE)
def test_each_row_says_what_the_engine_is(kind):
    entry = ENGINES["ddp" if kind == "one" else kind]
    outcomes = everywhere(kind, facts)
    whole = outcomes[0][1]
    for engine, _, mine, names in outcomes:
        assert engine is entry.engine_class()
        assert (mine < whole) == entry.sharded
        assert names[0] == "0.weight"


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("place", ["cpu", "node", "cluster"])
def test_accelerates_files_ask_for_the_engine_in_their_name(name, place):
    """Their plugins become the variables that Accelerate sets; see its utils/launch.py."""
    file = yaml.safe_load((LAUNCHERS / f"{place}_{name}.yaml").read_text())
    environment = {}
    if file["distributed_type"] == "DEEPSPEED":
        environment["ACCELERATE_USE_DEEPSPEED"] = "true"
        environment["ACCELERATE_DEEPSPEED_ZERO_STAGE"] = str(file["deepspeed_config"]["zero_stage"])
    if file["distributed_type"] == "FSDP":
        environment["ACCELERATE_USE_FSDP"] = "true"
        environment["FSDP_VERSION"] = str(file["fsdp_config"]["fsdp_version"])
    assert launched_engine(environment) == name


@pytest.mark.parametrize(
    "plugin",
    [
        {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"},
        {"ACCELERATE_USE_FSDP": "TRUE"},
        {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "0"},
    ],
)
def test_a_plugin_that_no_engine_uses_is_refused_and_named(plugin, monkeypatch):
    assert launched_engine(plugin) is None
    launched = {"ACCELERATE_MIXED_PRECISION": "no", "RANK": "0", "WORLD_SIZE": "1"}
    for key, value in {**launched, "LOCAL_RANK": "0", **plugin}.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(LaunchError, match=r"a plugin that no engine here uses \(ACCELERATE_"):
        distributed.start("fsdp2", "fp32")
