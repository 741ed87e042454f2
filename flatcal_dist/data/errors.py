"""The errors of the data room."""


class DataError(ValueError):
    """Data is not what it must be: the message names where, what was expected, how to mend it."""


class BadImage(DataError):
    """One image cannot be used; training may put another in its place. Says only why."""
