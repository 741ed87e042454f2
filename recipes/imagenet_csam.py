r"""Train an ImageNet network with CSAM, evaluate it, and write its calibration report.

    accelerate launch --config_file configs/accelerate/node_ddp.yaml recipes/imagenet_csam.py \
        --config configs/imagenet/resnet50_csam.yaml data.train='SHARDS' data.validation='SHARDS'

The same on this machine's CPUs, with handwritten digits that need no preparation:

    accelerate launch --config_file configs/accelerate/cpu_ddp.yaml recipes/imagenet_csam.py \
        --config configs/digits/csam.yaml

Any recipe runs any configuration. flatcal_dist/training/loop.py takes the steps, and calls
flatcal_dist/sharpness/step.py. The step asks rules/ what to compute, and engines/ how to do so.
"""

from pathlib import Path

from flatcal_dist.training.main import main

CONFIG = Path(__file__).parents[1] / "configs/imagenet/resnet50_csam.yaml"

if __name__ == "__main__":
    main(CONFIG, __doc__)
