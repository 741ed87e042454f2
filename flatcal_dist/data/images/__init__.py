"""From encoded images to tensors: decoding, augmentation, mixing, corruption."""
