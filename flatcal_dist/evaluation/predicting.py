"""What a network says of images: logits, features when asked for, and scores of confidence."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from flatcal_dist import inputs
from flatcal_dist.calibration.confidence.score import Evidence, Reference, Score
from flatcal_dist.calibration.confidence.sources import SCORES
from flatcal_dist.config import Config, ConfigError
from flatcal_dist.data import Index
from flatcal_dist.data.order import sample_seed
from flatcal_dist.evaluation.passes import Ensemble, passes_with_dropout, refuse_without_dropout
from flatcal_dist.networks.features import Watch, watching_features
from flatcal_dist.networks.registry import in_evaluation_mode
from flatcal_dist.ranks.distributed import on_all_ranks
from flatcal_dist.sharpness.outputs import logits_of

REFERENCE_IMAGES = 50_000  # of the training images, at most, that features are compared with


@dataclass(frozen=True)
class Prediction:
    """What a network says of n images.

    samples [n]: their numbers in the index. logits [n, K], of an ensemble the logarithms of its
    probabilities. features [n, D] float32, None unless a score needs them. scores: those that are
    computed with the network, batch by batch, by key, each [n].
    """

    samples: np.ndarray
    logits: np.ndarray
    features: np.ndarray | None = None
    scores: dict[str, np.ndarray] = field(default_factory=dict)

    @classmethod
    def merged(cls, parts: Sequence["Prediction"]) -> "Prediction":
        """All parts in one, sorted by sample."""
        samples = np.concatenate([part.samples for part in parts])
        order = np.argsort(samples, kind="stable")

        def joined(arrays: Sequence[np.ndarray]) -> np.ndarray:
            return np.concatenate(arrays)[order]

        return cls(
            samples[order],
            joined([part.logits for part in parts]),
            None if parts[0].features is None else joined([part.features for part in parts]),
            {key: joined([part.scores[key] for part in parts]) for key in parts[0].scores},
        )


@torch.inference_mode()
def predict(
    config: Config,
    module: nn.Module,
    index: Index,
    accelerator: Accelerator,
    scores: Sequence[Score] = (),
    *,
    classes: Sequence[int] | None = None,
    samples: np.ndarray | None = None,
) -> Prediction:
    """What this rank's network says of its share of the images, padding left out.

    Args:
        config: the network's.
        module: the network, or an `Ensemble`.
        index: of the images.
        accelerator: all its ranks take part.
        scores: those to compute, or to keep features for. Scores of passes depend on the batch
            size, but not on the number of ranks.
        classes: that compete, of which scores of passes and networks are; None: all.
        samples: numbers [m] of the images to look at; None: all.

    Raises:
        ConfigError: The network has other classes than the configuration says, or lacks what a
            score needs.
    """
    batches = inputs.evaluation_batches(
        config,
        index,
        accelerator.process_index,
        accelerator.num_processes,
        accelerator.device.type == "cuda",
        samples,
    )
    asked = _Asked(config, module, scores, slice(None) if classes is None else list(classes))
    normalize = inputs.normalization(config.data).to(accelerator.device)
    parts = []
    with in_evaluation_mode(module), accelerator.autocast(), asked.watched():
        for batch in batches:
            images = normalize(batch.images.to(accelerator.device, non_blocking=True))
            parts.append(asked.answer(images, batch.samples, batch.valid))
    return Prediction.merged(parts)


class _Asked:
    """A network, and what it is asked about each batch."""

    def __init__(
        self, config: Config, module: nn.Module, scores: Sequence[Score], classes: slice | list[int]
    ) -> None:
        self.config, self.module, self.classes = config, module, classes
        self.by_batch = [score for score in scores if score.needs in ("passes", "networks")]
        self.needs = {score.needs for score in scores}
        self.features: Watch | None = None

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Inside, features can be had of a pass, if a score needs them."""
        if "features" not in self.needs:
            yield
            return
        model = self.config.model
        with watching_features(self.module, model.name, model.num_classes) as self.features:
            yield

    def answer(self, images: Tensor, samples: Tensor, valid: Tensor) -> Prediction:
        module = self.module
        answers = module.answers(images) if isinstance(module, Ensemble) else None
        raw = logits_of(module(images)) if answers is None else Ensemble.mean(answers)
        if raw.shape[1] != self.config.model.num_classes:
            raise ConfigError(
                f"the network gives {raw.shape[1]} logits, but model.num_classes="
                f"{self.config.model.num_classes}"
            )
        kept = valid.to(raw.device)
        features = None if self.features is None else _numpy(self.features(raw)[kept])
        passes = None
        if "passes" in self.needs:
            seed = sample_seed(self.config.run.seed, 0, int(samples[0]))
            passes = passes_with_dropout(module, self.config.model.name, images, seed)
        evidence = Evidence(passes=self._of(passes, kept), networks=self._of(answers, kept))
        return Prediction(
            samples[valid].numpy(),
            _numpy(raw[kept] if answers is not None else raw[kept].float()),
            features,
            {s.key: s.compute(evidence) if kept.any() else np.empty(0) for s in self.by_batch},
        )

    def _of(self, answers: Tensor | None, kept: Tensor) -> np.ndarray | None:
        """Of several answers [T, N, K], those on the images kept and the classes that compete."""
        return None if answers is None else _numpy(answers[:, kept])[:, :, self.classes]


def _numpy(tensor: Tensor) -> np.ndarray:
    return tensor.cpu().numpy()


def gathered(prediction: Prediction) -> Prediction:
    """The predictions of all ranks in one, on every rank."""
    return Prediction.merged(gather_object([prediction]))


def check_sources(config: Config, module: nn.Module, scores: Sequence[Score]) -> None:
    """Raise ConfigError if the network, or the configuration, cannot give what a score needs.

    Whether a network has features is seen at its first pass only.
    """
    for score in scores:
        if score.needs in ("features", "passes") and isinstance(module, Ensemble):
            raise ConfigError(
                f"{score.key} is a score of one network, and this is an ensemble: leave it out"
            )
        if score.needs == "networks" and not isinstance(module, Ensemble):
            raise ConfigError(f"{score.key} needs several networks, and this is one")
        if score.needs == "passes":
            refuse_without_dropout(module, config.model.name)
        if score.needs == "features":
            _check_training_images(config, score)


def _check_training_images(config: Config, score: Score) -> None:
    data = config.data
    if data.train is None:
        raise ConfigError(
            f"{score.key} compares images with training images: say where they are with data.train"
        )
    if inputs.remote(data.train) and not data.cache:
        raise ConfigError(
            f"{score.key} compares images with training images, which data.train names by URL: set "
            "data.cache, so that they can be read"
        )


def training_reference(
    config: Config, module: nn.Module, accelerator: Accelerator, scores: Sequence[Score]
) -> Reference | None:
    """Features and labels of the training images, if a score needs them. Called by all ranks.

    Of more than `REFERENCE_IMAGES` a random part, the same each time. They are prepared as images
    are for evaluation, without augmentation.
    """
    of_features = [score for score in scores if score.needs == "features"]
    if not of_features:
        return None
    if inputs.remote(config.data.train):
        inputs.download(config.data, accelerator, "train")
    index = on_all_ranks(lambda: inputs.open_index(config.data, "train", config.model.num_classes))
    chosen = None
    if len(index) > REFERENCE_IMAGES:
        generator = np.random.default_rng(config.run.seed)
        chosen = np.sort(generator.choice(len(index), REFERENCE_IMAGES, replace=False))
    own = predict(config, module, index, accelerator, of_features, samples=chosen)
    found = gathered(replace(own, logits=own.logits[:, :0]))
    return Reference(found.features, index.label[found.samples])


def of_features(
    found: Prediction,
    reference: Reference | None,
    scores: Sequence[Score],
    classes: Sequence[int] | None,
) -> dict[str, np.ndarray]:
    """Scores of features [n] by key. Where a part of the `classes` compete, among those alone.

    Raises ConfigError, with the name of the score, where it cannot be computed.
    """
    logits = found.logits
    if reference is not None and classes is not None:
        competing = np.isin(reference.labels, classes)
        reference = Reference(reference.features[competing], reference.labels[competing])
        logits = logits[:, list(classes)]
    computed = {}
    for score in scores:
        if score.needs != "features":
            continue
        prediction = logits.argmax(axis=1)
        if classes is not None:
            prediction = np.asarray(classes)[prediction]
        evidence = Evidence(features=found.features, prediction=prediction, reference=reference)
        try:
            computed[score.key] = score.compute(evidence)
        except ValueError as error:
            raise ConfigError(f"{score.key}: {error}") from None
    return computed


def wanted_scores(config: Config, module: nn.Module) -> list[Score]:
    """Those that `evaluate.confidence` names, and those of networks where there are several."""
    several = isinstance(module, Ensemble)
    asked = config.evaluate.confidence
    return [s for s in SCORES if s.key in asked or (several and s.needs == "networks")]
