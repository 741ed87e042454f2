# ruff: noqa: F401
"""What the server that ranks are forked from imports. It must start no thread and do nothing else.

A failed import here would be passed over in silence and cost seconds in every rank instead. (One
thread there is: pyarrow's jemalloc has one, and hooks of its own for fork.)
"""

import accelerate
import deepspeed.runtime.zero.muon.muon_optimizer  # with DeepSpeed's first engine: compilers, 2 s
import pytest
import timm.layers
import timm.optim
import torch.distributed.fsdp

import flatcal_dist.sharpness.engines.fsdp2
import flatcal_dist.sharpness.engines.zero
import flatcal_dist.training.main
