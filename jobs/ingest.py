"""ingest: folders -> images (canonical pixels in shards, and a manifest).

Reads   files of the given folders.
Key     path, size and time of each file, and how pixels are made (scale, max_pixels).
Work    files not seen before are decoded in Ray tasks, one shard a task.
Commits shard records, then the list of image digests.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from jobs.experiment import Images
from jobs.stage import Node, Outcome, Output, Task
from storage.images import Image, ImageStore, Source, SourceKey, image_set_digest, pixel_digest
from storage.keys import canonical_json, digest
from storage.workspace import Workspace

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff"})
FILES_PER_SHARD = 32
BYTES_PER_SHARD = 64 * 2**20  # of files: a task holds the pixels of all of them
NAMED = 5  # of many files, a message names so many


class EmptyFolder(ValueError):
    """A folder is missing, or gave no image."""


class Unreadable(ValueError):
    """The system does not let files be read, or folders be listed."""


@dataclass(frozen=True)
class File:
    """One candidate: what recognises it without opening it, or its content's digest where times are distrusted."""

    path: str
    size: int  # bytes
    mtime_ns: int
    content: str | None = None


def list_files(images: Images, rehash: bool = False) -> list[File]:
    """Files with a known suffix below the folders, in the order of their paths; hidden ones are left out.

    Raises:
        EmptyFolder: a folder does not exist or holds no such file; says which.
        Unreadable: a folder cannot be listed, or with `rehash` a file cannot be read; says which.
    """
    paths: dict[Path, None] = {}
    for folder in images.folders:
        try:
            found = sorted(_walk(Path(folder)))
        except OSError as error:
            raise _unreadable({str(error.filename or folder): _reason(error)}) from error
        if not found:
            suffixes = " ".join(sorted(SUFFIXES))
            raise EmptyFolder(
                f"{folder}: expected a folder with images ({suffixes}), found none in it or below"
            )
        paths |= dict.fromkeys(found)
    return [_file(path, rehash) for path in islice(paths, images.limit)]


def listing_digest(files: list[File]) -> str:
    """What an ingest is keyed by."""
    return digest([[f.path, f.size, f.content or f.mtime_ns] for f in files])


def compute(task: Task) -> Outcome:
    """Ingest what is new and give the digests of all."""
    files: list[File] = list(task.node.parameters["files"])
    settings = task.node.settings
    known = ImageStore(task.workspace).index().sources
    new = _to_read(files, settings, known)
    fresh = _ingest(task, new)
    _tell_changed(task, known, fresh.values())
    index = ImageStore(task.workspace).index()
    sources = [fresh.get(f.path) or index.sources[_source(f, settings).key] for f in files]
    return _outcome(task, sources, index.images, new=len(new))


def _ingest(task: Task, files: list[File]) -> dict[str, Source]:
    """Ingest these in Ray tasks: what each gave, by path. Raises Unreadable when all that could be read is stored."""
    chunks = [(task.workspace.root, chunk, task.node.settings) for chunk in _chunks(files)]
    done = 0
    fresh: dict[str, Source] = {}
    unreadable: dict[str, str] = {}
    task.progress(0, len(files), "files")
    if chunks:
        for (_, chunk, _), (sources, reasons) in task.cluster.map(ingest_chunk, chunks, task.share):
            done += len(chunk)
            fresh |= {source.path: source for source in sources}
            unreadable |= reasons
            task.progress(done, len(files), "files")
    if unreadable:
        raise _unreadable(unreadable)
    return fresh


def ingest_chunk(
    root: str, files: list[File], settings: dict[str, Any]
) -> tuple[list[Source], dict[str, str]]:
    """Runs in a worker: decode some files and store those whose pixels are new as one shard.

    Returns:
        What is recorded of the files, and by path the reasons of those that could not be read: these are not
        recorded, since neither their size nor their time changes when they become readable.
    """
    from pipeline.pixels import UnusableImage, canonical_pixels

    store = ImageStore(Workspace(root))
    sources, pixels, unreadable = [], {}, {}
    for file in files:
        source = _source(file, settings)
        try:
            data = Path(file.path).read_bytes()
            decoded = canonical_pixels(data, settings["scale"], settings["max_pixels"])
        except OSError as error:
            unreadable[file.path] = _reason(error)
        except UnusableImage as error:
            sources.append(replace(source, reason=str(error)))
        else:
            name = pixel_digest(decoded)
            pixels[name] = decoded
            sources.append(replace(source, digest=name))
    if sources:
        store.write_shard(pixels, sources)
    return sources, unreadable


def _chunks(files: Iterable[File]) -> Iterator[list[File]]:
    """What one task takes: neither too many files nor too many bytes, unless a single file has more."""
    chunk: list[File] = []
    size = 0
    for file in files:
        if chunk and (len(chunk) == FILES_PER_SHARD or size + file.size > BYTES_PER_SHARD):
            yield chunk
            chunk, size = [], 0
        chunk.append(file)
        size += file.size
    if chunk:
        yield chunk


def _tell_changed(task: Task, known: Mapping[SourceKey, Source], fresh: Iterable[Source]) -> None:
    """Name the files whose change a run without --rehash would not see."""
    changed = [s.path for s in fresh if s.key in known and known[s.key].digest != s.digest]
    if changed:
        task.say(
            f"changed under the same path, size and time: {_some(changed)}. `touch` what has changed, or go on "
            "with --rehash: runs without it know files by size and time, and take the older pixels"
        )


def _outcome(task: Task, sources: list[Source], images: Mapping[str, Image], new: int) -> Outcome:
    """The manifest: every image with a source, every skipped file with its reason."""
    usable = {s.digest: s for s in reversed(sources) if s.digest}
    skipped = [{"path": s.path, "reason": s.reason} for s in sources if s.reason]
    for entry in skipped:
        task.say(f"skipped {entry['path']}: {entry['reason']}")
    if not usable:
        reasons = "; ".join(f"{e['path']}: {e['reason']}" for e in skipped[:3])
        raise EmptyFolder(f"no usable image among {len(sources)} files ({reasons}): give another folder")
    rows: list[dict[str, Any]] = [
        {
            "digest": name,
            "height": images[name].height,
            "width": images[name].width,
            "source": usable[name].path,
        }
        for name in sorted(usable)
    ]
    manifest = task.workspace.blobs.put(canonical_json({"images": rows, "skipped": skipped}), ".json")
    note = {
        "count": len(rows),
        "skipped": len(skipped),
        "smallest_side": min(min(r["height"], r["width"]) for r in rows),
        "megapixels": round(sum(r["height"] * r["width"] for r in rows) / 1e6, 3),
    }
    output = {"kind": "images", "digest": image_set_digest(list(usable)), "blob": manifest, "note": note}
    return Outcome({"images": output}, {"images": len(rows), "skipped": len(skipped), "new_files": new})


def amount(node: Node, inputs: dict[str, Output] | None, workspace: Workspace) -> str:
    """What `plan` says of it."""
    files: list[File] = list(node.parameters["files"])
    known = ImageStore(workspace).index().sources
    return f"{len(_to_read(files, node.settings, known))} of {len(files)} files"


def _to_read(files: list[File], settings: Mapping[str, Any], known: Mapping[SourceKey, Source]) -> list[File]:
    """The files not seen before; all of them where times are distrusted."""
    return [file for file in files if file.content or _source(file, settings).key not in known]


def _source(file: File, settings: Mapping[str, Any]) -> Source:
    """How the image store knows a file again: by what decides its pixels, not by the list it stands in."""
    pixels = {name: settings[name] for name in ("scale", "max_pixels")}
    return Source(file.path, file.size, file.mtime_ns, pixels)


def _walk(folder: Path) -> Iterator[Path]:
    """Candidates below a folder. Each folder is visited once, whatever links lead to it; links wait for their turn
    so that a file that can be reached without one has its plain path."""
    waiting = [folder] if folder.is_dir() else []
    visited: set[str] = set()
    while waiting:
        for place, folders, names in os.walk(waiting.pop(0), onerror=_raise):
            real = os.path.realpath(place)
            if real in visited:
                folders.clear()
                continue
            visited.add(real)
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            waiting += [path for name in folders if (path := Path(place, name)).is_symlink()]
            yield from (path for name in names if _is_candidate(path := Path(place, name)))


def _is_candidate(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()


def _raise(error: OSError) -> None:
    raise error


def _file(path: Path, rehash: bool) -> File:
    try:
        status = path.stat()
        content = _content(path) if rehash else None
    except OSError as error:
        raise _unreadable({str(path): _reason(error)}) from error
    return File(str(path), status.st_size, status.st_mtime_ns, content)


def _content(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _unreadable(reasons: Mapping[str, str]) -> Unreadable:
    """An error that says what to do; `reasons` by path."""
    named = _some([f"{path} ({reason})" for path, reason in sorted(reasons.items())])
    return Unreadable(f"cannot be read: {named}. Make readable what is named, or take it away, and run again")


def _reason(error: OSError) -> str:
    return error.strerror or str(error)


def _some(names: list[str]) -> str:
    """The first of many, and how many more there are."""
    more = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {more} more" if more > 0 else "")
