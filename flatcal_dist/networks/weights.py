"""Weight files. They are written as safetensors, and only tensors are unpickled from them."""

import hashlib
import re
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from flatcal_dist.files import WriteError, write_atomically
from flatcal_dist.networks import weight_files
from flatcal_dist.networks.weight_files import Candidate, WeightsError

# torchvision publishes weights with these heads, which only the training of a network uses.
AUXILIARY_HEADS = ("aux1.", "aux2.", "AuxLogits.")


@dataclass(frozen=True)
class Taken:
    """Which weights of a file were loaded."""

    name: str = ""  # where they stand in the file; empty if it holds nothing else
    others: tuple[str, ...] = ()  # names of other weights of the network in the same file
    left_out: int = 0  # tensors of the file that are no weights of the network

    def __str__(self) -> str:
        parts = [f"weights taken: {self.name}"] if self.name and self.others else []
        if self.others:
            parts.append(f"also there: {', '.join(self.others)} (choose with --weights-key)")
        if self.left_out:
            parts.append(f"{self.left_out} tensors of the file are no weights of this network")
        return "; ".join(parts)


def save_weights(weights: dict[str, Tensor], path: Path) -> None:
    """Write weights and buffers by name as safetensors.

    The file appears whole or not at all. If names share a tensor, only the first of them is kept,
    because the format stores no tensor twice.
    """
    kept: dict[int, str] = {}
    for name, tensor in weights.items():
        kept.setdefault(tensor.data_ptr() or id(tensor), name)
    own = {name: weights[name].contiguous() for name in kept.values()}
    with write_atomically(path) as temporary:
        temporary.touch()  # safetensors would make the file private, unlike other new files
        mode = temporary.stat().st_mode
        try:
            save_file(own, str(temporary))
        except SafetensorError as error:
            raise WriteError(path, str(error)) from None
        temporary.chmod(mode)


def load_weights(module: nn.Module, path: Path, key: str | None = None) -> Taken:
    """Fill a network from a safetensors file or a PyTorch file.

    Nested dictionaries and the prefixes of wrappers (DistributedDataParallel, torch.compile, FSDP,
    AveragedModel, Lightning) are removed until the names are those of the network. Old files lack
    counts of batches (`num_batches_tracked`); then the network keeps its counts, as in torch.

    Args:
        module: The network.
        path: The file.
        key: Which of several weights to take, such as "state_dict_ema". By default the trained
            weights are taken, and not their average.

    Returns:
        Which weights were taken.

    Raises:
        WeightsError: The file cannot be read, its names or shapes do not fit, or several weights
            fit and `key` does not tell which to take.
    """
    path = Path(path)
    own = module.state_dict()
    found = weight_files.candidates(weight_files.read(path), own)
    if getattr(module, "aux_logits", None) is False:
        found = [_without_auxiliary_heads(one) for one in found]
    if not found:
        raise WeightsError(f"{path} holds no state_dict (names and tensors)")
    fitting = [one for one in found if not _problems(one.tensors, own)]
    whole = [one for one in fitting if _rest(one, fitting) <= max(1, len(one.tensors) / 2)]
    if not whole:
        nearest = max(found, key=lambda one: (_overlap(one, own), -len(one.tensors)))
        problems = _problems(nearest.tensors, own) or [
            f"with {nearest.left_out} tensors more than the network has"
        ]
        raise WeightsError(
            f"{path} does not hold the weights of this network: {'; '.join(problems)}"
            + _advice(nearest.tensors, own)
            + _of_shards(path)
        )
    taken = _choose(whole, key, path)
    module.load_state_dict(taken.tensors, strict=False)
    others = tuple(one.name for one in whole if one is not taken)
    return Taken(taken.name, others, _rest(taken, whole))


def _without_auxiliary_heads(one: Candidate) -> Candidate:
    kept = {n: t for n, t in one.tensors.items() if not n.startswith(AUXILIARY_HEADS)}
    return replace(one, tensors=kept)


def _problems(state: dict[str, Tensor], own: dict[str, Tensor]) -> list[str]:
    """Return how names and shapes differ from those of the network, or nothing if they fit."""
    # safetensors keeps one of several names that share a tensor: the others are filled with it.
    shared = {tensor.data_ptr() for name, tensor in own.items() if name in state and tensor.numel()}
    missing = [
        name
        for name, tensor in own.items()
        if name not in state
        and tensor.data_ptr() not in shared
        and not name.endswith("num_batches_tracked")
    ]
    strange = [name for name in state if name not in own]
    shapes = [
        f"{name} {list(state[name].shape)} instead of {list(own[name].shape)}"
        for name in state
        if name in own and state[name].shape != own[name].shape
    ]
    kinds = [
        f"{name} as {str(state[name].dtype).removeprefix('torch.')}, {_form(state[name])}"
        for name in state
        if name in own and not _readable(state[name], own[name])
    ]
    return [
        f"{what} {', '.join(names[:3])}"
        + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        + (f" (the network's names begin with {next(iter(own))})" if what == "with names" else "")
        for what, names in (
            ("without", missing),
            ("with names", strange),
            ("with", shapes),
            ("with", kinds),
        )
        if names
    ]


def _readable(tensor: Tensor, own: Tensor) -> bool:
    """Tell whether a tensor holds plain values, neither quantised nor sparse.

    For weights that are real numbers, the values have to be real numbers, too.
    """
    plain = tensor.layout == torch.strided and not tensor.is_meta and not tensor.is_quantized
    return plain and (tensor.is_floating_point() or not own.is_floating_point())


def _form(tensor: Tensor) -> str:
    if tensor.is_meta:
        return "without values"
    if tensor.layout != torch.strided:
        return str(tensor.layout).removeprefix("torch.")
    return "where the network has real numbers"


def _overlap(one: Candidate, own: dict[str, Tensor]) -> int:
    return sum(name in own for name in one.tensors)


def _rest(one: Candidate, fitting: list[Candidate]) -> int:
    """Return how many tensors beside a candidate are no weights of the network at all."""
    beside = [other for other in fitting if other is not one and other.of == one.of]
    return one.left_out - sum(len(other.tensors) for other in beside)


def _advice(state: dict[str, Tensor], own: dict[str, Tensor]) -> str:
    """Return advice for the case that only the number of classes differs, else an empty text."""
    if state.keys() - own.keys():
        return ""
    other = {name for name in state if state[name].shape != own[name].shape}
    rows = {
        (state[n].shape[:1], own[n].shape[:1]) for n in other if state[n].dim() and own[n].dim()
    }
    rest = all(state[n].shape[1:] == own[n].shape[1:] for n in other)
    if len(rows) != 1 or not rest:
        return ""
    ((theirs, ours),) = rows
    return (
        f". If these are its classes, the file has {theirs[0]} and the network {ours[0]}: say "
        f"--set model.num_classes={theirs[0]}"
    )


def _of_shards(path: Path) -> str:
    if re.search(r"-\d+-of-\d+\.safetensors$", path.name) is None:
        return ""
    return (
        f". It is one of several files: name their index, such as model{weight_files.INDEX}, "
        "beside them"
    )


def _choose(fitting: list[Candidate], key: str | None, path: Path) -> Candidate:
    names = [one.name for one in fitting]
    if key is not None:
        chosen = [one for one in fitting if key in (one.name, one.name.rpartition(".")[2])]
        if len(chosen) != 1:
            raise WeightsError(f"{path} has no weights {key!r} of this network: {', '.join(names)}")
        return chosen[0]
    trained = [one for one in fitting if not weight_files.is_average(one.name)]
    left = trained or fitting
    if len(left) > 1 and not all(_same(one, left[0]) for one in left[1:]):
        raise WeightsError(
            f"{path} holds several weights of this network, {', '.join(o.name for o in left)}: "
            "choose one with --weights-key"
        )
    return left[0]


def _same(one: Candidate, other: Candidate) -> bool:
    return one.tensors.keys() == other.tensors.keys() and all(
        torch.equal(tensor, other.tensors[name]) for name, tensor in one.tensors.items()
    )


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weights_hash(module: nn.Module) -> str:
    """Return the SHA-256 over names, types, shapes and values of all weights and buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\0".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
