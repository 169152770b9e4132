"""The base of every error that storage raises on purpose.

Messages say what was expected, what was found, and what to do. They are built from one string, so that they
survive the trip from a Ray worker to the driver.
"""


class StorageError(Exception):
    """Something kept in a workspace is not as it should be."""


class StorageFull(StorageError):
    """No space is left (or a quota is used up) where something had to be written."""


class StoreError(StorageError):
    """A remote store fails, does not answer, or refuses: nothing is known of what was asked for."""
