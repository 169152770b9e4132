"""A workspace: one root under which everything a project computes is kept."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

from storage.blobs import Blobs
from storage.errors import StorageError, StoreError
from storage.keys import canonical_json
from storage.objects import Objects
from storage.records import Records

VERSION = 1
_MARK = "workspace.json"


class WorkspaceError(StorageError):
    """There is no workspace at a place."""


class WorkspaceVersionError(WorkspaceError):
    """A workspace is laid out as another version of this program has it."""


class Workspace(Objects):
    """Objects with records and blobs among them, and the version of their layout in `workspace.json`.

    It pickles as its root: a Ray task that is given one opens it anew.
    """

    def __init__(self, root: str) -> None:
        """For a worker, whose driver has looked at the version; all others use `Workspace.open`, which does."""
        super().__init__(root)
        self.records = Records(self)
        self.blobs = Blobs(self)

    @classmethod
    def open(cls, root: str, create: bool = True) -> Workspace:
        """Open the workspace at a folder or an `s3://` URL.

        Args:
            create: make a workspace where there is none.

        Raises:
            WorkspaceVersionError: it has another layout than this version of the program.
            WorkspaceError: there is none, and `create` is False.
            StoreError: within seconds, if a remote store cannot be reached, refuses, or creates no object atomically.
        """
        if not create and "://" not in root and not Path(root).expanduser().is_dir():
            raise WorkspaceError(_missing(root))
        _check_version(root, _mark(Objects(root, patient=False), create))
        return cls(root)

    def __reduce__(self) -> tuple[type[Workspace], tuple[str]]:
        return (Workspace, (self.root,))


def _mark(objects: Objects, create: bool) -> bytes:
    """What a workspace says of its layout, in a new one if there is none and it may be made."""
    with suppress(FileNotFoundError):
        return objects.get(_MARK)
    if not create:
        raise WorkspaceError(_missing(objects.root))
    new = canonical_json({"version": VERSION}) + b"\n"
    objects.create(_MARK, new)
    if objects.create(_MARK, new):
        raise StoreError(
            f"workspace {objects.root}: expected a store that creates an object only if there is none, found one that "
            "replaces it, so that two runs would take the same work for theirs. Take a server that knows "
            "If-None-Match: * (docs/storage.md names some)."
        )
    return objects.get(_MARK)


def _check_version(root: str, mark: bytes) -> None:
    try:
        found = json.loads(mark)["version"]
    except (ValueError, KeyError, TypeError):
        found = f"{mark[:40]!r}"
    if found != VERSION:
        raise WorkspaceVersionError(
            f"workspace {root}: expected version {VERSION}, found {found} in {_MARK}. Use the "
            "version of retrellis that made it, or name another workspace by --workspace."
        )


def _missing(root: str) -> str:
    return (
        f"no workspace at {root}: expected a file {_MARK} there. Name another place by --workspace or "
        "RETRELLIS_WORKSPACE, or start one with `retrellis run`."
    )
