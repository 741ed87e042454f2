"""The errors of the data room."""

from flatcal_dist.urls import hide


class DataError(ValueError):
    """Data is not as expected. The message says where, what was expected, and how to mend it.

    The message never holds the credentials of a URL.
    """

    def __init__(self, *texts: str) -> None:
        super().__init__(*map(hide, texts))


class BadImage(DataError):
    """One image cannot be used, but all else is right. Training may use another one instead."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)
        self.name = name
        self.reason = reason

    def __str__(self) -> str:
        return (
            f"{self.name} {self.reason}. Replace the image and write its shard again, or leave the "
            "sample out."
        )
