"""Keys that belong to another choice of a section are refused or set aside.

    inherits: csam.yaml            # sharpness: {rule: csam, rho: 0.1, gamma: 2}
    sharpness: {rule: sam}         # rho stays, gamma is CSAM's and is set aside
    sharpness: {rule: wsam}        # gamma is set aside, too: WSAM's is another one

A file that others inherit may hold the keys of the choice that it makes. A key that is given
together with the choice, or after it, was meant to be read. If it is not read, it is refused.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, get_args

from pydantic import BaseModel

from flatcal_dist.config.files import Layers, shown
from flatcal_dist.config.root import Config
from flatcal_dist.errors import ConfigError


@dataclass(frozen=True)
class Chooser:
    """A section with a choice: the key that makes it, its default, and the keys of each choice."""

    section: str
    by: str
    default: str
    sections: dict[str, type[BaseModel]]

    @property
    def key(self) -> str:
        return f"{self.section}.{self.by}"

    def owners(self, key: str) -> list[str]:
        """Return the choices that have this key."""
        return [name for name, section in self.sections.items() if key in section.model_fields]

    def means_another(self, key: str, before: str, now: str) -> bool:
        """Return whether a key of two choices has two meanings: each declares it by itself."""
        owners = [_declared_by(self.sections.get(name), key) for name in (before, now)]
        return None not in owners and owners[0] is not owners[1]

    def where(self, key: str) -> str:
        """Return in words where a key belongs that the present choice does not have."""
        owners = self.owners(key)
        shared = len(owners) == len([name for name in self.sections if name != "none"])
        if shared and len(owners) > 1:
            return f"{self.key} other than none"
        return f"{self.key}={' or '.join(owners)}"


def _declared_by(section: type[BaseModel] | None, key: str) -> type | None:
    """Return the class that declares a key for all that derive from it, or None without one."""
    choice = getattr(section, "choice", None)
    classes = choice.__mro__ if choice is not None else ()
    return next(
        (cls for cls in reversed(classes) if key in vars(cls).get("__annotations__", ())), None
    )


def _choosers() -> dict[str, Chooser]:
    found, default = {}, Config()
    for name, field in Config.model_fields.items():
        if isinstance(field.discriminator, str):
            by = field.discriminator
            sections = {one.model_fields[by].default: one for one in get_args(field.annotation)}
            found[name] = Chooser(name, by, getattr(getattr(default, name), by), sections)
    return found


CHOOSERS = _choosers()


def keys() -> Iterator[str]:
    """Yield every dotted key once, also those of all choices."""
    for name in Config.model_fields:
        for key in dict.fromkeys(key for one in sections_of(name) for key in one.model_fields):
            yield f"{name}.{key}"


def sections_of(name: str) -> list[type[BaseModel]]:
    """Return the models of a section: one for each choice, or the only one."""
    if name in CHOOSERS:
        return list(CHOOSERS[name].sections.values())
    section = Config.model_fields[name].annotation
    assert isinstance(section, type)
    assert issubclass(section, BaseModel)
    return [section]


def unknown(values: dict[str, Any]) -> list[str]:
    """Return the sections and keys that no choice has."""
    known = set(keys())
    sections = [name for name in values if name not in Config.model_fields]
    return sections + [
        f"{name}.{key}"
        for name, section in values.items()
        if name not in sections and isinstance(section, dict)
        for key in section
        if f"{name}.{key}" not in known
    ]


def unread(config: Config) -> dict[str, Chooser]:
    """Return the keys of choices that were not made, each with its section's chooser."""
    found: dict[str, Chooser] = {}
    for chooser in CHOOSERS.values():
        own = type(getattr(config, chooser.section)).model_fields
        for section in chooser.sections.values():
            found |= {f"{chooser.section}.{key}": chooser for key in section.model_fields
                      if key not in own}  # fmt: skip
    return found


def set_aside(layers: Layers, recorded: bool) -> None:
    """Take keys of other choices out of `layers.values`, and fill in the default choice.

    Args:
        layers: Values and where they were written.
        recorded: Whether they are those of a run that has begun: nothing is refused then.

    Raises:
        ConfigError: Such a key was given together with the choice or after it.
    """
    refused = []
    for chooser in CHOOSERS.values():
        values = layers.values.get(chooser.section)
        if values == {} or (values is None and chooser.section not in layers.values):
            layers.values[chooser.section] = {chooser.by: chooser.default}
        elif isinstance(values, dict):
            chosen = values.setdefault(chooser.by, chooser.default)
            if isinstance(chosen, str) and chosen in chooser.sections:
                refused += _other_keys(chooser, chosen, values, layers, recorded)
                _forget_namesakes(chooser, chosen, values, layers)
    if refused:
        raise ConfigError("\n".join(refused))


def _forget_namesakes(
    chooser: Chooser, chosen: str, values: dict[str, Any], layers: Layers
) -> None:
    """Remove inherited values of keys that have the same name in an earlier choice, by chance."""
    made = layers.origin.get(chooser.key)
    for key in list(values):
        origin = layers.origin.get(f"{chooser.section}.{key}")
        if made is None or origin is None or origin.layer >= made.layer:
            continue
        before = layers.at(chooser.key, origin.layer, chooser.default)
        if isinstance(before, str) and chooser.means_another(key, before, chosen):
            del values[key]


def _other_keys(
    chooser: Chooser, chosen: str, values: dict[str, Any], layers: Layers, recorded: bool
) -> list[str]:
    """Remove the keys of other choices from `values`. Return what is wrong with intended ones."""
    refused = []
    made = layers.origin.get(chooser.key)
    for key in [k for k in values if k not in chooser.sections[chosen].model_fields]:
        origin = layers.origin_of(f"{chooser.section}.{key}")
        if not chooser.owners(key):
            continue  # there is no such key: validation says so
        value = values.pop(key)
        if recorded or (origin and made and origin.layer < made.layer):
            continue
        refused.append(
            f"{chooser.section}.{key} = {shown(value)} ({origin}) belongs to "
            f"{chooser.where(key)}, and {chooser.key} is {chosen}: leave it out, or choose what "
            "reads it"
        )
    return refused
