"""Errors about what a user gave."""

from flatcal_dist.urls import hide


class ConfigError(ValueError):
    """A configuration cannot be used. The message names the key, its origin and the remedy.

    The message never holds the credentials of a URL.
    """

    def __init__(self, text: str) -> None:
        super().__init__(hide(text))
