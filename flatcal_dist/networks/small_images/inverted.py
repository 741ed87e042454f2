"""Networks of inverted residuals for small images: MobileNetV2 and EfficientNet-B0.

Both are timm's `EfficientNet` with other strides. Both take `drop_path_rate` (stochastic depth,
which the EfficientNet paper calls drop connect) and `drop_rate`.
"""

from typing import Any

from timm.layers import Swish
from timm.models._efficientnet_builder import decode_arch_def
from timm.models.efficientnet import EfficientNet
from torch import nn

from flatcal_dist.networks.small_images.building import registered, reset_as_he

# r: blocks, k: kernel, s: stride of the first, e: expansion, c: channels, se: squeeze-excitation.
MOBILENET = [
    ["ir_r1_k3_s1_e1_c16"],
    ["ir_r2_k3_s1_e6_c24"],
    ["ir_r3_k3_s1_e6_c32"],
    ["ir_r4_k3_s2_e6_c64"],
    ["ir_r3_k3_s1_e6_c96"],
    ["ir_r3_k3_s2_e6_c160"],
    ["ir_r1_k3_s1_e6_c320"],
]
EFFICIENTNET_B0 = [
    ["ds_r1_k3_s1_e1_c16_se0.25"],
    ["ir_r2_k3_s2_e6_c24_se0.25"],
    ["ir_r2_k5_s2_e6_c40_se0.25"],
    ["ir_r3_k3_s2_e6_c80_se0.25"],
    ["ir_r3_k5_s1_e6_c112_se0.25"],
    ["ir_r4_k5_s1_e6_c192_se0.25"],
    ["ir_r1_k3_s1_e6_c320_se0.25"],
]


@registered
def mobilenetv2_cifar(**options: Any) -> nn.Module:
    """Build MobileNetV2 (Sandler et al., CVPR 2018, table 2) for small images.

    Strides are FMFP's: 1 but for two blocks, so that the last map has 8 x 8 pixels of 32 x 32. As
    there, the first block has a convolution of 1 x 1 before its depthwise one, also at expansion 1.
    The paper's has none (1,088 parameters fewer). The paper gives 3.4 M parameters for 1000 classes
    (table 4), which is its layers without norms (3,470,760; with norms 3,504,872), cut off. With 10
    classes this one has 2,237,770, as in FMFP.
    """
    network = _inverted(MOBILENET, nn.ReLU6, **options)
    reset_as_he(network)
    return network


@registered
def efficientnet_b0_cifar(**options: Any) -> nn.Module:
    """Build EfficientNet-B0 (Tan and Le, ICML 2019, table 1) for small images.

    Strides are FMFP's: 1 in the stem and in the block of 192 channels, so that the last map has
    4 x 4 pixels of 32 x 32. The paper gives 5.3 M parameters for 1000 classes (table 2); with 10 it
    has 4,020,358, as in FMFP. Dropout before the last layer is 0.2, as in the paper and in FMFP.

    By default there is no drop connect, which FMFP has replaced by the identity; the paper's is
    `drop_path_rate=0.2`. Three things of FMFP are left out: an epsilon of 0.1 and 0.9 in some norms
    (a momentum in the wrong place), a momentum of 0.9 in the first norm and 0.01 in others (here
    torch's 0.1), and smaller initial weights of depthwise convolutions (here those of the
    authors). Convolutions of stride 2 pad as in TensorFlow, as there.
    """
    options = {"drop_rate": 0.2, "pad_type": "same", **options}
    return _inverted(EFFICIENTNET_B0, Swish, **options)


def _inverted(
    blocks: list[list[str]], activation: type[nn.Module], /, **options: Any
) -> EfficientNet:
    network = EfficientNet(
        decode_arch_def(blocks),
        act_layer=activation,
        **{"num_classes": 10, **options},
    )
    network.conv_stem.stride = (1, 1)
    return network
