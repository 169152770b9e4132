"""A workspace: one root under which everything a project computes is kept."""

from __future__ import annotations

import json
from pathlib import Path

from storage.blobs import Blobs
from storage.errors import StorageError
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
        """Use `Workspace.open`, which looks at the version."""
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
        """
        if not create and "://" not in root and not Path(root).expanduser().is_dir():
            raise WorkspaceError(_missing(root))
        workspace = cls(root)
        if create:
            workspace.create(_MARK, canonical_json({"version": VERSION}) + b"\n")
        workspace._check_version()
        return workspace

    def __reduce__(self) -> tuple[type[Workspace], tuple[str]]:
        return (Workspace, (self.root,))

    def _check_version(self) -> None:
        try:
            data = self.get(_MARK)
        except FileNotFoundError:
            raise WorkspaceError(_missing(self.root)) from None
        try:
            found = json.loads(data)["version"]
        except (ValueError, KeyError, TypeError):
            found = f"{data[:40]!r}"
        if found != VERSION:
            raise WorkspaceVersionError(
                f"workspace {self.root}: expected version {VERSION}, found {found} in {_MARK}. Use the "
                "version of retrellis that made it, or name another workspace by --workspace."
            )


def _missing(root: str) -> str:
    return (
        f"no workspace at {root}: expected a file {_MARK} there. Name another place by --workspace or "
        "RETRELLIS_WORKSPACE, or start one with `retrellis run`."
    )
