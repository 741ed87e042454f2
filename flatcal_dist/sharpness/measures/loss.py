"""The mean loss over the images of all ranks, its gradient, and products with its Hessian.

The weights of the network are never changed. Each pass gets its weights as arguments
(`torch.func.functional_call`), so nothing has to be restored afterwards.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy

from flatcal_dist.sharpness.passes.outputs import logits_of

Batch = tuple[Tensor, Tensor]  # images [N, ...] and class indices [N]


class MeasureError(ValueError):
    """Sharpness cannot be measured. The message says why, and what to do instead."""


class MeanLoss:
    """The mean cross-entropy of a network in evaluation mode, as a function of its weights.

    Each rank holds whole groups of the images. Sums go over all ranks, so no value depends on the
    number of ranks, except for rounding. All ranks call all methods, except `of_group` and
    `gradient_of_group`. Weight decay is no part of this loss.

    Vectors have one value for each weight that can be trained, in the order of `names`.

    Args:
        module: The network. It gives logits [N, K].
        groups: The groups of this rank. Each is a list of batches, which are passed one by one.
        prepare: Changes images before they enter the network, such as a normalization on its
            device.
        classes: The classes that compete, if they are a part of all classes. Labels count them.

    Raises:
        MeasureError: The network has no weights, or no rank has an image.
    """

    def __init__(
        self,
        module: nn.Module,
        groups: Sequence[Sequence[Batch]],
        prepare: Callable[[Tensor], Tensor] = lambda images: images,
        classes: Sequence[int] | None = None,
    ) -> None:
        trained = {n: w.detach() for n, w in module.named_parameters() if w.requires_grad}
        if not trained:
            raise MeasureError("the network has no weights that can be trained: nothing is sharp")
        self.module, self.groups, self.prepare = module, groups, prepare
        self.classes = None if classes is None else list(classes)
        self.names, self.weights = list(trained), list(trained.values())
        self.size = sum(weight.numel() for weight in self.weights)
        self.device = self.weights[0].device
        own = [sum(len(labels) for _, labels in group) for group in groups]
        self.images, self.group_count = (round(n) for n in self.summed([sum(own), len(own)]))
        if not self.images:
            raise MeasureError("there are no images to measure sharpness on")

    def check(self) -> None:
        """Try one image of this rank. Other ranks are not needed.

        Raises:
            MeasureError: The network cannot be differentiated twice.
        """
        for images, labels in (batch for group in self.groups[:1] for batch in group[:1]):
            with _evaluating(self.module):
                self._curvature((images[:1], labels[:1]), self.parts(self.zeros()))

    def value(self, step: Tensor | None = None) -> float:
        """Return the mean loss at w, or at w + step.

        Raises:
            MeasureError: The loss is not finite.
        """
        batches = [batch for group in self.groups for batch in group]
        found = self.summed([self._sum(batches, step)])[0] / self.images
        if not math.isfinite(found):
            far = "at" if step is None else f"{float(step.norm()):.3g} from"
            raise MeasureError(
                f"the mean loss of {self.images:,} images {far} the weights is {found}: sharpness "
                "is not defined. Look for NaN in the weights and images, or choose a smaller rho"
            )
        return found

    def of_group(self, group: Sequence[Batch], step: Tensor | None = None) -> float:
        """Return the mean loss of one group of this rank at w, or at w + step."""
        return self._sum(group, step) / sum(len(labels) for _, labels in group)

    def gradient(self) -> Tensor:
        """Return the gradient of the mean loss at w.

        Raises:
            MeasureError: It is not finite.
        """
        total = self.zeros()
        for group in self.groups:
            for batch in group:
                total += self._gradient(batch)
        return self._finite(self._over_ranks(total) / self.images, "gradient")

    def gradient_of_group(self, group: Sequence[Batch]) -> Tensor:
        """Return the gradient of the mean loss of one group of this rank at w."""
        total = self.zeros()
        for batch in group:
            total += self._gradient(batch)
        return total / sum(len(labels) for _, labels in group)

    def hessian_times(self, vector: Tensor) -> Tensor:
        """Return the product of the Hessian of the mean loss at w with a vector.

        Raises:
            MeasureError: The network cannot be differentiated twice, or the product is not finite.
        """
        total, parts = self.zeros(), self.parts(vector)
        with _evaluating(self.module):
            for group in self.groups:
                for batch in group:
                    total += self._curvature(batch, parts)
        return self._finite(self._over_ranks(total) / self.images, "product with the Hessian")

    def zeros(self) -> Tensor:
        """Return a vector of zeros."""
        return torch.zeros(self.size, dtype=self.weights[0].dtype, device=self.device)

    def parts(self, vector: Tensor) -> list[Tensor]:
        """Return the parts of a vector, each in the shape and type of its weight."""
        pieces = vector.split([weight.numel() for weight in self.weights])
        return [p.view_as(w).to(w.dtype) for p, w in zip(pieces, self.weights, strict=True)]

    def flat(self, parts: Sequence[Tensor]) -> Tensor:
        """Return one vector of parts in the shapes of the weights."""
        return torch.cat([part.reshape(-1).to(self.weights[0].dtype) for part in parts])

    def summed(self, values: Sequence[float]) -> list[float]:
        """Return the sums of numbers over all ranks."""
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        return self._over_ranks(total).tolist()

    @staticmethod
    def _over_ranks(tensor: Tensor) -> Tensor:
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(tensor)
        return tensor

    def _finite(self, vector: Tensor, name: str) -> Tensor:
        if not bool(vector.isfinite().all()):
            raise MeasureError(
                f"the {name} of the mean loss of {self.images:,} images is not finite: sharpness "
                "is not defined. Look for NaN in the weights and images"
            )
        return vector

    def _losses(self, batch: Batch, weights: Sequence[Tensor]) -> Tensor:
        """Return the sum of the losses of a batch at these weights, in evaluation mode."""
        images, labels = batch
        named = dict(zip(self.names, weights, strict=True))
        logits = logits_of(functional_call(self.module, named, (self.prepare(images),)))
        logits = logits if self.classes is None else logits[:, self.classes]
        return cross_entropy(logits, labels.to(logits.device), reduction="sum")

    @torch.no_grad()
    def _sum(self, batches: Sequence[Batch], step: Tensor | None) -> float:
        """Return the sum of the losses of batches of this rank at w + step."""
        weights = self.weights
        if step is not None:
            weights = [w + part for w, part in zip(weights, self.parts(step), strict=True)]
        with _evaluating(self.module):
            return math.fsum(float(self._losses(batch, weights)) for batch in batches)

    def _gradient(self, batch: Batch) -> Tensor:
        """Return the gradient of the sum of the losses of a batch."""
        with _evaluating(self.module), torch.enable_grad():
            weights = [weight.clone().requires_grad_() for weight in self.weights]
            loss = self._losses(batch, weights)
            return self.flat(torch.autograd.grad(loss, weights, materialize_grads=True))

    def _curvature(self, batch: Batch, parts: Sequence[Tensor]) -> Tensor:
        """Return the Hessian of the sum of the losses of a batch, times a vector.

        The gradient is differentiated backward, since most operations have this derivative.
        """
        try:
            with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
                weights = [weight.clone().requires_grad_() for weight in self.weights]
                loss = self._losses(batch, weights)
                gradient = torch.autograd.grad(
                    loss, weights, create_graph=True, materialize_grads=True
                )
                along = sum((g * p).sum() for g, p in zip(gradient, parts, strict=True))
                if not (isinstance(along, Tensor) and along.requires_grad):
                    return self.zeros()  # the loss is linear in the weights
                along.backward()  # of all leaves: `grad` would skip layers that refuse it
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError) or not _is_about_derivatives(error):
                raise
            raise MeasureError(
                "the network cannot be differentiated twice, which the Hessian needs: "
                f"{str(error).splitlines()[0]}. Build it without fused or custom layers"
            ) from error
        return self.flat([torch.zeros_like(w) if w.grad is None else w.grad for w in weights])


def _is_about_derivatives(error: RuntimeError) -> bool:
    signs = ("derivative for", "not implemented", "once_differentiable", "does not require grad")
    return any(sign in str(error) for sign in signs)


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Put a network into evaluation mode, without autocast and TF32, and restore all afterwards."""
    modes = {one: one.training for one in module.modules()}
    tf32 = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    device = next(module.parameters()).device.type
    module.eval()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        with torch.autocast(device, enabled=False):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = tf32
        for one, training in modes.items():
            one.training = training
