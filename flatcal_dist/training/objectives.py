"""Whether the data of a run has what an objective needs."""

from flatcal_dist import batch_sizes
from flatcal_dist.config import Config
from flatcal_dist.data import DataError, Index
from flatcal_dist.data.order import micro_batch_count
from flatcal_dist.data.shards.listing import Stream
from flatcal_dist.objectives import Objective

READ_BY_INDEX = "Read them by index: data.reader=indexed, for shards from URLs with data.cache"


def refuse_unfit(
    objective: Objective, config: Config, train: Index | Stream, world_size: int
) -> None:
    """Check that training data and batches have what an objective needs.

    Args:
        objective: What is to be minimized.
        config: The configuration of the run.
        train: The training data.
        world_size: The number of ranks.

    Raises:
        DataError: They lack something; the message names the remedy.
    """
    name = f"objective.name={objective.name}"
    if isinstance(train, Stream) and objective.pairs == "same_class":
        raise DataError(
            f"{name} compares images of one class, and streamed shards are read in an order that "
            f"is not known before. {READ_BY_INDEX}"
        )
    if isinstance(train, Stream) and objective.keeps_history:
        raise DataError(
            f"{name} keeps a history of each image, and images of streamed shards have no numbers "
            f"to keep it by. {READ_BY_INDEX}"
        )
    size = batch_sizes.micro_batch_size(config.data, world_size)
    if objective.whole_batch and not objective.accumulates:
        count = micro_batch_count(config.data.global_batch_size, size, world_size)
        if count > 1:
            raise DataError(
                f"{name} compares all images of a step, and data.micro_batch_size="
                f"{config.data.micro_batch_size} makes {count} micro-batches on each of "
                f"{world_size} ranks: leave it out, or allow one more forward pass for each pass, "
                "objective.accumulation=second_pass"
            )
    batch_sizes.batch_arithmetic(config, world_size, len(train), objective)
