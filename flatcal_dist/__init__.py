"""Sharpness-aware training of image networks over many GPUs, ending in a calibration report."""
