"""How long training stands still for a checkpoint: ours, accelerate's save_state, torch.save.

    python benchmarks/checkpoint.py
    accelerate launch --config_file configs/accelerate/cpu_ddp.yaml benchmarks/checkpoint.py

All save the same state (weights, momentum) of the same network into the same place, in random order
within a round. Ours is measured twice: until training goes on, and until the checkpoint is durable
(synced, hashed, renamed).
torch.save alone does not sync, hash or rename, nor does save_state.
"""

import argparse
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import timm
import torch

from flatcal_dist.checkpoints import format as checkpoint
from flatcal_dist.checkpoints.format import Progress
from flatcal_dist.checkpoints.saving import Saver
from flatcal_dist.ranks.distributed import start
from flatcal_dist.sharpness import ReplicatedEngine, SharpnessAwareStep


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--network", default="resnet50")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--directory", type=Path, help="where to write; by default a temporary one")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    accelerator = start("ddp", "fp32")
    network = timm.create_model(arguments.network)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    for weight in network.parameters():
        weight.grad = torch.zeros_like(weight)
    model, prepared = accelerator.prepare(network, optimizer)
    optimizer.step()  # momentum is there
    step = SharpnessAwareStep(ReplicatedEngine(model, optimizer), None)
    megabytes = 2 * sum(w.numel() for w in network.parameters()) * 4 / 1e6
    with tempfile.TemporaryDirectory(dir=arguments.directory) as folder:
        rows = measure(accelerator, step, prepared, Path(folder), arguments.rounds)
    if not accelerator.is_main_process:
        return
    device = accelerator.device
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"{os.cpu_count()} CPU cores"
    print(f"{arguments.network}, {megabytes:.0f} MB of state, {where}")
    for name, row in rows.items():
        low, high = row["quartiles"]
        print(f"  {name:<36} {row['milliseconds']:8.1f} ms  ({low:.1f} to {high:.1f})")
    if arguments.json:
        outcome = {
            "network": arguments.network,
            "megabytes": megabytes,
            "where": where,
            "world_size": accelerator.num_processes,
            "torch": torch.__version__,
            "rounds": arguments.rounds,
            "rows": rows,
        }
        arguments.json.write_text(json.dumps(outcome, indent=1) + "\n")


def measure(accelerator, step, prepared, folder: Path, rounds: int) -> dict[str, dict]:
    """Medians and quartiles in milliseconds, by contender."""
    main = accelerator.is_main_process
    saver = Saver(folder, accelerator.process_index, accelerator.num_processes, keep=1)
    taken = iter(range(1, 10**6))

    def ours() -> None:
        progress = Progress(next(taken), None, "ddp", accelerator.num_processes, False, 0.0)
        saver.start(checkpoint.state_of(step), progress)

    def plain() -> None:
        if main:
            engine = step.engine
            state = {"w": engine.module.state_dict(), "o": engine.optimizer.state_dict()}
            torch.save(state, folder / "plain.pt")

    contenders: dict[str, Callable[[], None]] = {
        "ours, until training goes on": ours,
        "torch.save": plain,
        "accelerator.save_state": lambda: accelerator.save_state(str(folder / "accelerate")),
    }
    ours()
    saver.finish()  # warm: host memory is there from the second save on
    times: dict[str, list[float]] = {name: [] for name in contenders}
    times["ours, until it is durable"] = []
    order = random.Random(0)
    for _ in range(rounds):
        for name in order.sample(list(contenders), len(contenders)):
            accelerator.wait_for_everyone()
            begun = time.perf_counter()
            contenders[name]()
            times[name].append(1000 * (time.perf_counter() - begun))
            if contenders[name] is ours:
                saver.finish()
                times["ours, until it is durable"].append(1000 * (time.perf_counter() - begun))
            os.sync()  # what one leaves in memory is not written during the next
    return {name: summary(sorted(values)) for name, values in times.items()}


def summary(values: list[float]) -> dict:
    return {
        "milliseconds": statistics.median(values),
        "quartiles": [values[len(values) // 4], values[3 * len(values) // 4]],
    }


if __name__ == "__main__":
    main()
