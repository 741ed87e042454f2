"""The name that users import DeepSpeed's engine by; it lives in `engines`."""

from flatcal_dist.sharpness.engines.zero import ZeroEngine, start_zero

__all__ = ["ZeroEngine", "start_zero"]
