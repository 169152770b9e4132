"""Put finetuned decoders and their quantizer's tables where the project ships them, weights rounded to bfloat16.

python experiments/ship_decoders.py CODEC_FILE…

One file for each quality, in the order of rates, as `retrellis export DIGEST FILE.safetensors --quantizer NAME` writes
them, of codecs finetuned from those that come with the project.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

from pipeline import shipped
from pipeline.bitstream import codec_file
from pipeline.codec.artifact import Codec


def main(*files: str) -> None:
    """Refuses a codec whose latents are not those of the quality it is to belong to."""
    if len(files) != len(shipped.SHIPPED):
        raise SystemExit(f"expected {len(shipped.SHIPPED)} codec files, found {len(files)}")
    listed = []
    for (quality, base), file in zip(shipped.SHIPPED.items(), files, strict=True):
        finetuned, tables = codec_file.split(Path(file).read_bytes())
        codec = Codec.from_network(finetuned.network, rounded=True)
        data = codec_file.join(codec, tables)
        decoder = codec_file.decoder_of(data)
        if codec_file.whole(codec_file.with_decoder(shipped.codec_file(quality), decoder)) != data:
            raise SystemExit(f"{file}: expected a codec of quality {quality} with another g_s, found another")
        packed = shipped.pack(decoder)
        shipped.decoder_path(quality).write_bytes(packed)
        digests = {"digest": hashlib.sha256(data).hexdigest(), "packed": hashlib.sha256(packed).hexdigest()}
        listed.append({"lmbda": base.lmbda, **digests})
        print(
            f"quality {quality}: λ = {base.lmbda:g}, {len(data):,} bytes, its decoder packed {len(packed):,}"
        )
    (shipped.FOLDER / "decoders.json").write_text(json.dumps(listed, indent=1) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
