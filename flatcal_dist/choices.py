"""What a configuration can choose by name: rules, objectives, averages, mixing, schedules.

A choice is a frozen dataclass with a `name`. Its fields are the keys that stand beside the name in
the configuration, each with its type, bounds, default and meaning:

    @dataclass(frozen=True)
    class CSAM(SAM):
        name: ClassVar[str] = "csam"
        gamma: Annotated[float, Field(ge=0, le=2, description="The exponent of ...")] = 1.0

So a key is declared once, beside the code that reads it. A new choice is a new file in the package
of its kind. `found_in` finds it there, and no other place has to name it.
"""

import importlib
import pkgutil
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields
from typing import Any, TypeVar, get_type_hints

from pydantic import BaseModel, ConfigDict, ValidationError, create_model
from pydantic import Field as Key

T = TypeVar("T")
Keys = dict[str, Any]  # a pair of annotation and default by name, for create_model


def found_in(package: str, base: type[T]) -> dict[str, type[T]]:
    """Return the classes in a package that set `name`, by this name.

    Args:
        package: The dotted name of a package, or of one module.
        base: The class that all of them derive from.

    Raises:
        TypeError: Two classes have one name.
    """
    module = importlib.import_module(package)
    for info in pkgutil.iter_modules(getattr(module, "__path__", [])):
        importlib.import_module(f"{package}.{info.name}")
    found: dict[str, type[T]] = {}
    for cls in _derived(base):
        own = cls.__module__ == package or cls.__module__.startswith(f"{package}.")
        name = vars(cls).get("name") if own else None
        if isinstance(name, str) and found.setdefault(name, cls) is not cls:
            raise TypeError(f"{cls} and {found[name]} are both called {name}")
    return dict(sorted(found.items()))


def _derived(base: type[T]) -> Iterator[type[T]]:
    for cls in base.__subclasses__():
        yield cls
        yield from _derived(cls)


def keys_of(choice: type) -> Keys:
    """Return annotation and default of every field of a choice, as pydantic takes them."""
    hints = get_type_hints(choice, include_extras=True)
    return {one.name: (hints[one.name], _default(one)) for one in fields(choice) if one.init}


def _default(field: Field) -> Any:
    if field.default_factory is not MISSING:
        return Key(default_factory=field.default_factory)
    return ... if field.default is MISSING else field.default


def check(choice: object, error: type[Exception] = ValueError) -> None:
    """Raise `error` for the first field whose value does not fit its declared type and bounds."""
    kind: type = type(choice)
    model = _model(kind)
    try:
        model.model_validate({name: getattr(choice, name) for name in model.model_fields})
    except ValidationError as problems:
        problem = problems.errors()[0]
        raise error(
            f"{type(choice).__name__}: {problem['loc'][0]} = {problem['input']!r}: "
            f"{problem['msg'].lower()}"
        ) from None


_MODELS: dict[type, type[BaseModel]] = {}


def _model(choice: type) -> type[BaseModel]:
    """Return the pydantic model of a choice, which is made once."""
    if choice not in _MODELS:
        _MODELS[choice] = _made(choice)
    return _MODELS[choice]


def _made(choice: type) -> type[BaseModel]:
    config = ConfigDict(strict=True, allow_inf_nan=False, arbitrary_types_allowed=True)
    keys: dict[str, Any] = {**keys_of(choice)}
    return create_model(choice.__name__, __config__=config, **keys)
