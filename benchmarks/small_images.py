"""Small images per second of one core: held in memory, or decoded for every batch; on one machine.

    python benchmarks/small_images.py [--images 4000] [--rounds 5] [--size 32] [--json FILE]

Both readers give the same batches of 128 images, padded by 4, cut and mirrored, from the same
shards of PNGs, with no worker. Each pass is an epoch. The images are decoded into memory before
the first pass, and that time stands by itself. Rounds are paired: the ratio is the median over
rounds of CPU time of the indexed reader over that of the reader in memory. The second ratio is
that of training a small network (LeNet-5) by plain SGD on these batches, on the same core. Nothing
is asserted.
"""

import argparse
import io
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from flatcal_dist.data import (
    Augmentation,
    Batch,
    BatchPlan,
    Decoding,
    Index,
    Normalize,
    Sample,
    load_index,
    training_loader,
    training_transform,
    write_shards,
)
from flatcal_dist.data.loading.memory import MemoryBatches

BATCH = 128
PAD_CROP = Augmentation("pad_crop")


def write_images(root: Path, count: int, size: int) -> Index:
    """Smooth images with some noise, whose PNGs are about as long as those of photographs."""
    random = np.random.default_rng(0)
    samples = []
    for number in range(count):
        coarse = random.integers(0, 256, (5, 5, 3), dtype=np.uint8)
        smooth = Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC)
        noisy = np.asarray(smooth, np.int16) + random.integers(-9, 10, (size, size, 3))
        png = io.BytesIO()
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(png, "png")
        samples.append(Sample(f"i{number:06d}", png.getvalue(), "png", number % 10))
    return load_index(
        write_shards(samples, root, "x-train", split="train", samples_per_shard=2500), 10
    )


def readers(index: Index, size: int) -> dict[str, Iterable[Batch]]:
    plan = BatchPlan(seed=0, global_batch_size=BATCH, micro_batch_size=BATCH, epochs=1)
    transform = training_transform(PAD_CROP, size)
    return {
        "indexed": training_loader(index, plan, transform, Decoding(3)),
        "memory": MemoryBatches(index, plan, PAD_CROP, size, Decoding(3)),
    }


def network(size: int) -> nn.Module:
    inside = 16 * (((size - 4) // 2 - 4) // 2) ** 2
    return nn.Sequential(
        nn.Conv2d(3, 6, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(inside, 120), nn.ReLU(), nn.Linear(120, 84),
        nn.ReLU(), nn.Linear(84, 10),
    )  # fmt: skip


def trainer(size: int) -> Callable[[Batch], None]:
    torch.manual_seed(0)
    module, normalize = network(size), Normalize([0.5] * 3, [0.25] * 3)
    optimizer = torch.optim.SGD(module.parameters(), 0.01)

    def step(batch: Batch) -> None:
        loss = nn.functional.cross_entropy(module(normalize(batch.images)), batch.labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def cpu_of(batches: Iterable[Batch], use: Callable[[Batch], None]) -> float:
    """CPU seconds of an image in one pass."""
    start, images = time.process_time(), 0
    for batch in batches:
        use(batch)
        images += len(batch.samples)
    return (time.process_time() - start) / images


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        index = write_images(Path(folder), arguments.images, arguments.size)
        both = readers(index, arguments.size)
        start = time.process_time()
        next(iter(both["memory"]))
        results["decoding once, microseconds an image"] = (
            1e6 * (time.process_time() - start) / len(index)
        )
        uses = {"": lambda batch: None, ", training LeNet-5": trainer(arguments.size)}
        for name, use in uses.items():
            times: dict[str, list[float]] = {reader: [] for reader in both}
            for _ in range(arguments.rounds):
                for reader, batches in both.items():
                    times[reader].append(cpu_of(batches, use))
            for reader, each in times.items():
                results[f"{reader}{name}, images a second"] = 1 / statistics.median(each)
            pairs = zip(times["indexed"], times["memory"], strict=True)
            results[f"ratio{name}"] = statistics.median(a / b for a, b in pairs)
    for name, value in results.items():
        print(f"{name:45}{value:12,.1f}")
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
