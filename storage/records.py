"""Records: small JSON objects, created if absent, never changed. Data counts only if a record names it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from storage.errors import StorageError, StoreError
from storage.keys import canonical_json
from storage.objects import Objects

_FOLDER = "records"
_SUFFIX = ".json"


class RecordError(StorageError):
    """A record is torn, empty or garbled."""


class Records:
    """The records of a workspace, by names such as "results/train/<key>", at `records/<name>.json`."""

    def __init__(self, objects: Objects) -> None:
        """Records inside `objects`."""
        self._objects = objects

    def create(self, name: str, body: Mapping[str, Any]) -> bool:
        """Create a record unless there is one; on a local folder it is on the disk on return.

        Args:
            body: JSON values; `body["attempt"]` is this attempt's uuid, by which a writer knows its own
                record again when the store's answer to it was lost.

        Returns:
            Whether the record is this attempt's. If not, `get` gives the winner's.

        Raises:
            StorageFull: nothing was written.
            StoreError: a remote store does not answer; the record may be there or not.
            RecordError: there is a record of that name, and it cannot be read.
            TypeError, ValueError: the body is not JSON.
        """
        if not isinstance(body.get("attempt"), str):
            raise ValueError(f"expected the record {name!r} to have a field 'attempt', found {sorted(body)}")
        data = canonical_json(body) + b"\n"
        try:
            if self._objects.create(self._object(name), data):
                return True
            found = self.get(name)
        except StoreError:  # the request failed, or was done and the answer lost
            found = self.get(name)
            if found is None:
                raise
        return found is not None and found["attempt"] == body["attempt"]

    def get(self, name: str) -> dict[str, Any] | None:
        """The record's body, or None if there is none.

        Raises:
            RecordError: it is not a JSON object with an attempt, as every record is when it is created.
        """
        try:
            data = self._objects.get(self._object(name))
        except FileNotFoundError:
            return None
        try:
            body = json.loads(data)
        except ValueError as error:  # not JSON, or not UTF-8
            raise RecordError(self._broken(name, data, str(error))) from error
        if not isinstance(body, dict) or not isinstance(body.get("attempt"), str):
            raise RecordError(self._broken(name, data, "no JSON object with a field 'attempt'"))
        return body

    def list(self, prefix: str) -> list[str]:
        """Sorted names of all records in the folder `prefix`, such as "results/train", and below it."""
        names = self._objects.list(f"{_FOLDER}/{prefix}")
        return [name[len(_FOLDER) + 1 : -len(_SUFFIX)] for name in names if name.endswith(_SUFFIX)]

    def load(self, prefix: str, known: dict[str, dict[str, Any]] | None = None) -> dict[str, dict[str, Any]]:
        """All records in the folder `prefix` and below it, sorted by name. Raises RecordError.

        Args:
            known: records read before, which do not change and are not read again; those read now are added.
        """
        known = {} if known is None else known
        names = self.list(prefix)
        unknown = [name for name in names if name not in known]
        read = zip(unknown, self._objects.each(self.get, unknown), strict=True)
        known |= {name: body for name, body in read if body is not None}
        return {name: known[name] for name in names if name in known}

    def _broken(self, name: str, data: bytes, reason: str) -> str:
        return (
            f"record {name!r} cannot be read: expected a JSON object, found {len(data)} bytes: {reason}. "
            "Records are written whole, so the disk or a hand has changed it. Restore "
            f"{self._objects.path(self._object(name))} from a backup, or move it away: then what it names "
            "counts as not done and is computed again."
        )

    @staticmethod
    def _object(name: str) -> str:
        return f"{_FOLDER}/{name}{_SUFFIX}"
