"""Blobs: named by their content, verified when read."""

from __future__ import annotations

import hashlib

import pytest

from storage.blobs import BlobError
from storage.workspace import Workspace

DATA = b"weights"
NAME = hashlib.sha256(DATA).hexdigest()


@pytest.fixture
def workspace(place: str) -> Workspace:
    return Workspace.open(place)


def test_blob_is_kept_once_whatever_its_suffix(workspace: Workspace) -> None:
    assert workspace.blobs.put(DATA, ".safetensors") == NAME
    assert workspace.blobs.put(DATA, ".bin") == NAME
    assert workspace.blobs.get(NAME) == DATA
    assert workspace.list("blobs") == [f"blobs/{NAME[:2]}/{NAME}.safetensors"]
    assert workspace.blobs.path(NAME) == f"{workspace.root}/blobs/{NAME[:2]}/{NAME}.safetensors"
    assert workspace.blobs.get(workspace.blobs.put(b"", "")) == b""


def test_missing_blob_is_named(workspace: Workspace) -> None:
    for read in (workspace.blobs.get, workspace.blobs.path):
        with pytest.raises(BlobError, match=f"blob {NAME} is missing: expected it in .*move the records"):
            read(NAME)


@pytest.mark.parametrize("damaged", [b"", b"weight", b"Weights"])
def test_damaged_blob_is_named_and_mended_by_putting_it_again(workspace: Workspace, damaged: bytes) -> None:
    workspace.blobs.put(DATA, ".bin")
    workspace.put(workspace.blobs.path(NAME).removeprefix(f"{workspace.root}/"), damaged)
    found = hashlib.sha256(damaged).hexdigest()
    with pytest.raises(BlobError, match=rf"{NAME}.bin is damaged: expected SHA-256 {NAME}, found {found} in"):
        workspace.blobs.get(NAME)
    workspace.blobs.put(DATA, "")
    assert workspace.blobs.get(NAME) == DATA
