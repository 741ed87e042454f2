"""How files and overrides become a valid configuration."""

import re
from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from flatcal_dist.config.checking.choosing import CHOOSERS, keys, set_aside, unknown
from flatcal_dist.config.checking.conditions import with_defaults_for_unread
from flatcal_dist.config.checking.messages import explain
from flatcal_dist.config.checking.older import refuse_older, translate_older
from flatcal_dist.config.checking.run_length import refuse_short_epochs
from flatcal_dist.config.files import read_layers
from flatcal_dist.config.identity import fingerprint
from flatcal_dist.config.root import Config
from flatcal_dist.errors import ConfigError


def load(
    path: str | Path | Sequence[Path] | None,
    overrides: Sequence[str] = (),
    recorded: bool = False,
) -> Config:
    """Read configuration files, and apply overrides of the form `key.sub=value`.

    Args:
        path: The file, or several of which later ones win; None for the defaults.
        overrides: Values that win over those of the file.
        recorded: Whether a run that has begun wrote the file. Keys of earlier versions are then
            translated, and values that it does not read are passed over.

    Raises:
        ConfigError: The file cannot be read, a key is unknown or belongs to another choice, or a
            value does not fit. Or the run is too short for its schedule or its average.
    """
    paths = [Path(path)] if isinstance(path, str | Path) else list(path or ())
    layers = read_layers(paths, overrides, recorded)
    if recorded:
        translate_older(layers.values)
    else:
        refuse_older(layers)
    # A choice may be missing because its key is misspelled: validation names unknown keys first.
    set_aside(layers, recorded or bool(unknown(layers.values)))
    try:
        config = Config.model_validate(layers.values)
    except ValidationError as error:
        raise ConfigError(explain(error, layers, list(keys()), CHOOSERS)) from None
    config = with_defaults_for_unread(config, layers, recorded)
    if not recorded:
        refuse_short_epochs(config)
    if config.run.dir is None and paths:
        stems = "+".join(_word(one.stem) for one in paths)
        name = f"{_word(paths[0].resolve().parent.name)}_{stems}-{fingerprint(config)}"
        config = config.model_copy(
            update={"run": config.run.model_copy(update={"dir": f"runs/{name}"})}
        )
    return config


def _word(text: str) -> str:
    """Return a part of a directory's name, without letters that only odd file names have."""
    return re.sub(r"[^\w.+-]+", "_", text)
