"""Reading pickles of arrays from strangers. Nothing that they name is imported or called.

A pickle may call any function of Python, so it is a program. Some data sets are published as
pickles all the same. The reader here knows what stands in those that hold arrays, numbers, text,
lists and dictionaries. It puts values of its own in the places of numpy's arrays and types. Every
other name is refused.
"""

import io
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np

from flatcal_dist.data.errors import DataError

TYPES = ("u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f4", "f8", "b1")


class _Refused(Exception):
    """A pickle names something that is not needed for arrays."""


class _Array:
    """What a pickle says about an array."""

    state: tuple = ()

    def __setstate__(self, state: tuple) -> None:
        self.state = state

    def array(self) -> np.ndarray:
        _, shape, kind, by_columns, data = self.state
        dtype = kind.dtype()
        data = data.encode("latin1") if isinstance(data, str) else data
        if not isinstance(data, bytes):
            raise _Refused(f"an array of values in a {type(data).__name__}")
        values = np.frombuffer(data, dtype)
        return values.reshape(shape, order="F" if by_columns else "C")


class _Type:
    """What a pickle says about the type of the values of an array."""

    order = "|"

    def __init__(self, code: str | bytes) -> None:
        self.code = code.decode("latin1") if isinstance(code, bytes) else code

    def __setstate__(self, state: tuple) -> None:
        order = state[1]
        self.order = order.decode("latin1") if isinstance(order, bytes) else order

    def dtype(self) -> np.dtype:
        if self.code not in TYPES or self.order not in ("|", "<", ">", "="):
            raise _Refused(f"an array of {self.code!r}")
        return np.dtype(f"{self.order}{self.code}")


class _Maker:
    """Stands for a function. A pickle can call it, and cannot change it."""

    def __init__(self, make: Callable[..., Any]) -> None:
        self._make = make

    def __call__(self, *arguments: Any) -> Any:
        return self._make(*arguments)

    def __setstate__(self, state: Any) -> None:
        raise _Refused("a change of a function")


_ARRAY = _Maker(lambda *_: _Array())
_KNOWN = {
    **{
        (f"numpy.{core}.multiarray", "_reconstruct"): _Maker(lambda *_: _Array())
        for core in ("core", "_core")
    },
    ("numpy", "ndarray"): _ARRAY,
    ("numpy", "dtype"): _Maker(lambda code, *_: _Type(code)),
    # Python 3 writes bytes in this way, where Python 2 shall be able to read them.
    ("_codecs", "encode"): _Maker(lambda text, _: str(text).encode("latin1")),
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _KNOWN:
            raise _Refused(f"{module}.{name}"[:200])
        return _KNOWN[module, name]

    def persistent_load(self, pid: Any) -> Any:
        raise _Refused("a reference to something outside of the file")


def read_pickle(data: bytes, name: str, place: int = 0) -> dict[str, Any]:
    """Return a pickled dictionary with names as keys. Arrays in it are numpy arrays.

    Text of Python 2 is bytes, except for the keys.

    Args:
        data: The pickle.
        name: What errors call it.
        place: How many other pickles stand before it in the file.

    Raises:
        DataError: The bytes are no whole pickle, hold no dictionary, or name anything but arrays.
    """
    try:
        file = io.BytesIO(data)
        for _ in range(place):
            _Unpickler(file, encoding="bytes").load()
        found = _Unpickler(file, encoding="bytes").load()
        if not isinstance(found, dict):
            kind = "list" if isinstance(found, list) else "value that is no dictionary"
            raise ValueError(f"it holds a {kind}, expected names with values")
        return {_text(key): _value(value) for key, value in found.items()}
    except _Refused as error:
        raise DataError(
            f"{name} is a pickle that asks for {error}, and only arrays, numbers, text, lists and "
            "dictionaries are read from a pickle: others may run any program. It is not the file "
            "that was published. Delete it and download it again."
        ) from None
    except Exception as error:  # a damaged pickle raises nearly anything
        raise DataError(
            f"{name} cannot be read ({type(error).__name__}: {error}): it is damaged or cut short. "
            "Download it again."
        ) from None


def _text(key: Any) -> str:
    return key.decode("latin1") if isinstance(key, bytes) else str(key)


def _value(value: Any) -> Any:
    return value.array() if isinstance(value, _Array) else value
