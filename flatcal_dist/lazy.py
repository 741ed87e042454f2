"""Names of a package that are imported when they are first used (PEP 562).

Importing torch, torchvision and timm takes seconds. A message about a key needs none of them.
"""

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any


def names_of(package: str, homes: Mapping[str, str]) -> Callable[[str], Any]:
    """Return what a package calls `__getattr__`.

    Args:
        package: The package, `__name__`.
        homes: The names that each module has, with spaces between them, by the module's name
            below flatcal_dist.

    Raises:
        AttributeError: The package has no such name. The returned function raises it.
    """
    home = {name: module for module, names in homes.items() for name in names.split()}

    def attribute(name: str) -> Any:
        if name not in home:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"flatcal_dist.{home[name]}"), name)
        setattr(sys.modules[package], name, value)
        return value

    return attribute
