class StepError(ValueError):
    """What a rule, scope or engine cannot do; the message gives the reason and the alternatives."""
