"""What is wrong with the options of a network, in words. Builders check little themselves."""

import difflib
import inspect
import re
import sys
from collections.abc import Callable
from typing import Any

from torch import nn

from flatcal_dist.errors import ConfigError

UNEXPECTED = re.compile(r"(\w+)(?:\.__init__)?\(\) got an unexpected keyword argument '(\w+)'.*")
SET_BY_OTHER_KEYS = (
    "self", "pretrained", "weights", "progress", "num_classes", "in_chans", "img_size", "device",
    "dtype",
)  # fmt: skip
ELSEWHERE = {"num_classes": "model.num_classes", "in_chans": "data.channels"}


def reason(error: Exception) -> str:
    """Return what an error says, with its type; some say nothing."""
    return f"{type(error).__name__}: {str(error) or 'it says no more'}"


def refuse_set_elsewhere(options: dict[str, Any]) -> None:
    """Raise ConfigError for an option that follows from another key."""
    for key, other in ELSEWHERE.items():
        if key in options:
            raise ConfigError(f"model.options.{key} follows from {other}: leave it out")


def no_such_option(name: str, entry: Callable[..., nn.Module], builder: str, option: str) -> str:
    """Say that a network has no such option, and which it has, as far as its builder tells.

    Args:
        name: What model.name says.
        entry: The function that builds the network.
        builder: The name of the class or function that refused the option.
        option: The option.
    """
    function = getattr(sys.modules[entry.__module__], builder, entry)
    known = [
        key
        for key, parameter in inspect.signature(function).parameters.items()
        if parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
        and key not in SET_BY_OTHER_KEYS
    ]
    near = difflib.get_close_matches(option, known, n=1, cutoff=0.6)
    hint = f"; did you mean {near[0]}?" if near else "."
    return (
        f"model.options.{option}: model.name={name} has no such option{hint} It has "
        f"{', '.join(known) or 'none'}. (model.options={{}} clears what a file sets for another "
        "network.)"
    )


def refuse_no_share(options: dict[str, Any]) -> None:
    """Raise ConfigError for a rate of dropout or stochastic depth that is no share below 1."""
    for key, value in options.items():
        if not key.endswith("drop_rate") and key != "drop_path_rate":
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
            raise ConfigError(
                f"model.options.{key}={value!r} is no share of values to leave out: expected a "
                "number from 0 on and below 1"
            )
