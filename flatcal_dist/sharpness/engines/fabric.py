"""What Lightning Fabric wraps around a network, found without importing it."""

from torch import nn

from flatcal_dist.sharpness.errors import StepError


def within_fabric(model: nn.Module) -> nn.Module:
    """Return the network that was given to `Fabric.setup`, or the model where Fabric is not used.

    Raises:
        StepError: Fabric was given a mixed precision, in which its modules allow no backward pass
            except by `Fabric.backward`.
    """
    if not _is_fabric(model):
        return model
    chosen = getattr(getattr(model, "_strategy", None), "precision", None)
    precision = getattr(chosen, "precision", "32-true")
    if precision.endswith("-mixed"):
        raise StepError(
            f"Fabric was given precision={precision!r}, and then has to run each backward pass "
            "itself, which the step must do: leave `precision` out, call the step within "
            "torch.autocast(device, dtype), and give the engine compute_dtype=dtype"
        )
    original = model._original_module
    assert isinstance(original, nn.Module)
    return original


def _is_fabric(model: nn.Module) -> bool:
    # Of the package lightning_fabric or of lightning.fabric, which hold the same.
    return type(model).__module__.startswith("lightning") and hasattr(model, "_original_module")
