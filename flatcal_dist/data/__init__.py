"""Batches of images from WebDataset shards, in an order that can be resumed exactly.

index = load_index(expand("imagenet/imagenet1k-train-{0000..1023}.tar"), classes=1000)
plan = BatchPlan(seed=0, global_batch_size=1024, micro_batch_size=256, epochs=90,
                 start=Position(12, 345), rank=rank, world_size=world_size)
transform = training_transform(Augmentation(), 224)
batches = training_loader(index, plan, transform, Decoding(channels=3), Workers(8))
for micro_batches in optimizer_steps(batches):
    ...
"""

from typing import TYPE_CHECKING

from flatcal_dist.lazy import names_of

if TYPE_CHECKING:
    from flatcal_dist.data.errors import BadImage, DataError
    from flatcal_dist.data.images.decode import Decoding, describe_decoder
    from flatcal_dist.data.images.mixing import Mixing
    from flatcal_dist.data.images.transforms import (
        Augmentation,
        Normalize,
        evaluation_transform,
        training_transform,
    )
    from flatcal_dist.data.loading.indexed import (
        Batch,
        EvaluationBatch,
        Some,
        evaluation_loader,
        optimizer_steps,
        sample_loader,
        training_loader,
    )
    from flatcal_dist.data.loading.plan import BatchPlan, Workers
    from flatcal_dist.data.loading.substitutes import Replaced
    from flatcal_dist.data.making.digits import prepare_digits
    from flatcal_dist.data.making.image_folder import image_folder
    from flatcal_dist.data.making.sharding import prepare_shards
    from flatcal_dist.data.order import Position, sample_seed, steps_per_epoch
    from flatcal_dist.data.shards.index import Index, load_index
    from flatcal_dist.data.shards.sidecars import index_shard
    from flatcal_dist.data.shards.writing import Sample, expand, write_shards

__getattr__ = names_of(
    __name__,
    {
        "data.errors": "BadImage DataError",
        "data.images.decode": "Decoding describe_decoder",
        "data.images.mixing": "Mixing",
        "data.images.transforms": "Augmentation Normalize evaluation_transform training_transform",
        "data.loading.indexed": "Batch EvaluationBatch Some "
        "evaluation_loader optimizer_steps sample_loader training_loader",
        "data.loading.plan": "BatchPlan Workers",
        "data.loading.substitutes": "Replaced",
        "data.making.digits": "prepare_digits",
        "data.making.image_folder": "image_folder",
        "data.making.sharding": "prepare_shards",
        "data.order": "Position sample_seed steps_per_epoch",
        "data.shards.index": "Index load_index",
        "data.shards.sidecars": "index_shard",
        "data.shards.writing": "Sample expand write_shards",
    },
)

__all__ = [
    "Augmentation",
    "BadImage",
    "Batch",
    "BatchPlan",
    "DataError",
    "Decoding",
    "EvaluationBatch",
    "Index",
    "Mixing",
    "Normalize",
    "Position",
    "Replaced",
    "Sample",
    "Some",
    "Workers",
    "describe_decoder",
    "evaluation_loader",
    "evaluation_transform",
    "expand",
    "image_folder",
    "index_shard",
    "load_index",
    "optimizer_steps",
    "prepare_digits",
    "prepare_shards",
    "sample_loader",
    "sample_seed",
    "steps_per_epoch",
    "training_loader",
    "training_transform",
    "write_shards",
]
