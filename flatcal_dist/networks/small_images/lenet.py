"""LeNet-5."""

from torch import nn

from flatcal_dist.networks.small_images.building import Chain, registered


@registered
def lenet5(
    img_size: int, num_classes: int = 10, in_chans: int = 3, drop_rate: float = 0.0
) -> nn.Module:
    """Build LeNet-5 (LeCun et al., Proceedings of the IEEE 1998, section II.B) as it is used today.

    It has two convolutions of 5 x 5 with 6 and 16 channels and three linear layers, with ReLU and
    the maximum of 2 x 2 pixels, as in FMFP. With 3 channels of 32 pixels and 10 classes it has
    62,006 parameters, as there. With 1 channel it has 61,706, and the paper's has 60,000: its
    second convolution sees a part of the channels only (900 fewer), its pooling has 44 weights, and
    its last layer is fixed (850 fewer).

    Args:
        img_size: The height and the width of an image in pixels, a multiple of 4 from 16 on. The
            first linear layer has 16 (img_size / 4 - 3)^2 inputs.
        num_classes: The number of logits.
        in_chans: The number of channels of an image.
        drop_rate: The share of the outputs of each hidden linear layer that dropout sets to zero.

    Raises:
        ValueError: Images of this size do not fit.
    """
    if img_size % 4 or img_size < 16:
        raise ValueError(f"lenet5 takes images of 16, 20, 24, ... pixels, not {img_size}")
    side = img_size // 4 - 3
    features = nn.Sequential(
        nn.Sequential(nn.Conv2d(in_chans, 6, 5), nn.ReLU(inplace=True), nn.MaxPool2d(2)),
        nn.Sequential(nn.Conv2d(6, 16, 5), nn.ReLU(inplace=True), nn.MaxPool2d(2)),
    )
    neck = nn.Sequential(
        nn.Flatten(),
        nn.Sequential(nn.Linear(16 * side**2, 120), nn.ReLU(inplace=True), nn.Dropout(drop_rate)),
        nn.Sequential(nn.Linear(120, 84), nn.ReLU(inplace=True), nn.Dropout(drop_rate)),
    )
    return Chain(features, neck, nn.Linear(84, num_classes))
