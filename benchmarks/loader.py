"""Images per second of our loader beside the usual ways, and what the index costs; on one machine.

    python benchmarks/loader.py [--images 400] [--rounds 7] [--workers 0 1 2] [--json FILE]

Every contender reads the same JPEGs (longer side 500 pixels, from the photographs of the tests; so
this needs the extra `dev`), from page cache, and makes the same random-resized crop to 224 pixels
and flip, bilinear, antialiased, batches of 64 uint8 images. Rounds are paired: in each, every
contender makes one pass, in a shuffled order; a ratio is the median over rounds of timm's CPU time
over the contender's of the same round. CPU time, of the main process and of the workers, is what a
core is worth however busy the machine is; images per second of wall time suffer from company.
Nothing is asserted.
"""

import argparse
import functools
import gc
import json
import multiprocessing
import os
import platform
import random
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
import webdataset
from timm.data import create_dataset, create_transform
from timm.data.loader import fast_collate
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2 as T

from flatcal_dist.data import (
    Augmentation,
    BatchPlan,
    Decoding,
    Index,
    Sample,
    Workers,
    describe_decoder,
    expand,
    load_index,
    sample_seed,
    training_loader,
    training_transform,
    write_shards,
)
from flatcal_dist.data.images.decode import decode
from flatcal_dist.data.images.transforms import stack
from flatcal_dist.data.shards import index as index_module
from flatcal_dist.data.shards import sidecars
from flatcal_dist.data.shards.members import BLOCK
from flatcal_dist.data.shards.walk import ShardIndex

SIZE, BATCH, SHARDS = 224, 64, 8
TIMM = "timm, wds reader"
OURS = Augmentation(interpolation="bilinear")
Passes = Callable[[int], Iterable]  # workers -> batches of one pass


def write_images(root: Path, count: int) -> None:
    """The same JPEGs as shards and as an ImageFolder tree."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from tests.support.photographs import encoded, photograph

    samples = []
    for number in range(count):
        image, _ = photograph(number % 10, number)
        scale = 500 / max(image.size)
        image = image.resize([round(side * scale) for side in image.size])
        data = encoded(image, quality=92)
        samples.append(Sample(f"i{number:05d}", data, "jpg", number % 10, f"{number}.jpg"))
        path = root / f"tree/c{number % 10}/i{number:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    write_shards(
        samples, root / "shards", "x-train", split="train", samples_per_shard=-(-count // SHARDS)
    )


def contenders(root: Path, workers: int) -> dict[str, Passes]:
    decoders = ("torchvision", "pil") if workers == 0 else ()
    return {
        "ours": functools.partial(ours, root, "auto"),
        **{f"ours, data.decoder={d}": functools.partial(ours, root, d) for d in decoders},
        TIMM: functools.partial(timm_wds, root),
        "webdataset, PIL, torchvision": functools.partial(plain_webdataset, root),
        "torchvision ImageFolder": functools.partial(image_folder, root),
    }


def ours(root: Path, decoder: str, workers: int) -> Iterable:
    index = load_index(expand(str(root / "shards")))
    plan = BatchPlan(seed=0, global_batch_size=BATCH, micro_batch_size=BATCH, epochs=1)
    transform = training_transform(OURS, SIZE)
    return training_loader(index, plan, transform, Decoding(3, decoder), Workers(workers))


def timm_wds(root: Path, workers: int) -> Iterable:
    """timm's reader and transforms as its training script sets them up, for uint8 batches."""
    dataset = create_dataset(
        "wds/x", root=str(root / "shards"), split="train", is_training=True, batch_size=BATCH
    )
    dataset.transform = create_transform(
        SIZE, is_training=True, use_prefetcher=True, color_jitter=0.0, interpolation="bilinear"
    )
    dataset.set_loader_cfg(num_workers=workers)
    return DataLoader(dataset, BATCH, num_workers=workers, collate_fn=fast_collate, drop_last=True)


def in_pillow() -> T.Compose:
    """torchvision's recipe for images that Pillow decodes."""
    return T.Compose(
        [T.RandomResizedCrop(SIZE, antialias=True), T.RandomHorizontalFlip(), T.PILToTensor()]
    )


def plain_webdataset(root: Path, workers: int) -> Iterable:
    shards = [str(path) for path in sorted((root / "shards").glob("*.tar"))]
    dataset = webdataset.WebDataset(shards, shardshuffle=len(shards)).shuffle(1000)
    dataset = dataset.decode("pil").to_tuple("jpg", "cls").map_tuple(in_pillow(), int)
    return DataLoader(dataset, BATCH, num_workers=workers, drop_last=True)


def image_folder(root: Path, workers: int) -> Iterable:
    dataset = ImageFolder(str(root / "tree"), in_pillow())
    return DataLoader(dataset, BATCH, shuffle=True, num_workers=workers, drop_last=True)


def cpu_seconds() -> float:
    """Of this process and of those that it has waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def one_pass(make: Passes, workers: int) -> tuple[int, float, float]:
    """Images, seconds and CPU seconds, from the making of the loader to the end of its workers."""
    started, cpu, images = time.perf_counter(), cpu_seconds(), 0
    batches = make(workers)
    for batch in batches:
        tensor = batch[0] if isinstance(batch, list | tuple) else batch.images
        assert tensor.shape[1:] == (3, SIZE, SIZE)
        assert tensor.dtype == torch.uint8
        images += len(tensor)
    del batches
    while multiprocessing.active_children():
        time.sleep(0.001)
    return images, time.perf_counter() - started, cpu_seconds() - cpu


def worker_memory(make: Passes, workers: int) -> float:
    """MiB of the workers together in the middle of a pass, shared pages by halves (PSS)."""
    total = 0.0
    for number, _ in enumerate(make(workers)):
        if number == 1:
            total = sum(_pss(child.pid) for child in multiprocessing.active_children())
    return total


def _pss(process: int) -> float:
    rollup = Path(f"/proc/{process}/smaps_rollup").read_text()
    return int(rollup.split("\nPss:")[1].split()[0]) / 1024


def compare(root: Path, workers: int, rounds: int) -> dict[str, dict]:
    makers = contenders(root, workers)
    memory = {name: worker_memory(make, workers) for name, make in makers.items()}  # and warm up
    passes: dict[str, list[tuple[int, float, float]]] = {name: [] for name in makers}
    order = random.Random(0)
    for _ in range(rounds):
        for name in order.sample(list(makers), len(makers)):
            gc.collect()
            passes[name].append(one_pass(makers[name], workers))
    cpu = {name: [seconds / n for n, _, seconds in rows] for name, rows in passes.items()}
    result = {}
    for name, rows in passes.items():
        ratios = sorted(b / a for a, b in zip(cpu[name], cpu[TIMM], strict=True))
        result[name] = {
            "images_per_second": statistics.median(n / wall for n, wall, _ in rows),
            "images_per_cpu_second": statistics.median(1 / one for one in cpu[name]),
            "ratio_to_timm": statistics.median(ratios),
            "quartiles": [ratios[len(ratios) // 4], ratios[3 * len(ratios) // 4]],
            "worker_mib": memory[name] or None,
        }
    return result


def shares(root: Path, rounds: int) -> dict[str, float]:
    """CPU microseconds of an image in our pipeline by what they go to; medians over rounds."""
    index = load_index(expand(str(root / "shards")))
    transform = training_transform(OURS, SIZE)
    clock, runs = time.process_time, []
    for _ in range(rounds):
        times, images = np.zeros(5), []
        for sample in np.random.default_rng(0).permutation(len(index)).tolist():
            at = [clock()]
            index.announce([sample])
            at.append(clock())
            data = index.read(sample)
            at.append(clock())
            image = decode(data, 3, "")
            at.append(clock())
            images.append(transform(image, sample_seed(0, 0, sample)))
            at.append(clock())
            if len(images) == BATCH:
                stack(images)
                images.clear()
            at.append(clock())
            times += np.diff(at)
        runs.append(1e6 * times / len(index))
    whole = [one_pass(contenders(root, 0)["ours"], 0) for _ in range(rounds)]
    names = ("announce", "read", "decode", "crop, resize, flip", "stack")
    result = dict(zip(names, np.median(runs, axis=0).tolist(), strict=True))
    total = statistics.median(1e6 * cpu / images for images, _, cpu in whole)
    result["the rest"] = max(total - sum(result.values()), 0.0)
    return result


def simulated(directory: Path, samples: int = 1_281_167, shards: int = 1024) -> list[Path]:
    """Indexed shards of ImageNet's number, without images: holes of the right size."""
    generator = np.random.default_rng(0)
    paths = []
    for number, part in enumerate(np.array_split(np.arange(samples), shards)):
        n = len(part)
        size = generator.integers(20_000, 200_000, n).astype(np.uint32)
        offset = np.cumsum(size.astype(np.uint64) + 2048) - size  # where an image begins
        found = ShardIndex(
            tar_size=int(offset[-1] + size[-1]), offset=offset, size=size,
            header=generator.integers(0, 2**32, n, np.uint32),
            content=generator.integers(0, 2**32, n, np.uint32),
            label=generator.integers(0, 1000, n).astype(np.int32),
            key=np.array([f"n{one % 1000:08d}_{one}".encode() for one in part]),
        )  # fmt: skip
        path = directory / f"s-{number:04d}.tar"
        with path.open("wb") as file:
            file.truncate(found.tar_size)
        sidecars.walk_shard = lambda *_, found=found: found
        sidecars.index_shard(path)
        paths.append(path)
    return paths


def index_costs(root: Path, rounds: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as directory:
        paths = simulated(Path(directory))
        loads = []
        for _ in range(3):
            started = time.perf_counter()
            whole = load_index(paths, classes=1000)
            loads.append(time.perf_counter() - started)
    memory = sum(getattr(whole, name).nbytes for name in index_module.ALL_COLUMNS)
    index = load_index(expand(str(root / "shards")))
    order = np.random.default_rng(0).integers(0, len(index), 20_000).tolist()
    reads, bare = [], []
    for _ in range(rounds):
        bare.append(_microseconds(lambda one: _bare_read(index, one), order))
        reads.append(_microseconds(index.read, order))
    return {
        "load_seconds": min(loads),
        "memory_mib": memory / 2**20,
        "read_us": min(reads),
        "bare_pread_us": min(bare),
        "mean_kilobytes": float(index.size.mean() / 1000),
    }


def _bare_read(index: Index, sample: int) -> bytes:
    size, offset = int(index.size[sample]), int(index.offset[sample])
    descriptor = index_module._open(index.shards[index.shard[sample]]).number
    return os.pread(descriptor, size + BLOCK, offset - BLOCK)


def _microseconds(read: Callable[[int], object], order: list[int]) -> float:
    started = time.process_time()
    for one in order:
        read(one)
    return 1e6 * (time.process_time() - started) / len(order)


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(": ")[1] for line in lines if "model name" in line), platform.machine())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    loads = [os.getloadavg()[0]]
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        write_images(root, arguments.images)
        outcome = {
            "where": f"{_processor()}, {os.cpu_count()} cores",
            "versions": {"torch": torch.__version__, "decoder": describe_decoder()},
            "images": arguments.images,
            "rounds": arguments.rounds,
            "index": index_costs(root, arguments.rounds),
            "microseconds": shares(root, arguments.rounds),
            "workers": {w: compare(root, w, arguments.rounds) for w in arguments.workers},
        }
    outcome["load_average"] = [*loads, os.getloadavg()[0]]
    show(outcome)
    if arguments.json:
        arguments.json.write_text(json.dumps(outcome, indent=1) + "\n")


def show(outcome: dict) -> None:
    before, after = outcome["load_average"]
    print(f"{outcome['where']}; load average {before:.1f} before, {after:.1f} after")
    index = outcome["index"]
    print(
        f"index of 1,281,167 images in 1,024 shards: loaded in {index['load_seconds']:.2f} s, "
        f"{index['memory_mib']:.0f} MiB; reading an image of {index['mean_kilobytes']:.0f} kB at "
        f"random {index['read_us']:.1f} us, of which the bare pread {index['bare_pread_us']:.1f} us"
    )
    parts = outcome["microseconds"]
    total = sum(parts.values())
    text = ", ".join(f"{what} {us:.0f} us ({us / total:.0%})" for what, us in parts.items())
    print(f"an image in our pipeline, one core: {text}")
    for workers, rows in outcome["workers"].items():
        print(
            f"\n{workers} workers          images per CPU second   of wall time   x timm per core"
        )
        for name, row in rows.items():
            low, high = row["quartiles"]
            memory = f"  {row['worker_mib']:6.0f} MiB in workers" if row["worker_mib"] else ""
            print(
                f"  {name:<32} {row['images_per_cpu_second']:8.0f} {row['images_per_second']:12.0f}"
                f"        {row['ratio_to_timm']:.2f} ({low:.2f} to {high:.2f}){memory}"
            )


if __name__ == "__main__":
    main()
