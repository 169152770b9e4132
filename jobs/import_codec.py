"""import: checkpoint file -> codec. CompressAI's `MeanScaleHyperprior` (.pth, .pth.tar) or our own .safetensors.

Reads   a file, or a codec blob that is in this workspace already.
Key     the file's SHA-256 and the λ it was trained for.
Commits the codec with its integer hyper synthesis. Nothing is unpickled (`weights_only`).
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from jobs.stage import Node, Outcome, Output, Task
from storage.workspace import Workspace


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
    """A codec from the bytes of our checkpoint or of CompressAI's.

    Raises:
        ValueError: neither, or leaves that do not fit; names what was expected and found.
    """
    import torch

    from pipeline.codec.artifact import Codec
    from pipeline.codec.compressai import import_state_dict

    if data[8:9] == b"{":  # safetensors: a length of 8 bytes, then JSON
        return Codec.from_bytes(data)
    if data[:2] not in (b"PK", b"\x80\x02"):
        raise ValueError(
            "not a checkpoint: expected a state dict of CompressAI's MeanScaleHyperprior as torch.save writes it, "
            f"or a .safetensors of ours, found {len(data):,} bytes that begin with {data[:8]!r}"
        )
    state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    return Codec.from_network(import_state_dict(state.get("state_dict", state)))


def export_file(root: str, codec: str, file: Path) -> Path:
    """`retrellis export`: write a codec (by the first digits of its digest) as CompressAI's state dict.

    Raises:
        ValueError: no codec of these digits, or several.
    """
    import torch

    from pipeline.codec.artifact import Codec
    from pipeline.codec.compressai import export_state_dict

    workspace = Workspace.open(root, create=False)
    outputs = [o for r in workspace.records.load("results").values() for o in r["outputs"].values()]
    blobs = {o["blob"] for o in outputs if o["kind"] == "codec" and o["digest"].startswith(codec)}
    if len(blobs) != 1:
        raise ValueError(
            f"expected one codec whose digest begins with {codec}, found {len(blobs)} in {workspace.root}"
        )
    network = Codec.from_bytes(workspace.blobs.get(blobs.pop())).network
    torch.save(export_state_dict(network), file)
    return file
