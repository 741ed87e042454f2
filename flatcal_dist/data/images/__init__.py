"""Decoding, augmentation, mixing and corruption of images."""
