"""What can be fitted to a trained network: calibrators, and sets of classes."""
