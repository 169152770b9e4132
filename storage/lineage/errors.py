"""What goes wrong between the records and MLflow."""

from __future__ import annotations

from storage.errors import StorageError


class LineageUnavailable(StorageError):
    """MLflow cannot be written to just now. Nothing is lost: the records have everything."""


def unavailable(reason: str) -> LineageUnavailable:
    """The error for a reason that names the place and what was found there."""
    return LineageUnavailable(
        f"{reason}. Nothing is lost, the records have everything: run `retrellis sync` when this is mended."
    )
