"""Images of an index, decoded; and, in training, others in place of those that cannot be."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from torch import Tensor

from flatcal_dist.data.errors import BadImage, DataError
from flatcal_dist.data.images.decode import MAX_PIXELS, decode
from flatcal_dist.data.order import substitutes
from flatcal_dist.data.shards.index import Index

TRIES = 100  # bad substitutes in a row, after which the data as a whole must be wrong


@dataclass(frozen=True)
class Replaced:
    """In a step of an epoch, `by` took the place of `sample`.

    Both are numbers in the index; or, of a stream, number of the shard and key.
    """

    sample: int | tuple[int, str]
    by: int | tuple[int, str]
    epoch: int
    step: int  # of the epoch
    reason: str


@dataclass(frozen=True)
class Images:
    """Images of an index as tensors. channels, decoder, max_pixels: as for `decode`."""

    index: Index
    channels: int
    decoder: str = "auto"
    max_pixels: int = MAX_PIXELS

    def __len__(self) -> int:
        return len(self.index)

    def image(self, sample: int) -> Tensor:
        """One image, uint8 [channels, H, W]. Raises BadImage, with its name; or DataError."""
        try:
            data = self.index.read(sample)
            return decode(data, self.channels, "", self.decoder, self.max_pixels)
        except BadImage as error:  # now the name is worth looking up
            raise BadImage(self.index.name(sample), error.reason) from error

    def image_or_another(self, sample: int, seed: int, epoch: int) -> tuple[Tensor, int, str]:
        """The image of `sample`, or of a substitute that is drawn from (seed, epoch, sample) alone.

        Returns it, its number, and why it is another ("" if it is not). Raises DataError when
        TRIES substitutes in a row are bad, too.
        """
        reason = ""
        for candidate in self._candidates(sample, seed, epoch):
            try:
                return self.image(candidate), candidate, reason
            except BadImage as error:
                reason = reason or error.reason
                last = error
        raise DataError(
            f"{TRIES} images drawn in place of {self.index.name(sample)} cannot be used either; "
            f"the last: {last} Check the shards with `flatcal validate`."
        )

    def _candidates(self, sample: int, seed: int, epoch: int) -> Iterator[int]:
        yield sample
        yield from islice(substitutes(seed, epoch, sample, len(self)), TRIES)
