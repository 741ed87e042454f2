"""Checkpoints: their format, saving beside training, and cutting for other ranks."""
