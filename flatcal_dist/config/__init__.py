"""Typed configuration: YAML files that inherit, dotted overrides, errors that say how to mend them.

    config = load("configs/digits/csam.yaml", ["sharpness.rho=0.1", "train.epochs=3"])
    config.sharpness.rho

A file may name others that it builds on (`inherits: ../base/digits.yaml`, or a list of them; paths
are relative to the file). Later ones win: inherited files in their order, then the file itself,
then the command line. Every key is declared once, in `sections`, `data_section` or beside the class
that it belongs to (`choice_sections`). A key that is not, or a value that does not fit, is refused
with its path, where it was written, and what was expected.
"""

from flatcal_dist.config.choice_sections import NoRule, Perturbation
from flatcal_dist.config.command_line import CommandLine, command_line
from flatcal_dist.config.data_section import DataConfig
from flatcal_dist.config.files import as_override, parse_yaml
from flatcal_dist.config.identity import differences, fingerprint, flatten, to_yaml, write
from flatcal_dist.config.kinds import Section
from flatcal_dist.config.loading import load
from flatcal_dist.config.sections import (
    Config,
    EvaluateConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    TrainConfig,
    WandbConfig,
)
from flatcal_dist.errors import ConfigError

__all__ = [
    "CommandLine",
    "Config",
    "ConfigError",
    "DataConfig",
    "EvaluateConfig",
    "ModelConfig",
    "NoRule",
    "OptimizerConfig",
    "Perturbation",
    "RunConfig",
    "Section",
    "TrainConfig",
    "WandbConfig",
    "as_override",
    "command_line",
    "differences",
    "fingerprint",
    "flatten",
    "load",
    "parse_yaml",
    "to_yaml",
    "write",
]
