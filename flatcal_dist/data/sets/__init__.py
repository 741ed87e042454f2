"""Data sets by name: ImageNet, its variants, and trees of images."""
