"""VGG-16 with batch norm for small images."""

from torch import nn

from flatcal_dist.networks.small_images.building import Chain, registered, reset_as_he

STAGES = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))  # channels, and convolutions of each


@registered
def vgg16_bn_cifar(
    img_size: int, num_classes: int = 10, in_chans: int = 3, drop_rate: float = 0.5
) -> nn.Module:
    """Build VGG-16 (Simonyan and Zisserman, ICLR 2015, table 1, column D) for small images.

    Each of the 13 convolutions has a batch norm. In place of the two linear layers with 4096
    outputs there are two with 512, each behind a dropout, as in FMFP. So the 138 M parameters of
    the paper (table 2, 1000 classes, 224 pixels) become 15,253,578 with 10 classes, as in FMFP.
    Images need at least 32 pixels. FMFP takes what comes before the two linear layers for the
    features of an image; here it is the input of the last layer.

    Args:
        img_size: The height and the width of an image in pixels, which decide nothing.
        num_classes: The number of logits.
        in_chans: The number of channels of an image.
        drop_rate: The share of values that each dropout sets to zero.

    Raises:
        ValueError: Images of this size are halved to nothing.
    """
    if img_size < 32:
        raise ValueError(f"vgg16_bn_cifar takes images of 32 pixels or more, not {img_size}")
    layers: list[nn.Module] = []
    before = in_chans
    for channels, count in STAGES:
        for number in range(count):
            conv = nn.Conv2d(before, channels, 3, padding=1)
            layer = nn.Sequential(conv, nn.BatchNorm2d(channels), nn.ReLU(inplace=True))
            if number == count - 1:
                layer.append(nn.MaxPool2d(2))
            layers.append(layer)
            before = channels
    neck = nn.Sequential(
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        nn.Sequential(nn.Dropout(drop_rate), nn.Linear(512, 512), nn.ReLU(inplace=True)),
        nn.Sequential(nn.Dropout(drop_rate), nn.Linear(512, 512), nn.ReLU(inplace=True)),
    )
    network = Chain(nn.Sequential(*layers), neck, nn.Linear(512, num_classes))
    reset_as_he(network)
    return network
