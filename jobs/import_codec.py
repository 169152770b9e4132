"""import: checkpoint file -> codec. CompressAI's `MeanScaleHyperprior` (.pth, .pth.tar) or our own .safetensors[.xz].

Reads   a file, or a codec blob that is in this workspace already.
Key     the file's SHA-256 and the λ it was trained for.
Commits the codec with its integer hyper synthesis. Nothing is unpickled (`weights_only`).
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

from jobs.stage import Node, Outcome, Output, Task
from pipeline.shipped import unpack
from storage.durable import write_file
from storage.workspace import Workspace

EXPECTED = "expected a state dict of CompressAI's MeanScaleHyperprior as torch.save writes it"


def amount(node: Node, inputs: dict[str, Output] | None, workspace: Workspace) -> str:
    """What `plan` says of it."""
    return "one checkpoint"


def compute(task: Task) -> Outcome:
    """Import one codec, in this process: it is a matter of a second."""
    task.progress(0, 1, "checkpoints")
    file = task.node.parameters.get("file")
    source, lmbda = task.node.settings["source"], task.node.settings["lmbda"]
    codec = read_codec(Path(file).read_bytes() if file else task.workspace.blobs.get(source))
    blob = task.workspace.blobs.put(codec.to_bytes(), ".safetensors")
    digests = codec.digests()
    note = {"lmbda": lmbda, "grid": digests.grid, "rate": digests.rate}
    summary = {"N": codec.network.N, "M": codec.network.M}
    return Outcome({"codec": {"kind": "codec", "digest": digests.codec, "blob": blob, "note": note}}, summary)


def read_codec(data: bytes) -> Any:
    """A codec from the bytes of our checkpoint or codec file, also packed by xz, or of CompressAI's checkpoint.

    Raises:
        ValueError: neither, or leaves that do not fit; names what was expected and found.
    """
    import torch

    from pipeline.bitstream import codec_file
    from pipeline.codec.artifact import Codec
    from pipeline.codec.compressai import import_state_dict

    data = unpack(data)
    if data[8:9] == b"{":  # safetensors: a length of 8 bytes, then JSON
        return codec_file.split(data)[0] if codec_file.is_codec_file(data) else Codec.from_bytes(data)
    found = f"{len(data):,} bytes that begin with {data[:8]!r}"
    if data[:2] not in (b"PK", b"\x80\x02"):
        raise ValueError(f"not a checkpoint: {EXPECTED}, or a .safetensors of ours, found {found}")
    try:
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"not a checkpoint that can be read without running code from it: {EXPECTED}, found {found}; "
            "it is damaged, or holds more than tensors and numbers: save the network's state_dict() alone"
        ) from error
    state = state.get("state_dict", state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(leaf, torch.Tensor) for leaf in state.values()):
        raise ValueError(f"{EXPECTED}, found no mapping of names to tensors")
    return Codec.from_network(import_state_dict(state))


def write_named(file: Path, data: bytes) -> None:
    """Whole or not at all, in a folder that is there: a mistyped path makes no folders.

    Raises:
        ValueError: no place to write the file.
        StorageFull: the disk is full; nothing is left behind.
    """
    if not file.parent.is_dir() or (file.exists() and not file.is_file()):
        raise ValueError(f"{file}: expected a file's name in a folder that there is, found {_place(file)}")
    try:
        write_file(file, data, replace=True)
    except OSError as error:
        raise ValueError(
            f"{file}: expected a place to write {len(data):,} bytes ({error.strerror})"
        ) from error


def _place(file: Path) -> str:
    return "a folder or device of that name" if file.exists() else f"no folder {file.parent}"
