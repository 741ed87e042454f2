"""The self-check: whether a step on these ranks is the step of the paper."""
