"""What is wrong with what a user gave."""

from flatcal_dist.urls import hide


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the key, its origin and the remedy.

    It never holds the credentials of a URL.
    """

    def __init__(self, text: str) -> None:
        super().__init__(hide(text))
