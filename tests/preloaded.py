"""What the server that ranks are forked from imports. It must start no thread and do nothing else.

A failed import here would be passed over in silence and cost seconds in every rank instead.
"""

import accelerate  # noqa: F401
import pytest  # noqa: F401
import timm.layers
import timm.optim  # noqa: F401
import torch.distributed.fsdp  # noqa: F401

import flatcal_dist.sharpness.fsdp2
import flatcal_dist.sharpness.zero
import flatcal_dist.training.main  # noqa: F401
