"""Weight files: written as safetensors, read without ever unpickling more than tensors."""

import hashlib
import pickle
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from flatcal_dist.files import write_atomically

WRAPPERS = ("module.", "_orig_mod.")  # DistributedDataParallel's and torch.compile's
NESTED = ("state_dict", "model")  # where training scripts keep the weights

# Of torchvision's networks: published with them, and of use in their own training alone.
AUXILIARY_HEADS = ("aux1.", "aux2.", "AuxLogits.")


class WeightsError(ValueError):
    """A weight file that cannot be read, or is not of this network."""


def save_weights(weights: dict[str, Tensor], path: Path) -> None:
    """Weights and buffers by name, as safetensors; appears whole or not at all.

    Of names that share a tensor the first is kept, as the format wants it.
    """
    kept: dict[int, str] = {}
    for name, tensor in weights.items():
        kept.setdefault(tensor.data_ptr() or id(tensor), name)
    own = {name: weights[name].contiguous() for name in kept.values()}
    with write_atomically(path) as temporary:
        temporary.touch()  # with the permissions of any new file: safetensors' own are private
        mode = temporary.stat().st_mode
        save_file(own, str(temporary))
        temporary.chmod(mode)


def load_weights(module: nn.Module, path: Path) -> None:
    """Fill a network from a safetensors file, or a PyTorch file that holds nothing but tensors.

    Raises WeightsError for a file that cannot be read, or whose names or shapes differ.
    """
    state = {_own_name(name): tensor for name, tensor in _read(path).items()}
    own = module.state_dict()
    if getattr(module, "aux_logits", None) is False:
        state = {n: t for n, t in state.items() if not n.startswith(AUXILIARY_HEADS)}
    # safetensors keeps one of several names that share a tensor: the others are filled with it.
    shared = {tensor.data_ptr(): state[name] for name, tensor in own.items() if name in state}
    missing = [n for n, t in own.items() if n not in state and t.data_ptr() not in shared]
    strange = [name for name in state if name not in own]
    shapes = [
        f"{name} {list(state[name].shape)} instead of {list(own[name].shape)}"
        for name in state
        if name in own and state[name].shape != own[name].shape
    ]
    problems = [
        f"{what} {', '.join(names[:3])}{' and more' * (len(names) > 3)}"
        for what, names in (("without", missing), ("with", strange), ("with", shapes))
        if names
    ]
    if problems:
        raise WeightsError(
            f"{path} does not hold the weights of this network: {'; '.join(problems)}"
        )
    module.load_state_dict(state, strict=False)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weights_hash(module: nn.Module) -> str:
    """SHA-256 over names, types, shapes and values of all weights and buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\0".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _read(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise WeightsError(
            f"{path} holds more than tensors, and unpickling it would run its code; save its "
            "state_dict alone, or as safetensors"
        ) from None
    except (OSError, EOFError, RuntimeError, SafetensorError) as error:
        raise WeightsError(f"cannot read the weights {path}: {error}") from None
    for key in NESTED:
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
        raise WeightsError(f"{path} holds no state_dict (names and tensors)")
    return state


def _own_name(name: str) -> str:
    for prefix in WRAPPERS:
        name = name.removeprefix(prefix)
    return name
