"""Images to files and back: `ImageCoder` is the Python API.

    coder = ImageCoder.from_bytes(Path("codec.safetensors").read_bytes())
    data = coder.encode(pixels)            # uint8 (H, W, 3), as pipeline.pixels.canonical_pixels gives them
    pixels = coder.decode(data)

Integers alone decide about symbols, so a file gives equal indices on every machine; docs/format.md says what is
promised of pixels. Shapes: C or M channels of latents, N of hyper latents, T positions of a channel in raster order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Self, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from pipeline.bitstream import codec_file, container
from pipeline.bitstream.container import DIGEST_BYTES, MAX_PIXELS, Header
from pipeline.bitstream.rans import (
    UNCONNECTED,
    BitstreamError,
    Machine,
    decode_stream,
    encode_stream,
    hyper_model,
    latent_model,
)
from pipeline.codec.artifact import Codec
from pipeline.codec.integer_synthesis import HYPER_LIMIT
from pipeline.coding import CodedImage, code, synthesise
from pipeline.quantizers import Tables, contexts, dequantize
from pipeline.quantizers.lookup import check_indices, check_sigma_index
from pipeline.quantizers.tables import MAX_INDEX
from pipeline.refinement import Refinement

Pixels = npt.NDArray[np.uint8]
_Scalar = TypeVar("_Scalar", bound=np.generic)

LATENT_CODERS = 2
"""Interleaved coders of the latents. Two decode a quarter faster than one, four hardly faster than two, encoding takes
the same time, and each costs 5 bytes (benchmarks/entropy_coding.txt)."""
HYPER_CODERS = 1


@dataclass(frozen=True)
class DecodedIndices:
    """What a file carries, and what it means.

    Attributes:
        header: the file's.
        indices: int32 (M, h, w). hyper_indices: int16 (N, h/4, w/4). Equal to those of `CodedImage`.
        latent: ŷ, float32 (M, h, w); equal to that of `CodedImage`. `pipeline.coding.synthesise` makes pixels of it.
    """

    header: Header
    indices: npt.NDArray[np.int32]
    hyper_indices: npt.NDArray[np.int16]
    latent: npt.NDArray[np.float32]


class ImageCoder:
    """A codec with a quantizer's tables.

    Threads may share one; files and indices come out the same. Analysis and synthesis set flags of PyTorch's for the
    whole process while they run (`strict_float32`: those of cuDNN, which concern GPUs only): when calls overlap, what
    else the process computes on a GPU may find them set, also afterwards.
    """

    def __init__(self, codec: Codec, tables: Tables, max_pixels: int = MAX_PIXELS) -> None:
        """Pair them.

        Args:
            max_pixels: refuse, on both sides, images that have more when padded to multiples of the codec's stride.
        """
        self.codec, self.tables, self.max_pixels = codec, tables, max_pixels
        self._latent_model, self._hyper_model = latent_model(tables), hyper_model(codec.hyper_table)

    @classmethod
    def from_bytes(cls, data: bytes, max_pixels: int = MAX_PIXELS) -> Self:
        """Read a codec file, whole or slim.

        Raises:
            ValueError: it is none, or damaged.
        """
        coder = cls(*codec_file.split(data), max_pixels)
        if not codec_file.is_slim(data):  # which is written whole when somebody asks
            coder._file = data
        return coder

    def to_bytes(self) -> bytes:
        """The codec file: what another machine needs to decode. If the coder was read from one, it is that one."""
        return self._file

    @cached_property
    def _file(self) -> bytes:
        """Never written anew once read: other bytes, though they mean the same, would have another digest."""
        return codec_file.join(self.codec, self.tables)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the codec file, hexadecimal; every image file carries its first 8 bytes."""
        return hashlib.sha256(self._file).hexdigest()

    def encode(self, pixels_HWC: Pixels, refinement: Refinement | None = None) -> bytes:
        """The file of an image.

        Args:
            pixels_HWC: uint8 (H, W, 3) of any size from 1 × 1. Grey images have three equal channels here, and come
                back as RGB.
            refinement: effort for fewer bits or less distortion, none by default.

        Raises:
            ValueError: other pixels, or too many.
        """
        shape = pixels_HWC.shape
        if pixels_HWC.dtype != np.uint8 or len(shape) != 3 or shape[2] != 3 or not pixels_HWC.size:
            raise ValueError(f"expected pixels as uint8 (H, W, 3), found {pixels_HWC.dtype} {shape}")
        self._cells(*shape[:2])
        return self.encode_indices(code(self.codec, self.tables, pixels_HWC, refinement), *shape[:2])

    def encode_indices(self, coded: CodedImage, height: int, width: int) -> bytes:
        """The file of an image that `pipeline.coding.code` has quantized with this codec and these tables.

        Args:
            height, width: of the image before padding.

        Raises:
            ValueError: indices that no file of this size can carry, or too many pixels.
        """
        self._check(coded, *self._cells(height, width))
        indices_CT = _flat(coded.indices)
        hyper_NT = _flat(coded.hyper_indices).astype(np.int32)
        hyper = encode_stream(
            hyper_NT,
            np.zeros(hyper_NT.shape, np.uint8),
            _channels(hyper_NT.shape),
            self._hyper_model,
            HYPER_CODERS,
        )
        contexts_CT = contexts(indices_CT, self.tables)
        latent = encode_stream(
            indices_CT, contexts_CT, _flat(coded.sigma_index), self._latent_model, LATENT_CODERS
        )
        return container.build(self._mark, height, width, hyper, latent)

    def decode(self, data: bytes) -> Pixels:
        """The image of a file: uint8 (H, W, 3).

        Raises:
            BitstreamError: as `decode_indices`.
        """
        found = self.decode_indices(data)
        return synthesise(self.codec, found.latent, found.header.height, found.header.width)

    @torch.inference_mode()
    def decode_indices(self, data: bytes) -> DecodedIndices:
        """All of a file but the synthesis of pixels.

        Raises:
            BitstreamError (a ValueError): not such a file, damaged, of another version or codec, or too large; what was
                expected and found. Until the hyper stream has proved whole, only its own indices are allocated, 1/4096
                of the padded pixels times N; latents are after that.
        """
        header, hyper_stream, latent_stream = container.parse(data)
        if header.codec != self._mark:
            raise BitstreamError(
                f"made by another codec: expected {self._mark.hex()}, found {header.codec.hex()}; "
                "decode it with the codec file whose SHA-256 begins so"
            )
        rows, columns = self._cells(header.height, header.width)
        level_NT = _channels((self.codec.network.N, rows * columns))
        with _naming("hyper stream"):
            hyper_NT = decode_stream(
                hyper_stream, level_NT, self._hyper_model, UNCONNECTED, limit=HYPER_LIMIT, coders=HYPER_CODERS
            )
        hyper_indices = hyper_NT.astype(np.int16).reshape(-1, rows, columns)
        means, sigma_index = self.codec.entropy_parameters(torch.from_numpy(hyper_indices)[None])
        sigma_CT, shape = _flat(sigma_index[0].numpy()), means[0].shape
        machine = Machine.of(self.tables.settings)
        with _naming("latent stream"):
            indices_CT = decode_stream(
                latent_stream, sigma_CT, self._latent_model, machine, limit=MAX_INDEX, coders=LATENT_CODERS
            )
        residual = dequantize(indices_CT, sigma_CT, self.tables).reshape(shape)
        return DecodedIndices(header, indices_CT.reshape(shape), hyper_indices, means[0].numpy() + residual)

    @property
    def _mark(self) -> bytes:
        return bytes.fromhex(self.digest)[:DIGEST_BYTES]

    def _check(self, coded: CodedImage, rows: int, columns: int) -> None:
        """Compiled loops check no bounds. Raises ValueError."""
        network = self.codec.network
        expected = (network.N, rows, columns), (network.M, 4 * rows, 4 * columns)
        found = coded.hyper_indices.shape, coded.indices.shape
        if found != expected:
            raise ValueError(
                f"expected hyper indices {expected[0]} and indices {expected[1]}, found {found[0]} and {found[1]}"
            )
        check_indices(coded.indices)
        check_sigma_index(coded.sigma_index, coded.indices.shape)
        least, most = int(coded.hyper_indices.min()), int(coded.hyper_indices.max())
        if max(-least, most) > HYPER_LIMIT:
            raise ValueError(f"hyper indices: expected |n| ≤ {HYPER_LIMIT}, found {least} to {most}")

    def _cells(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of hyper latents, one a stride.

        Raises:
            BitstreamError: too many pixels.
        """
        stride = self.codec.stride
        rows, columns = -(-height // stride), -(-width // stride)
        if rows * columns * stride**2 > self.max_pixels:
            raise BitstreamError(
                f"{width} × {height} pixels, padded to {columns * stride} × {rows * stride}, are more than "
                f"the limit of {self.max_pixels}; if there is memory for them, raise max_pixels (--max-pixels)"
            )
        return rows, columns


@contextmanager
def _naming(stream: str) -> Iterator[None]:
    """Say which stream an error is about."""
    try:
        yield
    except BitstreamError as error:
        raise BitstreamError(f"{stream}: {error}; the file is damaged, get another copy") from None


def _flat(array: npt.NDArray[_Scalar]) -> npt.NDArray[_Scalar]:
    return array.reshape(array.shape[0], -1)


def _channels(shape: tuple[int, ...]) -> npt.NDArray[np.uint16]:
    """Each index's channel, the level of hyper indices."""
    return np.repeat(np.arange(shape[0], dtype=np.uint16)[:, None], shape[1], axis=1)
