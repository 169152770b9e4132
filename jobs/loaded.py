"""What a worker keeps between its tasks, of some sets in turn: codecs, tables, an image store."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

from storage.images import ImageStore
from storage.workspace import Workspace

if TYPE_CHECKING:
    from pipeline.codec.artifact import Codec
    from pipeline.quantizers import Tables


@lru_cache(maxsize=4)
def loaded_codec(root: str, blob: str) -> Codec:
    """The codec of a blob; not to be changed."""
    from pipeline.codec.artifact import Codec

    return Codec.from_bytes(Workspace(root).blobs.get(blob))


@lru_cache(maxsize=4)
def loaded_tables(root: str, blob: str) -> Tables:
    """The tables of a blob: the same object, by which searches know what they have built."""
    from pipeline.quantizers import Tables

    return Tables.from_bytes(Workspace(root).blobs.get(blob))


@lru_cache(maxsize=1)
def loaded_images(root: str) -> ImageStore:
    """The image store of a workspace."""
    return ImageStore(Workspace(root))
