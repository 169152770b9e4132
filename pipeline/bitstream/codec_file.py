"""A codec file: all that encoder and decoder must agree on, codec and quantizer tables, as one safetensors file.

Its leaves are those of the codec's checkpoint and the tables' arrays as `tables.…`; its metadata, one JSON value, holds
the metadata of both. Equal codecs with equal tables give equal bytes.
"""

from __future__ import annotations

import json
import reprlib

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from pipeline.codec import artifact
from pipeline.codec.artifact import Codec
from pipeline.quantizers import tables as quantizer_tables
from pipeline.quantizers.tables import Tables

METADATA_KEY = "retrellis.codec_file"
FORMAT_VERSION = 1
PREFIX = "tables."
DECODER = "network.g_s.", PREFIX  # all that a finetuning of the decoder alone, and another quantizer, change
_KEYS = {"codec": artifact.METADATA_KEY, "tables": quantizer_tables.METADATA_KEY}
ADVICE = "`retrellis export CODEC FILE.safetensors --quantizer NAME` writes one"


def join(codec: Codec, tables: Tables) -> bytes:
    """One file of both."""
    codec_metadata, leaves = _open(codec.to_bytes())
    tables_metadata, arrays = _open(tables.to_bytes())
    leaves |= {PREFIX + name: array for name, array in arrays.items()}
    metadata = {
        "version": FORMAT_VERSION,
        "codec": codec_metadata[_KEYS["codec"]],
        "tables": tables_metadata[_KEYS["tables"]],
    }
    data: bytes = safetensors.torch.save(leaves, {METADATA_KEY: json.dumps(metadata, sort_keys=True)})
    return data


def split(data: bytes) -> tuple[Codec, Tables]:
    """Read what `join` wrote; nothing is unpickled, and everything is checked.

    Raises:
        ValueError: not a codec file, or a damaged one; says what was expected and found.
    """
    try:
        found, leaves = _open(data)
        metadata = json.loads(found[METADATA_KEY])
        parts = {name: str(metadata[name]) for name in _KEYS}
        version = metadata["version"]
    except (ValueError, KeyError, TypeError, RecursionError, SafetensorError) as error:
        kind = "a codec without tables" if _has(data, artifact.METADATA_KEY) else f"{len(data):,} other bytes"
        raise ValueError(
            f"not a codec file: expected codec and tables in one, found {kind}; {ADVICE}"
        ) from error
    if type(version) is not int or version != FORMAT_VERSION:  # JSON's true equals 1
        raise ValueError(
            f"expected a codec file of version {FORMAT_VERSION}, found {reprlib.repr(version)}: use a matching release"
        )
    arrays = {name.removeprefix(PREFIX): leaf for name, leaf in leaves.items() if name.startswith(PREFIX)}
    network = {name: leaf for name, leaf in leaves.items() if not name.startswith(PREFIX)}
    checkpoint = safetensors.torch.save(network, {_KEYS["codec"]: parts["codec"]})
    tables = safetensors.torch.save(arrays, {_KEYS["tables"]: parts["tables"]})
    try:
        return Codec.from_bytes(checkpoint), Tables.from_bytes(tables)
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"damaged codec file: its metadata lack something: {error}; {ADVICE}") from error


def _open(data: bytes) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and leaves of a safetensors file."""
    leaves: dict[str, Tensor] = safetensors.torch.load(data)
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return dict(header["__metadata__"]), leaves


def slim(data: bytes) -> bytes:
    """A codec file without the integers of its hyper synthesis, up to half of it, which follow from the weights.

    Raises:
        ValueError: not a codec file, or its integers are not those of its weights.
    """
    metadata, leaves = _open(data)
    kept = {name: leaf for name, leaf in leaves.items() if not name.startswith("integer.")}
    slimmed: bytes = safetensors.torch.save(kept, metadata)
    if join(*split(slimmed)) != data:
        raise ValueError("expected integers that follow from the codec's weights, found others")
    return slimmed


def decoder_of(data: bytes) -> bytes:
    """What a finetuned codec's file, as `join` wrote it, has of its own: g_s, the tables, and metadata."""
    metadata, leaves = _open(data)
    own = {name: leaf for name, leaf in leaves.items() if name.startswith(DECODER)}
    decoder: bytes = safetensors.torch.save(own, metadata)
    return decoder


def with_decoder(base: bytes, decoder: bytes) -> bytes:
    """The finetuned codec's file: the base codec's, slim if that is, with what `decoder_of` took.

    Both must be whole: `split` looks at what comes of them, not this.
    """
    leaves = {name: leaf for name, leaf in _open(base)[1].items() if not name.startswith(DECODER)}
    metadata, own = _open(decoder)
    finetuned: bytes = safetensors.torch.save(leaves | own, metadata)
    return finetuned


def whole(data: bytes) -> bytes:
    """What `slim` made smaller as it was; other bytes as they are. Raises ValueError as `split` does."""
    return join(*split(data)) if is_codec_file(data) and is_slim(data) else data


def is_slim(data: bytes) -> bool:
    """Whether a codec file lacks the integers of its hyper synthesis; its header alone is looked at."""
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return not any(name.startswith("integer.") for name in header)


def is_codec_file(data: bytes) -> bool:
    """Whether these bytes look like what `join` writes."""
    return _has(data, METADATA_KEY)


def _has(data: bytes, metadata_key: str) -> bool:
    try:
        return metadata_key in _open(data)[0]
    except (ValueError, KeyError, TypeError, RecursionError, SafetensorError):
        return False
