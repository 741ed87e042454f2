"""Decoded images of an index. In training, other images replace those that cannot be used."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from torch import Tensor

from flatcal_dist.data.errors import BadImage, DataError
from flatcal_dist.data.image_index import ImageIndex
from flatcal_dist.data.images.decode import Decoding, decode
from flatcal_dist.data.order import substitutes

TRIES = 100  # bad substitutes in a row, after which the data as a whole must be wrong


@dataclass(frozen=True)
class Replaced:
    """A record that `by` took the place of `sample` in a step of an epoch.

    Both are numbers of samples in the index. In a stream, both are pairs of the number of the shard
    and the key of the sample.
    """

    sample: int | tuple[int, str]
    by: int | tuple[int, str]
    epoch: int
    step: int  # of the epoch
    reason: str


@dataclass(frozen=True)
class Images:
    """The images of an index as tensors."""

    index: ImageIndex
    decoding: Decoding

    def __len__(self) -> int:
        return len(self.index)

    def image(self, sample: int) -> Tensor:
        """Return one image, uint8 [channels, H, W].

        Raises BadImage, with the name of the image, if it cannot be used. Raises DataError if the
        shard cannot be read.
        """
        how = self.decoding
        try:
            data = self.index.read(sample)
            return decode(data, how.channels, "", how.decoder, how.max_pixels)
        except BadImage as error:  # now the name is worth looking up
            raise BadImage(self.index.name(sample), error.reason) from error

    def image_or_another(self, sample: int, seed: int, epoch: int) -> tuple[Tensor, int, str]:
        """Return the image of `sample`, or a substitute if that image is bad.

        The substitute follows from the three arguments alone.

        Args:
            sample: The number of the image.
            seed: The seed of the run.
            epoch: The number of the epoch, from 0.

        Returns:
            The image, its number, and the reason why it is a substitute. The reason is "" if it is
            the image that was asked for.

        Raises:
            DataError: `TRIES` substitutes in a row are bad, too.
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
