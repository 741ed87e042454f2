"""What a sharpness-aware step costs over a plain one: ours beside the usual ways, in one run.

    python benchmarks/step_overhead.py [--network resnet18 vit_tiny_patch16_224] [--json FILE]
    accelerate launch --config_file configs/accelerate/cpu_ddp.yaml benchmarks/step_overhead.py

Every contender trains its own copy of one network on the same images, with the same SGD. Rounds are
paired: in each, every contender takes one step, in a shuffled order; a ratio is the median over
rounds of its time over the plain step's of the same round. Exact SAM cannot be under 2.0. Memory is
the peak above the plain step's, in copies of the weights; collectives are those of one step, where
several ranks run; moving is the share of our SAM step in which weights are perturbed and restored,
gradient norm and copies included. Nothing is asserted. On a GPU when there is one, else on the CPU;
peers that are not installed are left out.
"""

import argparse
import copy
import gc
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path

import timm
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile

from flatcal_dist.objectives import cross_entropy
from flatcal_dist.ranks.distributed import start
from flatcal_dist.sharpness import SAM, ReplicatedEngine, SharpnessAwareStep
from flatcal_dist.verification.traffic import counted

RATE, MOMENTUM, RHO = 0.01, 0.9, 0.05
Step = Callable[[Tensor, Tensor], object]


def plain(model: nn.Module) -> Step:
    """Forward, backward, optimizer: the plain loop of any tutorial."""
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=MOMENTUM)

    def step(images: Tensor, labels: Tensor) -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()

    return step


def ours(model: nn.Module, rule: SAM | None = SAM(RHO), scope: str = "global") -> Step:  # noqa: B008
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=MOMENTUM)
    engine = ReplicatedEngine(model, optimizer)
    step = SharpnessAwareStep(
        engine, rule, scope=scope, loss=lambda z, y: cross_entropy(z, y, reduction="none")
    )
    world_size = engine.world_size
    return lambda images, labels: step([(images, labels)], samples=len(labels) * world_size)


def two_step_optimizer(model: nn.Module) -> Step:
    """SAM as most users write it, after the widespread two-step optimizer (davda54/sam).

    One tensor at a time; weights swapped by `.data`; batch norm switched off by its momentum for
    the second pass. Written here from its description, not taken from there.
    """
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=MOMENTUM)
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [m.momentum for m in norms]

    @torch.no_grad()
    def ascend() -> dict[nn.Parameter, Tensor]:
        old = {}
        weights = [w for w in model.parameters() if w.grad is not None]
        norm = torch.norm(torch.stack([w.grad.norm(p=2) for w in weights]), p=2)
        for w in weights:
            old[w] = w.data.clone()
            w.add_(w.grad * (RHO / (norm + 1e-12)))
        return old

    def step(images: Tensor, labels: Tensor) -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        old = ascend()
        optimizer.zero_grad()
        for m in norms:
            m.momentum = 0.0
        nn.functional.cross_entropy(model(images), labels).backward()
        for m, momentum in zip(norms, momenta, strict=True):
            m.momentum = momentum
        for w, value in old.items():
            w.data = value
        optimizer.step()

    return step


def pytorch_optimizer_sam(model: nn.Module) -> Step:
    """The SAM of the package pytorch_optimizer, used as its documentation shows."""
    from pytorch_optimizer import SAM as PeerSAM

    optimizer = PeerSAM(
        model.parameters(), base_optimizer=torch.optim.SGD, rho=RHO, lr=RATE, momentum=MOMENTUM
    )

    def step(images: Tensor, labels: Tensor) -> None:
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.first_step(zero_grad=True)
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.second_step(zero_grad=True)

    return step


def composer_sam(model: nn.Module) -> Step:
    """The SAM optimizer of MosaicML Composer, driven by a closure as its trainer does."""
    from composer.algorithms.sam import SAMOptimizer

    base = torch.optim.SGD(model.parameters(), lr=RATE, momentum=MOMENTUM)
    optimizer = SAMOptimizer(base, rho=RHO, interval=1)

    def step(images: Tensor, labels: Tensor) -> None:
        def closure(**_: object) -> Tensor:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(images), labels)
            loss.backward()
            return loss

        optimizer.step(closure=closure)

    return step


CONTENDERS = {
    "plain loop": plain,
    "ours, no rule": lambda model: ours(model, None),
    "ours, SAM": ours,
    "ours, SAM in scope rank": lambda model: ours(model, scope="rank"),
    "two-step optimizer, as usual": two_step_optimizer,
    "pytorch_optimizer SAM": pytorch_optimizer_sam,
    "Composer SAM": composer_sam,
}


def contender(name: str, network: nn.Module, device: torch.device) -> Step:
    return CONTENDERS[name](distributed(copy.deepcopy(network).to(device).train()))


def distributed(model: nn.Module) -> nn.Module:
    alone = not dist.is_initialized() or dist.get_world_size() == 1
    return model if alone else DistributedDataParallel(model)


def installed(network: nn.Module, device: torch.device) -> dict[str, Step]:
    steps = {}
    for name in CONTENDERS:
        try:
            steps[name] = contender(name, network, device)
        except ImportError as error:
            print(f"left out: {name} ({error})")
    return steps


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds(step: Step, images: Tensor, labels: Tensor) -> float:
    started = now(images.device)
    step(images, labels)
    return now(images.device) - started


def share_of_moving(model: nn.Module, images: Tensor, labels: Tensor, rounds: int) -> float:
    """Of our SAM step: time from the ascent gradient to w + e, and from there back, median."""
    device, moving = images.device, 0.0
    engine = ReplicatedEngine(model, torch.optim.SGD(model.parameters(), RATE, MOMENTUM))
    step = SharpnessAwareStep(engine, SAM(RHO))
    moved = engine.moved

    @contextmanager
    def timed(seen: Callable[[], AbstractContextManager]) -> Iterator[object]:
        nonlocal moving
        started = now(device)
        with seen() as value:
            moving += now(device) - started
            yield value
            started = now(device)
        moving += now(device) - started

    class TimedSAM(SAM):
        def perturb_(self, *arguments: object) -> Tensor:
            nonlocal moving
            started = now(device)
            norm = super().perturb_(*arguments)
            moving += now(device) - started
            return norm

    step.rule = TimedSAM(RHO)
    engine.moved = lambda shards: timed(partial(moved, shards))
    shares = []
    for _ in range(3 + rounds):
        moving = 0.0
        total = seconds(lambda i, t: step([(i, t)]), images, labels)
        shares.append(moving / total)
    return statistics.median(shares[3:])


def peak_memory(name: str, network: nn.Module, images: Tensor, labels: Tensor) -> int:
    """Bytes allocated at the peak of three steps of a new contender, its network included."""
    device_type = 1 if images.device.type == "cuda" else 0  # the profiler's numbers
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step = contender(name, network, images.device)
        for _ in range(3):
            step(images, labels)
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    changes = [e["args"] for e in events if e.get("name") == "[memory]"]
    changes = [c for c in changes if c["Device Type"] == device_type]
    # The totals go on from what the process held at an earlier profile's end.
    before = changes[0]["Total Allocated"] - changes[0]["Bytes"]
    return max(c["Total Allocated"] for c in changes) - before


def compare(name: str, arguments: argparse.Namespace, device: torch.device) -> dict[str, dict]:
    torch.manual_seed(0)
    options = {"img_size": arguments.image_size} if "vit" in name else {}
    network = timm.create_model(name, num_classes=100, **options)
    images = torch.randn(arguments.batch, 3, arguments.image_size, arguments.image_size)
    images, labels = images.to(device), torch.randint(100, (arguments.batch,)).to(device)
    steps = installed(network, device)
    for step in steps.values():  # warm up
        for _ in range(3):
            step(images, labels)
    times: dict[str, list[float]] = {contender: [] for contender in steps}
    order = random.Random(0)  # the same on every rank: they meet in collectives
    gc.disable()
    for _ in range(arguments.rounds):
        for contender in order.sample(list(steps), len(steps)):
            times[contender].append(seconds(steps[contender], images, labels))
    gc.enable()
    base = times["plain loop"]
    weights = sum(w.numel() * w.element_size() for w in network.parameters())
    least = peak_memory("plain loop", network, images, labels)
    rows = {}
    for contender, values in times.items():
        ratios = sorted(a / b for a, b in zip(values, base, strict=True))
        rows[contender] = {
            "ratio": statistics.median(ratios),
            "quartiles": [ratios[len(ratios) // 4], ratios[3 * len(ratios) // 4]],
            "milliseconds": 1000 * statistics.median(values),
            "extra_copies_of_weights": (peak_memory(contender, network, images, labels) - least)
            / weights,
            "collectives": counted(partial(steps[contender], images, labels))[1:],
        }
    model = distributed(copy.deepcopy(network).to(device).train())
    rows["ours, SAM"]["moving"] = share_of_moving(model, images, labels, arguments.rounds)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--network", nargs="+", default=["resnet18", "vit_tiny_patch16_224"])
    parser.add_argument("--image-size", type=int, default=96)
    parser.add_argument("--batch", type=int, default=16, help="images per rank")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    accelerator = start("ddp", "fp32")
    device = accelerator.device
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"{os.cpu_count()} CPU cores"
    outcome = {
        "where": where,
        "torch": torch.__version__,
        "world_size": accelerator.num_processes,
        "batch": arguments.batch,
        "image_size": arguments.image_size,
        "rounds": arguments.rounds,
        "networks": {name: compare(name, arguments, device) for name in arguments.network},
    }
    if not accelerator.is_main_process:
        return
    for name, rows in outcome["networks"].items():
        print(
            f"\n{name}, {where}, {accelerator.num_processes} ranks, {arguments.batch} images each"
        )
        for contender, row in rows.items():
            low, high = row["quartiles"]
            number, size = row["collectives"]
            sent = f"  {number} collectives, {size / 2**20:.1f} MiB" if number else ""
            print(
                f"  {contender:<30} {row['ratio']:.3f} x plain  ({low:.3f} to {high:.3f})"
                f"  {row['milliseconds']:8.1f} ms"
                f"  + {row['extra_copies_of_weights']:.2f} weights{sent}"
            )
        print(f"  perturbing and restoring: {rows['ours, SAM']['moving']:.1%} of our SAM step")
    if arguments.json:
        arguments.json.write_text(json.dumps(outcome, indent=1) + "\n")


if __name__ == "__main__":
    main()
