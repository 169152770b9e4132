"""Writing local files so that a kill or a power cut leaves either all of a file or none of it."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from storage.errors import StorageFull


def write_file(path: Path, data: bytes | memoryview, *, replace: bool) -> bool:
    """Write a file and the way to it, flushed to the disk before it has its name.

    Args:
        path: its directory is made if need be.
        replace: False leaves a file that is there already as it is.

    Returns:
        Whether this call wrote it: False only when `replace` is False and the file existed.

    Raises:
        StorageFull: nothing is left behind, and what had the name before still has it.
    """
    with naming_full_disk(path, len(data)):
        make_directory(path.parent)
        # obstore lists no names that end in '#' and digits: a killed writer's leftover stays out of sight
        temporary = path.with_name(f"{path.name}#{secrets.randbits(63)}")
        try:
            with temporary.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            written = _publish(temporary, path, replace)
        finally:
            temporary.unlink(missing_ok=True)
        sync_directory(path.parent)
    return written


def make_directory(path: Path) -> None:
    """Make a directory and its parents; each is flushed to the disk."""
    if path.is_dir():
        return
    make_directory(path.parent)
    path.mkdir(exist_ok=True)
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Flush a directory's list of names to the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def naming_full_disk(path: Path, size: int) -> Iterator[None]:
    """Turn "no space" and "over quota" in the block into a StorageFull that names the file and its size."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise StorageFull(_full_message(path, size)) from error


def _publish(temporary: Path, path: Path, replace: bool) -> bool:
    if replace:
        temporary.replace(path)
        return True
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    return True


def _full_message(path: Path, size: int) -> str:
    there = next(folder for folder in path.parents if folder.exists())
    free = shutil.disk_usage(there).free
    return (
        f"disk full: expected room for {size:,} bytes of {path}, found {free:,} bytes free there (or a quota "
        "used up). Finished work is kept: make room and give the same command again; it goes on from there."
    )
