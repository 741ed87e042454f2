"""What Lightning Fabric wraps around a network, found without importing it."""

from torch import nn

from flatcal_dist.sharpness.errors import StepError


def within_fabric(model: nn.Module) -> nn.Module:
    """The network that was given to `Fabric.setup`, or the model itself where Fabric is not used.

    Raises:
        StepError: Fabric was told a mixed precision, in which its modules allow no backward pass
            but by `Fabric.backward`.
    """
    if not _is_fabric(model):
        return model
    precision = getattr(model._strategy.precision, "precision", "32-true")
    if precision.endswith("-mixed"):
        raise StepError(
            f"Fabric was given precision={precision!r}, and then wants to run each backward pass "
            "itself, where the step has to: leave `precision` out, call the step within "
            "torch.autocast(device, dtype), and give the engine compute_dtype=dtype"
        )
    return model._original_module


def _is_fabric(model: nn.Module) -> bool:
    # Of the package lightning_fabric or of lightning.fabric, which hold the same.
    return type(model).__module__.startswith("lightning") and hasattr(model, "_original_module")
