r"""Train an ImageNet network with plain SGD, evaluate it, and write its calibration report.

    accelerate launch --config_file configs/accelerate/node_ddp.yaml recipes/imagenet_sgd.py \
        --config configs/imagenet/resnet50_sgd.yaml data.train='SHARDS' data.validation='SHARDS'
"""

from pathlib import Path

from flatcal_dist.training.main import main

CONFIG = Path(__file__).parents[1] / "configs/imagenet/resnet50_sgd.yaml"

if __name__ == "__main__":
    main(CONFIG, __doc__)
