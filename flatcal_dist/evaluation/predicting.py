"""Predictions of a network: logits, features if they are needed, and scores of confidence."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from flatcal_dist import inputs
from flatcal_dist.calibration.confidence.score import OF_FEATURES, Evidence, Reference, Score
from flatcal_dist.calibration.confidence.sources import SCORES
from flatcal_dist.config import Config, ConfigError
from flatcal_dist.data.image_index import ImageIndex
from flatcal_dist.data.loading.indexed import EvaluationBatch
from flatcal_dist.data.order import sample_seed
from flatcal_dist.data.sets.variants import DataSet
from flatcal_dist.evaluation.passes import Ensemble, passes_with_dropout, refuse_without_dropout
from flatcal_dist.networks.evaluation_mode import in_evaluation_mode
from flatcal_dist.networks.features import Watch, watching_features
from flatcal_dist.ranks.distributed import on_all_ranks
from flatcal_dist.sharpness.passes.outputs import logits_of

REFERENCE_IMAGES = 50_000  # the most training images that features are compared with


@dataclass(frozen=True)
class Prediction:
    """The predictions of a network for n images.

    Attributes:
        samples: The numbers of the images in the index [n].
        logits: The logits [n, K]. Those of an ensemble are the logarithms of its probabilities.
        features: The features [n, D] float32, or None if no score needs them.
        scores: The scores that are computed with the network, batch by batch. Each is [n], by key.
    """

    samples: np.ndarray
    logits: np.ndarray
    features: np.ndarray | None = None
    scores: dict[str, np.ndarray] = field(default_factory=dict)

    @classmethod
    def merged(cls, parts: Sequence["Prediction"]) -> "Prediction":
        """Return all parts in one, sorted by sample."""
        samples = np.concatenate([part.samples for part in parts])
        order = np.argsort(samples, kind="stable")

        def joined(arrays: Sequence[np.ndarray]) -> np.ndarray:
            return np.concatenate(arrays)[order]

        features = [part.features for part in parts if part.features is not None]
        return cls(
            samples[order],
            joined([part.logits for part in parts]),
            joined(features) if features else None,
            {key: joined([part.scores[key] for part in parts]) for key in parts[0].scores},
        )


@torch.inference_mode()
def predict(
    config: Config,
    module: nn.Module,
    index: ImageIndex,
    accelerator: Accelerator,
    scores: Sequence[Score] = (),
    *,
    classes: Sequence[int] | None = None,
    samples: np.ndarray | None = None,
    batches: Iterable[EvaluationBatch] | None = None,
) -> Prediction:
    """Return the predictions of one rank for its share of the images, without padding.

    Args:
        config: The configuration of the network.
        module: The network, or an `Ensemble`.
        index: The images.
        accelerator: All its ranks take part.
        scores: The scores to compute, or to keep features for. Scores of passes depend on the batch
            size, but not on the number of ranks.
        classes: The classes that compete. Scores of passes and networks are about them. None stands
            for all.
        samples: The numbers [m] of the images to be used; None uses all.
        batches: This rank's batches of these images; None loads them.

    Raises:
        ConfigError: The network has other classes than the configuration says, or lacks what a
            score needs.
    """
    if batches is None:
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


def as_cropped(config: Config, data: DataSet) -> Config:
    """Return the configuration for images that may be cropped already.

    They are brought to the size of the network, but not zoomed into.
    """
    if not data.cropped:
        return config
    cut = config.data.model_copy(update={"crop_pct": 1.0})
    return config.model_copy(update={"data": cut})


class _Asked:
    """A network, and what is computed with it for each batch."""

    def __init__(
        self, config: Config, module: nn.Module, scores: Sequence[Score], classes: slice | list[int]
    ) -> None:
        self.config, self.module, self.classes = config, module, classes
        self.by_batch = [score for score in scores if score.needs in ("passes", "networks")]
        self.needs = {score.needs for score in scores}
        self.features: Watch | None = None

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Watch the network for features inside, if a score needs them."""
        if self.needs.isdisjoint(OF_FEATURES):
            yield
            return
        model = self.config.model
        with watching_features(self.module, model.name, model.num_classes) as self.features:
            yield

    def answer(self, images: Tensor, samples: Tensor, valid: Tensor) -> Prediction:
        """Return the predictions for one batch.

        Args:
            images: The normalized images [N, C, H, W].
            samples: Their numbers [N].
            valid: Which of them are no padding, bool [N].
        """
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
        """Return the part of answers [T, N, K] for kept images and competing classes."""
        return None if answers is None else _numpy(answers[:, kept])[:, :, self.classes]


def _numpy(tensor: Tensor) -> np.ndarray:
    return tensor.cpu().numpy()


def gathered(prediction: Prediction) -> Prediction:
    """Return the predictions of all ranks in one, on every rank."""
    return Prediction.merged(gather_object([prediction]))


def check_sources(config: Config, module: nn.Module, scores: Sequence[Score]) -> None:
    """Check that the network and the configuration have what scores need.

    Only the first forward pass shows whether a network has features.

    Args:
        config: The configuration of the network.
        module: The network, or an `Ensemble`.
        scores: The scores.

    Raises:
        ConfigError: Something is missing.
    """
    for score in scores:
        if score.needs in (*OF_FEATURES, "passes") and isinstance(module, Ensemble):
            raise ConfigError(
                f"{score.key} is a score of one network, and this is an ensemble: leave it out"
            )
        if score.needs == "networks" and not isinstance(module, Ensemble):
            raise ConfigError(f"{score.key} needs several networks, and this is one")
        if score.needs == "passes":
            refuse_without_dropout(module, config.model.name)
        if score.needs in OF_FEATURES:
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


@dataclass(frozen=True)
class Known:
    """Images that are not judged.

    Attributes:
        compared: Training images with which other images are compared, if a score does so.
        fitted_on: The images that a head is fitted on, if a score does so: those that
            `data.holdout` keeps apart, or else training images.
    """

    compared: Reference | None = None
    fitted_on: Reference | None = None


def known_images(
    config: Config,
    module: nn.Module,
    accelerator: Accelerator,
    scores: Sequence[Score],
    apart: ImageIndex | None = None,
) -> Known:
    """Return features, labels and logits of images that are not judged, as scores need them.

    All ranks call this function. If there are more than `REFERENCE_IMAGES` training images, a
    random part of them is used, which is the same each time. The images are prepared as for
    evaluation, without augmentation.

    Args:
        config: The configuration of the network.
        module: The network.
        accelerator: All its ranks take part.
        scores: The scores.
        apart: Training images that were never trained on.
    """
    compared = [score for score in scores if score.needs == "features"]
    fitted = [score for score in scores if score.needs == "head"]
    held = None
    if fitted and apart is not None:
        held, fitted = _reference(config, module, accelerator, fitted, apart), []
    of_training = None
    if compared or fitted:
        if config.data.train is not None and inputs.remote(config.data.train):
            inputs.download(config.data, accelerator, "train")
        classes = config.model.num_classes
        index = on_all_ranks(lambda: inputs.open_index(config.data, "train", classes))
        of_training = _reference(config, module, accelerator, [*compared, *fitted], index)
    return Known(of_training if compared else None, of_training if fitted else held)


def _reference(
    config: Config,
    module: nn.Module,
    accelerator: Accelerator,
    scores: Sequence[Score],
    index: ImageIndex,
) -> Reference:
    chosen = None
    if len(index) > REFERENCE_IMAGES:
        generator = np.random.default_rng(config.run.seed)
        chosen = np.sort(generator.choice(len(index), REFERENCE_IMAGES, replace=False))
    own = predict(config, module, index, accelerator, scores, samples=chosen)
    with_logits = any(score.needs == "head" for score in scores)
    found = gathered(own if with_logits else replace(own, logits=own.logits[:, :0]))
    assert found.features is not None  # a score needs them
    labels = index.label[found.samples].astype(np.int64)
    return Reference(found.features, labels, found.logits if with_logits else None)


def of_features(
    found: Prediction,
    known: Known,
    scores: Sequence[Score],
    classes: Sequence[int] | None,
) -> dict[str, np.ndarray]:
    """Return the scores of features [n] by key.

    Args:
        found: The predictions for all images.
        known: Images that are not judged.
        scores: The scores; those that need no features are left out.
        classes: The classes that compete, if they are a part of all classes. Then only known images
            of these classes are used.

    Raises:
        ConfigError: A score cannot be computed. The message names it.
    """
    logits, compared, fitted_on = found.logits, known.compared, known.fitted_on
    if classes is not None:
        logits = logits[:, list(classes)]
        compared = compared and compared.among(classes)
        fitted_on = fitted_on and fitted_on.among(classes)
    evidence = Evidence(
        features=found.features,
        prediction=logits.argmax(axis=1),
        reference=compared,
        fitted_on=fitted_on,
    )
    computed = {}
    for score in scores:
        if score.needs not in OF_FEATURES:
            continue
        try:
            computed[score.key] = score.compute(evidence)
        except ValueError as error:
            raise ConfigError(f"{score.key}: {error}") from None
    return computed


def wanted_scores(config: Config, module: nn.Module) -> list[Score]:
    """Return the scores that `evaluate.confidence` names, and for an ensemble those of networks."""
    several = isinstance(module, Ensemble)
    asked = config.evaluate.confidence
    return [s for s in SCORES if s.key in asked or (several and s.needs == "networks")]
