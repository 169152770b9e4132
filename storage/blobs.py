"""Blobs: immutable bytes named by their own SHA-256. Codecs, tables, scores, metrics and reports lie here."""

from __future__ import annotations

from storage.errors import StorageError
from storage.keys import sha256
from storage.objects import Objects

_ADVICE = "Restore it from a backup, or move the records in records/results that name it away and run again."


class BlobError(StorageError):
    """A blob is missing, or is not what its name says."""


class Blobs:
    """The blobs of a workspace, at `blobs/<first two digits>/<digest><suffix>`. Suffixes are for people."""

    def __init__(self, objects: Objects) -> None:
        """Blobs inside `objects`."""
        self._objects = objects

    def put(self, data: bytes, suffix: str) -> str:
        """Keep bytes; return their digest, 64 hex digits.

        Bytes that are kept already are not written again, whatever their suffix; a damaged blob is mended.

        Args:
            suffix: such as ".safetensors", or "".

        Raises:
            StorageFull: nothing was written.
        """
        digest = sha256(data)
        name = self._find(digest)
        if name is None or self._objects.get(name) != data:
            self._objects.put(name or f"{self._folder(digest)}/{digest}{suffix}", data)
        return digest

    def get(self, digest: str) -> bytes:
        """The bytes, verified against their digest.

        Raises:
            BlobError: it says which blob, what was expected and what was found.
        """
        name = self._required(digest)
        data = self._objects.get(name)
        found = sha256(data)
        if found != digest:
            raise BlobError(
                f"blob {self._objects.path(name)} is damaged: expected SHA-256 {digest}, found {found} in "
                f"{len(data):,} bytes. {_ADVICE}"
            )
        return data

    def path(self, digest: str) -> str:
        """Where a blob lies: a file's path or a URL, to be shown. Raises BlobError if there is none."""
        return self._objects.path(self._required(digest))

    def _find(self, digest: str) -> str | None:
        folder = self._folder(digest)
        names = self._objects.list(folder)
        return next((name for name in names if name.startswith(f"{folder}/{digest}")), None)

    def _required(self, digest: str) -> str:
        name = self._find(digest)
        if name is None:
            raise BlobError(
                f"blob {digest} is missing: expected it in {self._objects.path(self._folder(digest))}. "
                f"{_ADVICE}"
            )
        return name

    @staticmethod
    def _folder(digest: str) -> str:
        return f"blobs/{digest[:2]}"
