"""ZeRO: the optimizer's state, gradients and weights in parts, through DeepSpeed."""
