"""ingest: folders -> images (canonical pixels in shards, and a manifest).

Reads   files of the given folders.
Key     path, size and time of each file, and how pixels are made (scale, max_pixels).
Work    files not seen before are decoded in Ray tasks, one shard a task.
Commits shard records, then the list of image digests.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from jobs.experiment import Images
from jobs.stage import Node, Outcome, Output, Task
from storage.images import Image, ImageStore, Source, image_set_digest, pixel_digest
from storage.keys import canonical_json, digest
from storage.workspace import Workspace

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff"})
FILES_PER_SHARD = 32


class EmptyFolder(ValueError):
    """A folder is missing, or gave no image."""


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
    """
    files: dict[str, File] = {}
    for folder in images.folders:
        found = sorted(_walk(Path(folder)))
        if not found:
            suffixes = " ".join(sorted(SUFFIXES))
            raise EmptyFolder(
                f"{folder}: expected a folder with images ({suffixes}), found none in it or below"
            )
        files |= {str(path): _file(path, rehash) for path in found}
    return list(islice(files.values(), images.limit))


def listing_digest(files: list[File]) -> str:
    """What an ingest is keyed by."""
    return digest([[f.path, f.size, f.content or f.mtime_ns] for f in files])


def compute(task: Task) -> Outcome:
    """Ingest what is new and give the digests of all."""
    files: list[File] = list(task.node.parameters["files"])
    settings = task.node.settings
    rehash = any(file.content for file in files)
    known = {} if rehash else ImageStore(task.workspace).index().sources
    new = [f for f in files if _source(f, settings).key not in known]
    chunks = [
        (task.workspace.root, new[i : i + FILES_PER_SHARD], settings)
        for i in range(0, len(new), FILES_PER_SHARD)
    ]
    done = 0
    fresh: dict[str, Source] = {}
    task.progress(0, len(new), "files")
    if chunks:
        for (_, chunk, _), sources in task.cluster.map(ingest_chunk, chunks, task.share):
            done += len(chunk)
            fresh |= {source.path: source for source in sources}
            task.progress(done, len(new), "files")
    index = ImageStore(task.workspace).index()
    sources = [fresh.get(f.path) or index.sources[_source(f, settings).key] for f in files]
    return _outcome(task, sources, index.images, new=len(new))


def ingest_chunk(root: str, files: list[File], settings: dict[str, Any]) -> list[Source]:
    """Runs in a worker: decode some files and store those whose pixels are new as one shard."""
    from pipeline.pixels import UnusableImage, canonical_pixels

    store = ImageStore(Workspace.open(root))
    sources, pixels = [], {}
    for file in files:
        source = _source(file, settings)
        try:
            decoded = canonical_pixels(
                Path(file.path).read_bytes(), settings["scale"], settings["max_pixels"]
            )
        except (UnusableImage, OSError) as error:
            sources.append(replace(source, reason=str(error)))
            continue
        name = pixel_digest(decoded)
        pixels[name] = decoded
        sources.append(replace(source, digest=name))
    store.write_shard(pixels, sources)
    return sources


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
    new = [f for f in files if _source(f, node.settings).key not in known]
    return f"{len(new)} of {len(files)} files"


def _source(file: File, settings: Mapping[str, Any]) -> Source:
    """How the image store knows a file again: by what decides its pixels, not by the list it stands in."""
    pixels = {name: settings[name] for name in ("scale", "max_pixels")}
    return Source(file.path, file.size, file.mtime_ns, pixels)


def _walk(folder: Path) -> Iterator[Path]:
    if folder.is_dir():
        for path in folder.rglob("*"):
            hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
            if path.suffix.lower() in SUFFIXES and not hidden and path.is_file():
                yield path


def _file(path: Path, rehash: bool) -> File:
    status = path.stat()
    content = hashlib.sha256(path.read_bytes()).hexdigest() if rehash else None
    return File(str(path), status.st_size, status.st_mtime_ns, content)
