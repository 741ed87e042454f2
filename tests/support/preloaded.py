# ruff: noqa: F401
"""What the server that ranks are forked from imports. It must start no thread and do nothing else.

A failed import here would be passed over in silence and cost seconds in every rank instead. (One
thread there is: pyarrow's jemalloc has one, and hooks of its own for fork.)

What was imported is frozen: a collection of garbage in a rank would look through millions of
objects, which takes a third of a second, and ZeRO-3 collects whenever an engine starts.
"""

import gc

import accelerate
import deepspeed.runtime.zero.muon.muon_optimizer  # with DeepSpeed's first engine: compilers, 2 s
import pytest
import sklearn.isotonic
import sklearn.neighbors
import timm.layers
import timm.optim
import torch.distributed.fsdp

import flatcal_dist.calibration.report.writing
import flatcal_dist.evaluation.job
import flatcal_dist.sharpness.engines.fsdp2
import flatcal_dist.sharpness.engines.zero
import flatcal_dist.training.dry_run
import flatcal_dist.training.loop
import flatcal_dist.training.main
import tests.support.engines  # with setuptools, by DeepSpeed
import tests.support.reference
import tests.support.zoo

gc.collect()
gc.freeze()
