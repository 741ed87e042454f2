"""Several predictions for one image, by passes with dropout or by several networks."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from flatcal_dist.config import ConfigError
from flatcal_dist.sharpness.passes.outputs import logits_of

PASSES = 32  # passes with dropout for each image


def dropout_layers(module: nn.Module) -> list[nn.Module]:
    """Return the modules that drop values in training.

    These are layers of dropout, and modules with an attribute `drop_rate`, which call dropout as a
    function (in timm and torchvision). Stochastic depth is no dropout.
    """
    return [
        layer
        for layer in module.modules()
        if (isinstance(layer, _DropoutNd) and layer.p > 0)
        or (
            isinstance(rate := vars(layer).get("drop_rate"), float) and rate > 0
        )  # `vars` leaves wrappers out
    ]


def refuse_without_dropout(module: nn.Module, name: str) -> None:
    """Raise ConfigError, with the `name` of the network, if it has no dropout."""
    if not dropout_layers(module):
        raise ConfigError(
            f"mc_dropout needs a network with dropout, and {name} has none: train it with some, "
            "such as model.options={drop_rate: 0.1}, or leave mc_dropout out of evaluate.confidence"
        )


@contextmanager
def with_dropout(module: nn.Module, name: str) -> Iterator[None]:
    """Make dropout active inside, and change nothing else, such as the mode of norm layers.

    Raises ConfigError, with the `name` of the network, if it has no dropout.
    """
    refuse_without_dropout(module, name)
    layers = dropout_layers(module)
    before = [layer.training for layer in layers]
    try:
        for layer in layers:
            layer.training = True  # `train()` would also change its children
        yield
    finally:
        for layer, training in zip(layers, before, strict=True):
            layer.training = training


def passes_with_dropout(module: nn.Module, name: str, images: Tensor, seed: int) -> Tensor:
    """Return logits [T, N, K] float32 of `PASSES` passes of a network in evaluation mode.

    The random stream of torch is not restored.

    Args:
        module: The network.
        name: What errors call the network.
        images: A batch of images.
        seed: The seed from which the masks of dropout follow.

    Raises:
        ConfigError: The network has no dropout.
    """
    with with_dropout(module, name):
        torch.manual_seed(seed)
        return torch.stack([logits_of(module(images)).float() for _ in range(PASSES)])


class Ensemble(nn.Module):
    """Several networks whose probabilities are averaged.

    Source: Lakshminarayanan, Pritzel and Blundell, Simple and Scalable Predictive Uncertainty
    Estimation using Deep Ensembles (NeurIPS 2017), section 2.4.
    """

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        super().__init__()
        if len(networks) < 2:
            raise ValueError(f"an ensemble has two networks or more, not {len(networks)}")
        self.networks = nn.ModuleList(networks)

    def answers(self, images: Tensor) -> Tensor:
        """Return the logits [M, N, K] float64 of all networks."""
        return torch.stack([logits_of(network(images)).double() for network in self.networks])

    def forward(self, images: Tensor) -> Tensor:
        """Return the logarithms [N, K] float64 of the mean of the probabilities."""
        return self.mean(self.answers(images))

    @staticmethod
    def mean(answers: Tensor) -> Tensor:
        """Return the logarithms [N, K] of the mean of the probabilities of logits [M, N, K]."""
        summed = answers.log_softmax(dim=2).logsumexp(dim=0)
        return summed - torch.tensor(len(answers), dtype=answers.dtype).log().to(summed.device)
