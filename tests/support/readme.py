"""The examples of a README, run as they stand there."""

import re
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).parents[2] / "flatcal_dist"


def example_class(package: str, name: str) -> type[Any]:
    """Return a class that an example in a package's README defines."""
    text = (PACKAGE / package / "README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    [block] = [block for block in blocks if f"class {name}(" in block]
    names: dict[str, Any] = {"__name__": f"readme_of_{package}"}
    exec(block, names)
    return names[name]
