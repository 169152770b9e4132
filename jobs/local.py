"""What training reads: node-local memmaps of pixels and latents, copied once from the stores and checked on the way."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from storage.digests import Digests
from storage.images import ImageStore
from storage.keys import digest
from storage.latents import LatentSet
from storage.memmap import LocalCache, RaggedArrays, RaggedWriter
from storage.parts import PartImage
from storage.workspace import Workspace

if TYPE_CHECKING:
    from pipeline.codec.artifact import Codec
    from pipeline.quantizers import Tables

Array = npt.NDArray[Any]

_DIGEST = re.compile(rb'"digest":"([0-9a-f]{64})"')
CACHE_VERSION = 1  # bumped when a field means something else: these copies outlive an upgrade

# float16 for what the decoder reads (Zarr alone would be twenty times slower, float32 twice as large).
DTYPES: Mapping[str, str] = {
    "reconstruction": "float16",
    "indices": "int16",
    "hyper_indices": "int16",
    "contexts": "uint8",
    "features": "float16",
    "latent": "float16",
    "means": "float16",
    "sigma_index": "uint8",
}


def image_digests(workspace: Workspace, manifest: str) -> Digests:
    """The images of a set, in the order of their digests."""
    # As dictionaries, a million rows would be half a gigabyte; nothing but a key and its value looks like this in JSON
    return Digests.of(found[1].decode() for found in _DIGEST.finditer(workspace.blobs.get(manifest)))


def local_pixels(workspace: Workspace, digests: Sequence[str]) -> RaggedArrays:
    """uint8 (H, W, 3) of each image."""
    store = ImageStore(workspace)

    def build(folder: Path) -> None:
        with _writer(folder, "pixels", "uint8") as writer:
            for pixels in store.read_many(digests):
                writer.append(pixels)

    key = digest({"version": CACHE_VERSION, "pixels": list(digests)})
    return RaggedArrays(LocalCache.default().open_or_build(key, build) / "pixels")


def local_latents(
    latents: LatentSet, digests: Sequence[str], codec: Codec, tables: Tables, with_scale: bool
) -> dict[str, RaggedArrays]:
    """Decoded latents of a set: `reconstruction`, and with `with_scale` also `indices`, `contexts`, `features`."""

    def fields() -> Iterator[dict[str, Array]]:
        for image in latents.read_many(digests):
            yield decoded(image, codec, tables, with_scale)

    names = ["reconstruction", *(["indices", "contexts", "features"] if with_scale else [])]
    key = {"latents": latents.content_digest(digests), "tables": tables.digest}
    return _materialise(key | _encoder_side(codec), names, fields)


def decoded(image: PartImage, codec: Codec, tables: Tables, with_scale: bool) -> dict[str, Array]:
    """The fields of one image, each of its dtype in `DTYPES`."""
    from pipeline.coding import decode_latent, scale_inputs

    indices, hyper_indices = image.indices, image.hyper_indices
    found: dict[str, Array] = {"reconstruction": decode_latent(codec, tables, indices, hyper_indices)}
    if with_scale:
        contexts, features = scale_inputs(codec, tables, indices, hyper_indices)
        found |= {"indices": indices, "contexts": contexts, "features": features}
    return {name: np.ascontiguousarray(array, DTYPES[name]) for name, array in found.items()}


def local_indices(latents: LatentSet, digests: Sequence[str]) -> dict[str, RaggedArrays]:
    """The integers of a set, `indices` and `hyper_indices`; the digests are sorted, as those of its content digest."""

    def fields() -> Iterator[dict[str, Array]]:
        for image in latents.read_many(digests):
            yield {"indices": image.indices, "hyper_indices": image.hyper_indices}

    return _materialise({"latents": latents.content_digest(digests)}, ["indices", "hyper_indices"], fields)


def local_analysis(workspace: Workspace, digests: Sequence[str], codec: Codec) -> dict[str, RaggedArrays]:
    """What only the encoder knows, for the controls: `latent` (y), `means`, `sigma_index`."""
    from pipeline.coding import analyse

    store = ImageStore(workspace)

    def fields() -> Iterator[dict[str, Array]]:
        for pixels in store.read_many(digests):
            a = analyse(codec, pixels)
            yield {"latent": a.latent, "means": a.means, "sigma_index": a.sigma_index}

    return _materialise(
        {"images": list(digests)} | _encoder_side(codec), ["latent", "means", "sigma_index"], fields
    )


def _encoder_side(codec: Codec) -> dict[str, str]:
    """Both digests: σ, which rate decides, chooses tables and so reconstruction points."""
    digests = codec.digests()
    return {"grid": digests.grid, "rate": digests.rate}


def _materialise(
    key: dict[str, Any], names: list[str], fields: Callable[[], Iterator[dict[str, Array]]]
) -> dict[str, RaggedArrays]:
    """One ragged memmap per field, built once per content."""

    def build(folder: Path) -> None:
        with ExitStack() as stack:
            writers = {name: stack.enter_context(_writer(folder, name, DTYPES[name])) for name in names}
            for found in fields():
                for name, writer in writers.items():
                    writer.append(found[name])

    layout = {"version": CACHE_VERSION, "fields": {name: DTYPES[name] for name in names}}
    folder = LocalCache.default().open_or_build(digest(key | layout), build)
    return {name: RaggedArrays(folder / name) for name in names}


def _writer(folder: Path, name: str, dtype: str) -> RaggedWriter:
    (folder / name).mkdir()
    return RaggedWriter(folder / name, dtype)
