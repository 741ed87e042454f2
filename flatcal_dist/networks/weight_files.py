"""The contents of weight files: nested dictionaries of tensors, also under wrappers.

From pickled files only tensors, plain containers and the classes of `ALLOWED` are read.
"""

import argparse
import json
import pickle
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

# The train.py of timm keeps its options in a Namespace beside the weights.
ALLOWED = (argparse.Namespace,)
# Components that torch.compile, FSDP and activation checkpointing put into names.
INNER = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
NO_WEIGHTS = {"optimizer", "optimizers", "optim", "opt_state", "optimizer_states", "grads"}
AVERAGES = {"ema", "swa", "avg", "average", "averaged", "shadow", "polyak"}
INDEX = ".safetensors.index.json"  # Hugging Face writes it for weights in several files
DEEPEST = 6  # nested dictionaries, or components in front of the names of the network


class WeightsError(ValueError):
    """A weight file cannot be read, or does not fit the network."""


@dataclass(frozen=True)
class Candidate:
    """Tensors that may be the weights of a network.

    Attributes:
        name: The keys of the dictionaries around the tensors. The component in front of their names
            follows, if other components stand beside it.
        tensors: The tensors by name.
        of: The name of the dictionary that holds them.
        left_out: The number of tensors of that dictionary that are not among these.
    """

    name: str
    tensors: dict[str, Tensor]
    of: str
    left_out: int = 0


def read(path: Path) -> Any:
    """Return what a file of safetensors or of torch.save holds.

    Raises WeightsError if the file cannot be read, or holds more than tensors.
    """
    try:
        if path.name.endswith(INDEX):
            return _shards(path)
        if _is_safetensors(path):
            return load_file(path)
        with torch.serialization.safe_globals(list(ALLOWED)), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # warnings about pickle protocols
            return torch.load(path, map_location="cpu", weights_only=True)
    except WeightsError:
        raise
    except pickle.UnpicklingError:
        raise WeightsError(_not_tensors(path)) from None
    except (OSError, EOFError, SafetensorError) as error:
        raise WeightsError(f"cannot read the weights {path}: {_line(error)}") from None
    except Exception as error:  # for damaged bytes the unpickler raises nearly anything
        script = "TorchScript" in str(error)
        reason = "it is a TorchScript archive: save its state_dict" if script else _line(error)
        raise WeightsError(f"cannot read the weights {path}: {reason}") from None


def _is_safetensors(path: Path) -> bool:
    """Recognise safetensors by the name, or by a header of JSON after its length."""
    if path.suffix == ".safetensors":
        return True
    with path.open("rb") as file:
        start = file.read(9)
    size = path.stat().st_size
    return len(start) == 9 and start[8:] == b"{" and int.from_bytes(start[:8], "little") < size


def _shards(path: Path) -> dict[str, Tensor]:
    """Return the tensors of all files that an index of safetensors names; they lie beside it."""
    stored = json.loads(path.read_text())
    shard_of = stored.get("weight_map") if isinstance(stored, dict) else None
    if not isinstance(shard_of, dict) or not all(isinstance(n, str) for n in shard_of.values()):
        raise WeightsError(
            f"{path} is no index of safetensors: expected a weight_map of file names"
        )
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(shard_of.values())):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise WeightsError(f"{path} names {name!r}, which is no file of safetensors beside it")
        tensors |= load_file(path.parent / name)
    missing = sorted(shard_of.keys() - tensors.keys())
    if missing:
        raise WeightsError(f"the files that {path} names do not hold {', '.join(missing[:3])}")
    return tensors


def _line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    if not lines or "weights_only" in str(error):
        return "it is damaged, or no file of weights"
    return lines[0]


def _not_tensors(path: Path) -> str:
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # it reads a file that was found to be unreadable
        names = []
    with path.open("rb") as file:
        start = file.read(2)
    if start != b"PK" and start[:1] != b"\x80":  # neither torch's archive nor a pickle
        return (
            f"cannot read the weights {path}: it begins with {start!r} and is neither safetensors "
            "nor a file that torch.save wrote"
        )
    strange = [name for name in names if name != "argparse.Namespace"]
    what = f" ({', '.join(strange[:3])})" if strange else ""
    return (
        f"{path} holds more than tensors{what}, and unpickling it would run its code; save its "
        "state_dict alone, or as safetensors"
    )


def candidates(stored: Any, own: dict[str, Tensor]) -> list[Candidate]:
    """Return everything that may be the weights of a network, the outermost first.

    `stored` is the content of a file, and `own` is the state_dict of the network.
    """
    least = max(1, len([n for n in own if not n.endswith("num_batches_tracked")]) // 2)
    found: list[Candidate] = []
    for name, tensors in _dictionaries(stored, "", 0):
        found += _unwrapped(Candidate(name, _without_inner(tensors), name), own, least, 0)
    return found


def _dictionaries(stored: Any, name: str, depth: int) -> Iterator[tuple[str, dict[str, Tensor]]]:
    if not isinstance(stored, dict) or depth > DEEPEST:
        return
    tensors = {k: v for k, v in stored.items() if isinstance(k, str) and isinstance(v, Tensor)}
    if tensors:
        yield name, tensors
    for key, value in stored.items():
        if isinstance(key, str) and key.lower() not in NO_WEIGHTS:
            yield from _dictionaries(value, f"{name}.{key}" if name else key, depth + 1)


def _without_inner(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    cut = {
        ".".join(part for part in name.split(".") if part not in INNER): tensor
        for name, tensor in tensors.items()
    }
    return cut if len(cut) == len(tensors) else tensors


def _unwrapped(
    one: Candidate, own: dict[str, Tensor], least: int, depth: int
) -> Iterator[Candidate]:
    """Yield the candidate, and candidates without the first component of their names.

    Each of the latter holds the tensors that have this component in common.

    Args:
        one: The candidate.
        own: The state_dict of the network.
        least: The least number of tensors of a candidate.
        depth: How many components have been removed.
    """
    yield one
    if depth > DEEPEST or one.tensors.keys() == own.keys():
        return
    groups: dict[str, dict[str, Tensor]] = {}
    for name, tensor in one.tensors.items():
        first, dot, rest = name.partition(".")
        if dot:
            groups.setdefault(first, {})[rest] = tensor
    for first, tensors in groups.items():
        if len(tensors) < least:
            continue
        left = len(one.tensors) - len(tensors)
        alone = left == 0 or len([g for g in groups.values() if len(g) >= least]) == 1
        name = one.name if alone else f"{one.name}.{first}".lstrip(".")
        inner = replace(one, name=name, tensors=tensors, left_out=one.left_out + left)
        yield from _unwrapped(inner, own, least, depth + 1)


def is_average(name: str) -> bool:
    """Tell whether a name is usual for averaged weights, such as "state_dict_ema"."""
    return bool(AVERAGES & set(re.split(r"[._\-]", name.lower())))
