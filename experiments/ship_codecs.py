"""Put codecs where the project ships them: those of a workspace as trained, and then finetuned decoders for them.

    python experiments/ship_codecs.py WORKSPACE [QUANTIZER]
    python experiments/ship_codecs.py CODEC_FILE…

Codec files are in the order of rates, as `retrellis export DIGEST FILE.safetensors --quantizer NAME` writes them, of
codecs finetuned (`parts: decoder`) from those that are here. Their weights are rounded to bfloat16. New codecs as
trained need new decoders: `encode` refuses old ones.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

from pipeline import shipped
from pipeline.bitstream import codec_file
from pipeline.codec.artifact import Codec
from pipeline.quantizers import Tables
from storage.workspace import Workspace


def main(*arguments: str) -> None:
    """Codec files, or a workspace and perhaps a quantizer's name."""
    if Path(arguments[0]).is_file():
        ship_decoders(arguments)
    else:
        ship_codecs(*arguments)


def ship_codecs(root: str, quantizer: str = "tcq8") -> None:
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
    parts = []
    for lmbda, pair in sorted(pairs.items()):
        codec, tables = (workspace.blobs.get(blobs[digest]) for digest in pair)
        data = codec_file.join(Codec.from_bytes(codec), Tables.from_bytes(tables))
        parts.append((lmbda, data, codec_file.slim(data)))
    _ship("quality", "digests.json", parts)


def ship_decoders(files: tuple[str, ...]) -> None:
    """Refuses a codec that differs from the one of its quality in more than its decoder."""
    if len(files) != len(shipped.SHIPPED):
        raise SystemExit(f"expected {len(shipped.SHIPPED)} codec files, found {len(files)}")
    parts = []
    for (quality, base), file in zip(shipped.SHIPPED.items(), files, strict=True):
        finetuned, tables = codec_file.split(Path(file).read_bytes())
        data = codec_file.join(Codec.from_network(finetuned.network, rounded=True), tables)
        decoder = codec_file.decoder_of(data)
        if codec_file.whole(codec_file.with_decoder(shipped.codec_file(quality), decoder)) != data:
            raise SystemExit(
                f"{file}: expected the codec of quality {quality} with another g_s, found another codec"
            )
        parts.append((base.lmbda, data, decoder))
    _ship("decoder", "decoders.json", parts)


def _ship(stem: str, list_name: str, parts: list[tuple[float, bytes, bytes]]) -> None:
    """Write what is to be packed of each λ's codec file, and the list of their digests."""
    listed = []
    for quality, (lmbda, data, part) in enumerate(parts, 1):
        packed = shipped.pack(part)
        (shipped.FOLDER / f"{stem}-{quality}.safetensors.xz").write_bytes(packed)
        digests = {"digest": hashlib.sha256(data).hexdigest(), "packed": hashlib.sha256(packed).hexdigest()}
        listed.append({"lmbda": lmbda, **digests})
        print(f"{stem} {quality}: λ = {lmbda:g}, {len(data):,} bytes, packed {len(packed):,}")
    (shipped.FOLDER / list_name).write_text(json.dumps(listed, indent=1) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
