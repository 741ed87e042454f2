"""Typed configuration: YAML files that inherit, dotted overrides, errors that say how to mend them.

    config = load("configs/digits/csam.yaml", ["sharpness.rho=0.1", "train.epochs=3"])
    config.sharpness.rho

A file may name others that it builds on (`inherits: ../base/digits.yaml`, or a list of them; paths
are relative to the file). Later values win: first come the inherited files in their order, then the
file itself, then the command line. Every key is declared once: in `sections`, in `data_section`, or
beside the class that it belongs to (`choice_sections`). An unknown key, or a value that does not
fit, is refused with its path, the place where it was written, and what was expected there.

Each name is imported when it is first used (PEP 562): the classes that a configuration can choose
need torch, whose import takes seconds, and `flatcal status` needs none of them.
"""

from typing import TYPE_CHECKING

from flatcal_dist.lazy import names_of

if TYPE_CHECKING:
    from flatcal_dist.config.choice_sections import NoRule, Perturbation
    from flatcal_dist.config.data_section import DataConfig
    from flatcal_dist.config.identity import differences, fingerprint, flatten, to_yaml, write
    from flatcal_dist.config.kinds import Section
    from flatcal_dist.config.loading import load
    from flatcal_dist.config.method import method_of, setting_of
    from flatcal_dist.config.parser import CommandLine, command_line
    from flatcal_dist.config.root import Config
    from flatcal_dist.config.sections import (
        EvaluateConfig,
        ModelConfig,
        OptimizerConfig,
        RunConfig,
        TrainConfig,
        WandbConfig,
    )
    from flatcal_dist.config.yaml_core import as_override, parse_yaml
    from flatcal_dist.errors import ConfigError

__getattr__ = names_of(
    __name__,
    {
        "config.choice_sections": "NoRule Perturbation",
        "config.data_section": "DataConfig",
        "config.identity": "differences fingerprint flatten to_yaml write",
        "config.kinds": "Section",
        "config.loading": "load",
        "config.method": "method_of setting_of",
        "config.parser": "CommandLine command_line",
        "config.root": "Config",
        "config.sections": "EvaluateConfig ModelConfig OptimizerConfig "
        "RunConfig TrainConfig WandbConfig",
        "config.yaml_core": "as_override parse_yaml",
        "errors": "ConfigError",
    },
)

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
    "method_of",
    "parse_yaml",
    "setting_of",
    "to_yaml",
    "write",
]
