"""The one error of the data room."""


class DataError(ValueError):
    """Data is not what it must be: the message names where, what was expected, how to mend it."""
