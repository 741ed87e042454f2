"""The module from which users import DeepSpeed's engine. The code is in `engines`."""

from flatcal_dist.sharpness.engines.zero.engine import ZeroEngine, start_zero

__all__ = ["ZeroEngine", "start_zero"]
