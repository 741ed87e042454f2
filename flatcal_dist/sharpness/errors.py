class StepError(ValueError):
    """A rule, scope or engine cannot do something. The message says why, and what to do instead."""
