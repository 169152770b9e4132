"""Put the base codecs of a workspace, with one quantizer's tables, where the project ships them.

python experiments/ship_codecs.py WORKSPACE [QUANTIZER]
"""

from __future__ import annotations

import hashlib
import json
import sys

from pipeline import shipped
from pipeline.bitstream import codec_file
from pipeline.codec.artifact import Codec
from pipeline.quantizers import Tables
from storage.workspace import Workspace


def main(root: str, quantizer: str = "tcq8") -> None:
    """By λ: quality 1 is the lowest rate. Refuses two codecs of one λ."""
    workspace = Workspace.open(root, create=False)
    records = workspace.records.load("results").values()
    blobs = {o["digest"]: o["blob"] for r in records for o in r["outputs"].values() if "blob" in o}
    pairs: dict[float, tuple[str, str]] = {}
    for record in records:
        axes, reads = record["axes"], record["reads"]
        if record["stage"] == "evaluate" and (axes["arm"], axes["quantizer"]) == ("base", quantizer):
            pair = reads["codec"], reads["tables"]
            if pairs.setdefault(axes["lmbda"], pair) != pair:
                raise SystemExit(
                    f"{root} holds several base codecs of λ = {axes['lmbda']:g} with {quantizer}"
                )
    listed = []
    for quality, (lmbda, pair) in enumerate(sorted(pairs.items()), 1):
        codec, tables = (workspace.blobs.get(blobs[digest]) for digest in pair)
        data = codec_file.join(Codec.from_bytes(codec), Tables.from_bytes(tables))
        packed = shipped.pack(codec_file.slim(data))
        (shipped.FOLDER / f"quality-{quality}.safetensors.xz").write_bytes(packed)
        digests = {"digest": hashlib.sha256(data).hexdigest(), "packed": hashlib.sha256(packed).hexdigest()}
        listed.append({"lmbda": lmbda, **digests})
        print(f"quality {quality}: λ = {lmbda:g}, {len(data):,} bytes, packed {len(packed):,}")
    (shipped.FOLDER / "digests.json").write_text(json.dumps(listed, indent=1) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
