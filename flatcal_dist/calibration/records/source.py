"""Which images records are about."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Source:
    """Which images were evaluated, and what was done to them.

    Args:
        name: The name of the data set.
        kind: The kind of the data set, as in `data.sets.variants`.
        classes: The classes from which the network had to choose, if not all of them. ImageNet-A
            and -R have 200 of them, and other logits are left out before the softmax. Labels and
            predictions of the records are places in this list.
        corruption: The corruption of ImageNet-C.
        severity: The severity of ImageNet-C.
        generated: Whether this package applied the corruption. If not, published files were read.
        temperature_from: The name of the data whose temperature scales these records. None: their
            temperatures are cross-fitted on themselves, or fitted on images kept apart.
        fitted_apart: Whether the temperature was fitted on training images that were never trained
            on (data.holdout).
        own_temperature: The temperature that is fitted on all of these images, with their labels.
            It is there for comparison, and does not scale `after`.
        own_temperature_interval: Its 95 % interval over images.
        probabilities: Whether only the softmax was known. Logits are then its logarithms, and
            scores that need the level of the logits have no meaning.
    """

    name: str | None = None
    kind: str | None = None
    classes: tuple[int, ...] | None = None
    corruption: str | None = None
    severity: int | None = None
    generated: bool = False
    temperature_from: str | None = None
    fitted_apart: bool = False
    own_temperature: float | None = None
    own_temperature_interval: tuple[float, float] | None = None
    probabilities: bool = False


UNTOLD = Source()  # images of which nothing is known
