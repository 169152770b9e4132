"""Another decoder: plain Python, slow, written from docs/format.md and from nothing else of this project.

It shows that the document suffices, so it imports nothing of `pipeline`. Its sections are the document's.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray
LANES = 32
HYPER_CODERS, LATENT_CODERS = 1, 2
POLYNOMIALS = {
    4: (5, 2),
    8: (13, 4),
    16: (23, 4),
    32: (45, 10),
    64: (103, 24),
    128: (235, 126),
    256: (515, 362),
}


class Decoded(NamedTuple):
    """Integers [C, T], ŷ [M, h, w], and the picture [H, W, 3]."""

    hyper_indices: Array
    sigma_index: Array
    indices: Array
    latent: Array
    pixels: Array


def decode(data: bytes, codec_file: bytes) -> Decoded:
    codec = CodecFile(codec_file)
    mark, height, width, hyper_stream, latent_stream = container(data)
    assert mark == hashlib.sha256(codec_file).digest()[:8]
    cells = -(-height // 64), -(-width // 64)
    hyper = Coders(hyper_stream, HYPER_CODERS).indices(
        (codec.N, cells[0] * cells[1]), lambda c, t, state: codec.hyper_row(c), lambda state, k: 0
    )
    means, sigma_index = hyper_synthesis(codec, hyper.reshape(codec.N, *cells))
    flat = sigma_index.reshape(codec.M, -1)
    trellis = Trellis(codec.settings)
    coders = Coders(latent_stream, LATENT_CODERS)
    indices = coders.indices(
        flat.shape, lambda c, t, state: codec.row(flat[c, t], trellis.context(state)), trellis.next
    )
    latent = dequantized(codec, trellis, indices, flat, means)
    return Decoded(hyper, flat, indices, latent, picture(codec, latent)[:height, :width])


# The container


def container(data: bytes) -> tuple[bytes, int, int, bytes, bytes]:
    """Codec's mark, height, width and the two streams."""
    assert data[:4] == b"RTL\x01"
    assert int.from_bytes(data[4:8], "little") == zlib.crc32(data[:4] + data[8:])
    numbers, at = [], 16
    for _ in range(4):
        value = place = 0
        while True:
            value += (data[at] & 127) << place
            place, at = place + 7, at + 1
            if data[at - 1] < 128:
                break
        numbers.append(value)
    height, width, hyper, latent = numbers
    assert len(data) == at + hyper + latent
    return data[8:16], height, width, data[at : at + hyper], data[at + hyper :]


# The codec file


TYPES = {"F32": "<f4", "I32": "<i4", "I64": "<i8", "U16": "<u2", "BF16": "<u2"}


def array(entry: dict[str, Any], data: bytes) -> np.ndarray:
    """An array of a safetensors file; bfloat16 is the upper half of a float32."""
    first, last = entry["data_offsets"]
    values = np.frombuffer(data[first:last], TYPES[entry["dtype"]]).reshape(entry["shape"])
    return (values.astype("<u4") << 16).view("<f4") if entry["dtype"] == "BF16" else values


class CodecFile:
    """What a decoder needs of it."""

    def __init__(self, data: bytes) -> None:
        start = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:start])
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        self.leaves = {name: array(entry, data[start:]) for name, entry in entries.items()}
        both = json.loads(header["__metadata__"]["retrellis.codec_file"])
        codec, tables = json.loads(both["codec"]), json.loads(both["tables"])
        self.N, self.M, self.settings = codec["N"], codec["M"], tables["settings"]
        self.limits = self.leaves["hyper_table.limits"]
        self.alphabet = self.leaves["tables.alphabet"].astype(int)
        self.contexts, self.quantizers = contexts(self.settings)

    def hyper_row(self, channel: int) -> list[int]:
        first = int((2 * self.limits[:channel] + 2).sum())
        return self.leaves["hyper_table.frequencies"][first:][: 2 * self.limits[channel] + 2].tolist()

    def row(self, level: int, context: int) -> list[int]:
        width = 2 * self.alphabet[level] + 2
        first = self.contexts * int((2 * self.alphabet[:level] + 2).sum()) + context * width
        return self.leaves["tables.frequencies"][first : first + width].tolist()

    def points(self, level: int, quantizer: int) -> Array:
        width = self.alphabet[level] + 1
        first = self.quantizers * int((self.alphabet[:level] + 1).sum()) + quantizer * width
        return self.leaves["tables.reconstruction"][first : first + width]

    def layer(self, name: str) -> tuple[Array, Array, Array]:
        return tuple(
            self.leaves[f"integer.{name}.{leaf}"].astype(np.int64) for leaf in ("weight", "bias", "shift")
        )


def contexts(settings: dict[str, Any]) -> tuple[int, int]:
    """Rows of frequencies and of reconstruction points that a level has."""
    if settings["trellis"] is None:
        return 1, 1
    return len(Trellis(settings).quantizer) if settings["context"] == "state" else 2, 2


# Streams


@dataclass
class Step:
    """What was seen on the way to one index."""

    channel: int
    position: int
    trellis: int
    state: int
    symbol: int
    index: int


class Coders:
    """The interleaved rANS of a stream."""

    def __init__(self, stream: bytes, count: int) -> None:
        self.states = [int.from_bytes(stream[5 * j : 5 * j + 5], "little") for j in range(count)]
        self.words = [int.from_bytes(stream[i : i + 2], "little") for i in range(5 * count, len(stream), 2)]
        self.steps: list[Step] = []

    def take(self, j: int, start: int, frequency: int) -> None:
        x = self.states[j]
        x = frequency * (x // 65536) + x % 65536 - start
        if x < 2**24:
            x = x * 65536 + self.words.pop(0)
        self.states[j] = x

    def bits(self, j: int, count: int) -> int:
        size = 2 ** (16 - count)
        value = self.states[j] % 65536 // size
        self.take(j, value * size, size)
        return value

    def symbol(self, j: int, frequencies: list[int]) -> int:
        symbol = start = 0
        while start + frequencies[symbol] <= self.states[j] % 65536:
            start += frequencies[symbol]
            symbol += 1
        self.take(j, start, frequencies[symbol])
        return symbol

    def index(self, symbol: int, K: int, j: int) -> int:
        if symbol <= 2 * K:
            return symbol - K
        negative = self.bits(j, 1)
        n = 0
        while self.states[j] % 65536 < 2 ** (15 - n):
            n += 1
        self.bits(j, n + 1)
        magnitude = K + 2**n + self.bits(j, n)
        return -magnitude if negative else magnitude

    def indices(
        self,
        shape: tuple[int, int],
        row: Callable[[int, int, int], list[int]],
        following: Callable[[int, int], int],
    ) -> Array:
        """All of a stream; `row` by channel, position and state of the lane, `following` by state and index."""
        found, lanes = np.zeros(shape, np.int64), [0] * LANES
        for c, t in order(*shape):
            frequencies, j, state = row(c, t, lanes[c % LANES]), c % len(self.states), lanes[c % LANES]
            before = self.states[j]
            symbol = self.symbol(j, frequencies)
            k = self.index(symbol, len(frequencies) // 2 - 1, j)
            self.steps.append(Step(c, t, state, before, symbol, k))
            lanes[c % LANES] = following(state, k)
            found[c, t] = k
        assert not self.words
        assert set(self.states) <= {2**24}
        return found


def order(channels: int, positions: int) -> Iterator[tuple[int, int]]:
    for block in range(0, channels, LANES):
        for t in range(positions):
            for c in range(block, min(block + LANES, channels)):
                yield c, t


# Hyper synthesis


def hyper_synthesis(codec: CodecFile, n: Array) -> tuple[Array, Array]:
    """μ as float32 and σ indices, both [M, 4u, 4v]."""
    top = 2**26 - 1
    medians = codec.leaves["integer.medians"][:, None, None]
    a = np.clip(np.clip(n, -4095, 4095) * 2**14 + medians, -top, top)
    for name in ("trunk0", "trunk1"):
        a = np.clip(rescaled(codec.layer(name), a, upsampled), -top, top)
        a = np.where(a >= 0, a, a * 655 // 65536)
    means = np.clip(rescaled(codec.layer("means"), a, same_size), -(2**24) + 1, 2**24 - 1)
    scales = rescaled(codec.layer("scales"), a, same_size)
    index = (codec.leaves["integer.thresholds"] < scales[..., None]).sum(-1)
    return (means / 2**12).astype(np.float32), index


def rescaled(layer: tuple[Array, Array, Array], a: Array, sums: Callable[[Array, Array], Array]) -> Array:
    weight, bias, shift = layer
    total, shift = sums(weight, a) + bias[:, None, None], shift[:, None, None]
    return (2 * total + (1 << shift)) >> (shift + 1)


def upsampled(weight_OIKK: Array, a: Array) -> Array:
    """Output row Y takes input row y by kernel row i where Y = 2y + i − 2; columns alike."""
    outputs, _, side, _ = weight_OIKK.shape
    _, h, w = a.shape
    wide = np.zeros((outputs, 2 * h + 3, 2 * w + 3), a.dtype)
    for i in range(side):
        for j in range(side):
            wide[:, i : i + 2 * h : 2, j : j + 2 * w : 2] += np.einsum(
                "oi,iyx->oyx", weight_OIKK[..., i, j], a
            )
    return wide[:, 2 : 2 + 2 * h, 2 : 2 + 2 * w]


def same_size(weight_OIKK: Array, a: Array) -> Array:
    """Output row Y takes input row Y + i − 1 by kernel row i; zeros around."""
    _, h, w = a.shape
    padded = np.pad(a, ((0, 0), (1, 1), (1, 1)))
    return sum(
        np.einsum("oi,iyx->oyx", weight_OIKK[..., i, j], padded[:, i : i + h, j : j + w])
        for i in range(3)
        for j in range(3)
    )


# Trellis and dequantization


class Trellis:
    """States by name; one state for a scalar quantizer."""

    def __init__(self, settings: dict[str, Any]) -> None:
        name: str | None = settings["trellis"]
        self.by_state = settings["context"] == "state"
        if name is None:
            self.table, self.quantizer = [[0, 0]], [0]
        elif name == "vvc4":
            self.table, self.quantizer = [[0, 2], [2, 0], [1, 3], [3, 1]], [0, 0, 1, 1]
        elif name == "vvc8":
            self.table = [[0, 2], [5, 7], [1, 3], [6, 4], [2, 0], [4, 6], [3, 1], [7, 5]]
            self.quantizer = [0, 1] * 4
        else:
            states = int(name.removeprefix("ungerboeck"))
            h0, h1 = (int(str(octal), 8) // 2 for octal in POLYNOMIALS[states])
            self.table = [[(s >> 1) ^ (u * h1) ^ ((s & 1) * h0) for u in (0, 1)] for s in range(states)]
            self.quantizer = [s & 1 for s in range(states)]

    def next(self, state: int, k: int) -> int:
        return self.table[state][k % 2]

    def context(self, state: int) -> int:
        return state if self.by_state else self.quantizer[state]


def dequantized(
    codec: CodecFile, trellis: Trellis, indices: Array, sigma_index: Array, means: Array
) -> Array:
    """ŷ as float32, of the shape of the means."""
    step, count, levels = codec.settings["step"], codec.quantizers, np.zeros(indices.shape, np.float32)
    lanes = [0] * LANES
    for c, t in order(*indices.shape):
        k, level, q = int(indices[c, t]), sigma_index[c, t], trellis.quantizer[lanes[c % LANES]]
        inside = abs(k) <= codec.alphabet[level]
        point = codec.points(level, q)[abs(k)] if inside else np.float32(abs(k) * (count * step) - q * step)
        levels[c, t] = -point if k < 0 else point
        lanes[c % LANES] = trellis.next(lanes[c % LANES], k)
    return means + levels.reshape(means.shape)


# The picture


def picture(codec: CodecFile, latent: Array) -> Array:
    """g_s in float64, as uint8 (64u, 64v, 3); for photographs other arithmetic differs by one level at most."""
    x = latent.astype(np.float64)
    for layer in range(0, 7, 2):
        weight, bias = (
            codec.leaves[f"network.g_s.{layer}.{name}"].astype(float) for name in ("weight", "bias")
        )
        x = upsampled(weight.swapaxes(0, 1), x) + bias[:, None, None]
        if layer < 6:
            beta, gamma = (
                codec.leaves[f"network.g_s.{layer + 1}.{name}"].astype(float) for name in ("beta", "gamma")
            )
            beta = np.maximum(beta, (1e-6 + 2**-36) ** 0.5) ** 2 - 2**-36
            gamma = np.maximum(gamma, 2**-18) ** 2 - 2**-36
            x = x * np.sqrt(beta[:, None, None] + np.einsum("ij,jyx->iyx", gamma, x * x))
    return np.rint(255 * np.clip(x, 0, 1)).astype(np.uint8).transpose(1, 2, 0)
