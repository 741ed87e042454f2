"""Checkpoints as whole tensors by parameter name, for export and for other engines and rank counts.

The part of each rank says where it lies in the whole (`arrangement`), so that any process can put
the whole together from the files alone. Optimizer state can be cut for other ranks if it has the
shape of the parameter (momentum, the moments of Adam) or is one number for the whole parameter.
Other state is refused.
"""

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flatcal_dist import config as configuration
from flatcal_dist.averaging.average import Average
from flatcal_dist.averaging.norm_statistics import has_statistics
from flatcal_dist.checkpoints import format as checkpoint
from flatcal_dist.checkpoints.format import CheckpointError, Progress
from flatcal_dist.networks.registry import build
from flatcal_dist.networks.weights import save_weights
from flatcal_dist.ranks.distributed import on_all_ranks
from flatcal_dist.runs.directory import RunDirectory
from flatcal_dist.sharpness import SharpnessAwareStep
from flatcal_dist.sharpness.passes.buffers import set_buffers

Pieces = dict[str, list]


@dataclass
class Whole:
    """The state of all ranks by parameter name, on the CPU.

    `rest` holds buffers, and weights that are not trained.
    """

    shapes: dict[str, list[int]] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)
    rest: dict[str, Tensor] = field(default_factory=dict)
    optimizer: dict[str, dict[str, Any]] = field(default_factory=dict)
    groups: list[dict] = field(default_factory=list)
    loss_scale: float = 1.0
    memory: dict[str, Tensor] | None = None
    average: dict[str, Tensor] | None = None
    average_statistics: dict[str, Tensor] | None = None
    average_count: int = 0
    objective: dict[str, Tensor] | None = None  # whole on every rank

    def put(self, into: dict[str, Any], key: str, name: str, part: Tensor, start: int) -> None:
        """Copy one rank's part into the whole tensor into[key], which is created if need be.

        Args:
            into: Whole tensors by key.
            key: The key of the tensor to fill.
            name: The parameter whose shape the whole tensor has.
            part: The part, which is flattened.
            start: Where the part begins in the flattened whole.
        """
        if key not in into:
            into[key] = torch.zeros(self.shapes[name], dtype=part.dtype)
        into[key].view(-1)[start : start + part.numel()] = part.reshape(-1)


def assemble(path: Path, optimizer: bool = True) -> Whole:
    """Return the whole of a verified checkpoint, with the optimizer's state if `optimizer`.

    Raises CheckpointError for parts that cannot be put together.
    """
    progress = checkpoint.load_progress(path)
    whole = Whole()
    for rank in range(progress.parts):
        part = checkpoint.load_part(path, rank)
        pieces, slots = part["arrangement"]["pieces"], part["arrangement"]["slots"]
        whole.shapes |= {name: shape for name, (shape, _, _) in pieces.items()}
        for name, tensor in _weights(part["engine"], slots, pieces).items():
            whole.put(whole.weights, name, name, tensor, pieces[name][1])
        for key in ("memory", "average"):
            if part[key] is not None:
                parts = getattr(whole, key) or {}
                for name, tensor in part[key].items():
                    whole.put(parts, name, name, tensor, pieces[name][1])
                setattr(whole, key, parts)
        if optimizer:
            _add_optimizer(whole, part["engine"]["optimizer"], slots, pieces, progress)
        if rank == 0:
            whole.rest = _rest(part["engine"], pieces)
            whole.average_statistics = part.get("average_statistics")
            whole.average_count = part.get("average_count", 1)  # older ones: EMA alone
            whole.objective = part.get("objective")
            whole.loss_scale = part["arrangement"]["loss_scale"]
            whole.groups = part["engine"]["optimizer"]["param_groups"]
    return whole


def load(
    path: Path, step: SharpnessAwareStep, progress: Progress, average: Average | None = None
) -> None:
    """Fill step and average from a checkpoint of any engine and number of ranks. All ranks call it.

    Args:
        path: The verified checkpoint.
        step: The step to fill.
        progress: The progress of the checkpoint.
        average: The average to fill, if there is one.

    Raises:
        FailedTogether: Something cannot be cut for these ranks; the message names it.
    """
    engine = step.engine
    arrangement, masters = engine.arrangement(), engine.masters()
    pieces = arrangement["pieces"]

    def read() -> tuple[Whole, dict[int, dict[str, Any]]]:
        whole = assemble(path)
        _refuse_other_network(whole, pieces)
        checkpoint.fill_objective(step, whole.objective, path)
        return whole, _optimizer_state(whole, arrangement, progress)

    whole, optimizer = on_all_ranks(read)  # it may fail, so it comes before any collective
    with torch.no_grad():
        for name, master in masters.items():
            master.copy_(_cut(whole.weights[name], pieces[name]).view(master.shape))
        set_buffers(engine.named, whole.rest, engine.device)
    engine.load_optimizer(optimizer, whole.groups)
    engine.set_loss_scale(whole.loss_scale)
    engine.rewritten()
    step.memory = whole.memory and {
        name: _cut(memory, pieces[name]).view(masters[name].shape).to(engine.device, copy=True)
        for name, memory in whole.memory.items()
        if name in pieces
    }
    if average:
        saved = whole.average or {}
        cut = {n: _cut(saved[n], piece) for n, piece in pieces.items()}
        average.load(cut, whole.average_statistics, whole.average_count)


def _refuse_other_network(whole: Whole, pieces: Pieces) -> None:
    for name, (shape, _, _) in pieces.items():
        if whole.shapes.get(name) != shape:
            raise CheckpointError(
                f"the checkpoint has {name} of shape {whole.shapes.get(name)}, the network {shape}"
            )


def export(run: Path, file: Path, step: int | None = None) -> Path:
    """Write the weights of a checkpoint as safetensors, or their average if the run keeps one.

    Args:
        run: The run directory.
        file: The file to write.
        step: The step of the checkpoint. Default: the newest whole one.

    Returns:
        The checkpoint.

    Raises:
        CheckpointError: There is no such checkpoint.
        ValueError: The file has another ending.
    """
    if file.suffix != ".safetensors":
        raise ValueError(f"{file}: name it .safetensors, by which timm knows how to read it")
    directory = RunDirectory(run)
    if step is None:
        path, problems = checkpoint.newest(directory.checkpoints)
        if path is None:
            why = f": {problems[0]}" if problems else ""
            raise CheckpointError(f"{directory.checkpoints} holds no whole checkpoint{why}")
    else:
        path = directory.checkpoints / f"step_{step:08d}"
        if not path.is_dir():
            there = ", ".join(map(str, checkpoint.found(directory.checkpoints))) or "none"
            raise CheckpointError(f"{path} is not there; checkpoints of {run}: {there}")
        checkpoint.verify(path)
    config = configuration.load(directory.config_file, recorded=True)
    model, data = config.model, config.data
    network = build(model.name, model.num_classes, data.channels, data.image_size, model.options)
    fill_network(network, path)
    weights = network.state_dict()
    save_weights({n: t.float() if t.is_floating_point() else t for n, t in weights.items()}, file)
    return path


def fill_network(network: nn.Module, path: Path) -> None:
    """Fill a plain network from a verified checkpoint, with the average if there is one.

    The average comes with the running statistics that belong to it. Raises CheckpointError if the
    checkpoint is of another network, or holds an average without these statistics.
    """
    whole = assemble(path, optimizer=False)
    if whole.average_count == 0:  # nothing was averaged yet
        whole.average = whole.average_statistics = None
    if whole.average is not None and whole.average_statistics is None and has_statistics(network):
        raise CheckpointError(
            f"{path} holds an average of the weights without the running statistics of batch norm "
            "that belong to it: an older version wrote it. Start the run again with the same "
            "command, and use the next checkpoint that it writes"
        )
    found = whole.rest | whole.weights | (whole.average or {}) | (whole.average_statistics or {})
    own = network.state_dict()
    # If several names share a tensor, only one of them was saved.
    filled = {t.data_ptr() for name, t in own.items() if name in found}
    for name, tensor in own.items():
        saved = found.get(name)
        if (saved is None and tensor.data_ptr() not in filled) or (
            saved is not None and saved.shape != tensor.shape
        ):
            holds = "nothing" if saved is None else list(saved.shape)
            raise CheckpointError(f"{path} holds {holds} for {name} of {list(tensor.shape)}")
    network.load_state_dict(found, strict=False)


def _cut(whole: Tensor, piece: list) -> Tensor:
    _, start, length = piece
    return whole.reshape(-1)[start : start + length]


def _weights(engine: dict[str, Any], slots: list, pieces: Pieces) -> dict[str, Tensor]:
    """Return the parts of a rank by name, from the local state of any engine."""
    if "masters" not in engine:
        return {name: engine["weights"][name] for name in pieces}
    return {  # ZeRO has flat tensors, each of several parameters
        name: flat.reshape(-1)[offset : offset + length]
        for flat, (_, held) in zip(engine["masters"], slots, strict=True)
        for name, offset, length in held
    }


def _rest(engine: dict[str, Any], pieces: Pieces) -> dict[str, Tensor]:
    if "buffers" in engine:
        return engine["buffers"] | engine.get("frozen", {})
    return {name: tensor for name, tensor in engine["weights"].items() if name not in pieces}


def _add_optimizer(
    whole: Whole, optimizer: dict[str, Any], slots: list, pieces: Pieces, progress: Progress
) -> None:
    """Add the optimizer state of a rank: whole tensors, or one value, for each parameter."""
    for index, (shape, held) in enumerate(slots):
        for key, value in _plain_state(optimizer["state"].get(index, {})).items():
            for name, offset, length in held:
                state = whole.optimizer.setdefault(name, {})
                if not isinstance(value, Tensor) or value.dim() == 0:
                    state.setdefault(key, value)
                elif list(value.shape) == shape:
                    part = value.reshape(-1)[offset : offset + length]
                    whole.put(state, key, name, part, pieces[name][1])
                else:
                    raise CheckpointError(
                        f"the optimizer keeps {key!r} of {name} as {list(value.shape)} for a part "
                        f"of {shape}, which cannot be cut for others: go on with "
                        f"{progress.world_size} ranks of {progress.engine}"
                    )


def _plain_state(state: dict[str, Any]) -> dict[str, Any]:
    """Return the state of one index. FSDP2 stores what is sharded apart from the rest."""
    if state.keys() != {"sharded", "rest"}:
        return state
    return state["rest"] | {key: value["local"] for key, value in state["sharded"].items()}


def _optimizer_state(
    whole: Whole, arrangement: dict[str, Any], progress: Progress
) -> dict[int, dict[str, Any]]:
    """Return the state by index of the optimizer of this rank, in the shapes of its arrangement."""
    states = {}
    for index, (shape, held) in enumerate(arrangement["slots"]):
        state: dict[str, Any] = {}
        for name, offset, length in held:
            for key, value in whole.optimizer.get(name, {}).items():
                if isinstance(value, Tensor) and list(value.shape) == whole.shapes[name] != []:
                    # A parameter that never had a gradient has no state, which is zero.
                    flat = state.setdefault(key, torch.zeros(shape, dtype=value.dtype)).view(-1)
                    flat[offset : offset + length] = _cut(value, arrangement["pieces"][name])
                elif state.setdefault(key, copy.deepcopy(value)) != value:
                    raise CheckpointError(
                        f"the optimizer's {key!r} differs between parameters ({name}: {value}) "
                        "that this engine keeps as one: go on with "
                        f"{progress.world_size} ranks of {progress.engine}"
                    )
        if state:
            states[index] = state
    return states
