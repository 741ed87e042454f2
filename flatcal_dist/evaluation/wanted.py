"""What a job of evaluation is asked for: networks, and what to evaluate them on."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from flatcal_dist.config import Config
from flatcal_dist.evaluation.provenance import UNKNOWN, Provenance
from flatcal_dist.sharpness.measures import Options


@dataclass(frozen=True)
class Wanted:
    """What to evaluate on, and what to write.

    Attributes:
        data: The data sets, each as PATH or NAME=PATH (see `data.sets.variants`).
        corruptions: The corruptions of ImageNet-C to be used; by default all that are there.
        severities: The severities of ImageNet-C to be used; by default all that are there.
        real_file: A file of ReaL labels, instead of those that timm ships.
        people_file: A file of people's answers, such as that of CIFAR-10H.
        save_logits: Whether the logits of the clean images are written.
        class_names: The names of the classes of the network, in their order.
        confidence: The scores to compute beside those of logits. None computes the scores that the
            configuration names.
        sharpness: How to measure the sharpness on the clean images. None does not measure it.
    """

    data: Sequence[str] = ()
    corruptions: Sequence[str] | None = None
    severities: Sequence[int] | None = None
    real_file: Path | None = None
    people_file: Path | None = None
    save_logits: bool = False
    class_names: Sequence[str] | None = None
    confidence: Sequence[str] | None = None
    sharpness: Options | None = None


@dataclass(frozen=True)
class Network:
    """A network to evaluate."""

    title: str
    config: Config
    weights: Path | None  # a file or a checkpoint of any engine; None for published weights
    output: Path  # the directory of the report
    trained: Provenance = UNKNOWN
    log: Path | None = None  # the metrics of its training, for the curves in the report
    key: str | None = None  # which of several weights in the file
    members: tuple["Network", ...] = ()  # the networks of an ensemble, which has no other weights
