"""Our entropy coder beside `constriction` and CompressAI's rANS: the same latents, the same frequencies, one core.

    python benchmarks/entropy_coding.py CHECKPOINT FOLDER [RUNS [IMAGES]]   # in the environment of benchmarks/peers.py

Latents of a folder's images by the 8-state trellis; which of a σ level's tables codes an index depends, through the
trellis, on the indices before it. An encoder knows them all. A decoder learns them as it goes, so a library that takes
arrays can be asked for the 32 lanes of one position at a time and no more. What each is given, as its best use:

    ours                   two interleaved coders, as in our files; beside it one, and four
    constriction, family   `Categorical`, a row of probabilities for each of the 32 lanes, gathered by NumPy
    constriction, models   one prepared model for each row of the tables, called symbol by symbol
    CompressAI             `encode_with_indexes`; `decode_stream` with the 32 rows of a position; its lists made before
    CompressAI, no context all contexts given to its decoder, in one call: what it could do without a trellis

The trellis is followed in NumPy between their calls. Ours writes the bits of an escaped index, as CompressAI does;
for constriction these few are left out. Medians of runs taken in turn.

Ours is kept: to call a library for a position costs more than the position's 32 symbols, and a decoder cannot ask for
more at once. Even without contexts, in one call, CompressAI's is behind: it searches a row from its start, and its
lists are Python's. Both our ways are above twice the goal of 30 M symbols/s, so nothing cleverer was tried.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import constriction
import numpy as np
import torch
from machine import alternately, machine
from peers import compressai

from jobs.import_codec import read_codec
from pipeline.bitstream.coder import LATENT_CODERS
from pipeline.bitstream.rans import Machine, decode_stream, encode_stream, latent_model
from pipeline.coding import code
from pipeline.frequencies import TOTAL
from pipeline.pixels import canonical_pixels
from pipeline.quantizers import Tables, contexts, design, settings
from pipeline.quantizers.tables import MAX_INDEX
from pipeline.quantizers.trellis import LANES
from pipeline.sigma import SIGMA_LEVELS

CHUNK = 32  # positions that constriction encodes in one call
AnsCoder = constriction.stream.stack.AnsCoder
Categorical = constriction.stream.model.Categorical


class Latents(NamedTuple):
    """Of one image: indices int32, σ indices uint8, contexts uint8, each [C, T]."""

    indices: np.ndarray
    levels: np.ndarray
    contexts: np.ndarray


class Coder(NamedTuple):
    """Encode gives what decode takes; `decode` gives int32 [C, T]."""

    encode: Callable[[Latents], object]
    decode: Callable[[object, Latents], np.ndarray]


def photographs(checkpoint: str, folder: str, images: int, tables: Tables) -> list[Latents]:
    codec = read_codec(Path(checkpoint).read_bytes())
    files = sorted(Path(folder).iterdir())
    found = []
    for path in files[:: max(1, len(files) // images)][:images]:
        coded = code(codec, tables, canonical_pixels(path.read_bytes()))
        indices = coded.indices.reshape(len(coded.indices), -1)
        found.append(Latents(indices, coded.sigma_index.reshape(indices.shape), contexts(indices, tables)))
    return found


def ours(tables: Tables, interleaved: int) -> Coder:
    model, trellis = latent_model(tables), Machine.of(tables.settings)
    return Coder(
        lambda latents: encode_stream(latents.indices, latents.contexts, latents.levels, model, interleaved),
        lambda data, latents: decode_stream(
            data, latents.levels, model, trellis, limit=MAX_INDEX, coders=interleaved
        ),
    )


def steps(latents: Latents) -> list[tuple[slice, int]]:
    """Channels and position of what a decoder can decode at once, in order."""
    channels, positions = latents.indices.shape
    blocks = [slice(first, first + LANES) for first in range(0, channels, LANES)]
    return [(block, position) for block in blocks for position in range(positions)]


def follow(tables: Tables, latents: Latents, at_once: Callable[..., np.ndarray]) -> np.ndarray:
    """Decode by `at_once(place, contexts)`, which gives symbols k + K, and follow the trellis.

    An escape, at least 2K + 1, stands for the index that was encoded.
    """
    alphabet = tables.alphabet[latents.levels]
    next_state, context = Machine.of(tables.settings)
    found, lanes = np.empty_like(latents.indices), np.zeros(LANES, np.uint8)
    for place in steps(latents):
        K = alphabet[place]
        k = at_once(place, context[lanes[: len(K)]]) - K
        k = np.where(k > K, latents.indices[place], k)
        found[place] = k
        lanes[: len(K)] = next_state[lanes[: len(K)], k & 1]
    return found


def symbols(tables: Tables, latents: Latents) -> np.ndarray:
    """Each index's place in its row, int32 [C, T]: k + K, an escape last."""
    K = tables.alphabet[latents.levels]
    return np.where(abs(latents.indices) > K, 2 * K + 1, latents.indices + K).astype(np.int32)


def constriction_family(tables: Tables) -> Coder:
    family, widths = Categorical(perfect=False), 2 * tables.alphabet + 2
    rows = np.zeros((SIGMA_LEVELS, tables.settings.contexts, widths.max()), np.float32)
    for level, width in enumerate(widths):
        rows[level, :, :width] = tables.frequency_rows(level) / TOTAL

    def at(latents: Latents, block: int, first: int, count: int, chosen: np.ndarray) -> np.ndarray:
        """Probabilities of some positions, as wide as the widest row of their chunk: padding changes the models."""
        chunk = latents.levels[block : block + LANES, first // CHUNK * CHUNK :][:, :CHUNK]
        levels = latents.levels[block : block + LANES, first : first + count]
        return rows[levels.T.ravel(), chosen, : widths[chunk.max()]]

    def encode(latents: Latents) -> object:
        coder, found = AnsCoder(), symbols(tables, latents)
        channels, positions = found.shape
        for block in range((channels - 1) // LANES * LANES, -1, -LANES):
            for first in range((positions - 1) // CHUNK * CHUNK, -1, -CHUNK):
                place = slice(block, block + LANES), slice(first, first + CHUNK)
                chosen = latents.contexts[place].T.ravel()
                coder.encode_reverse(found[place].T.ravel(), family, at(latents, block, first, CHUNK, chosen))
        return coder.get_compressed()

    def decode(data: object, latents: Latents) -> np.ndarray:
        coder = AnsCoder(data)

        def at_once(place: tuple[slice, int], chosen: np.ndarray) -> np.ndarray:
            return coder.decode(family, at(latents, place[0].start, place[1], 1, chosen))

        return follow(tables, latents, at_once)

    return Coder(encode, decode)


def constriction_models(tables: Tables) -> Coder:
    models = [
        [Categorical((row / TOTAL).astype(np.float32), perfect=False) for row in tables.frequency_rows(level)]
        for level in range(SIGMA_LEVELS)
    ]

    def encode(latents: Latents) -> object:
        coder, found = AnsCoder(), symbols(tables, latents)
        for place in reversed(steps(latents)):
            arrays = (found[place], latents.levels[place], latents.contexts[place])
            for symbol, level, chosen in zip(*(a[::-1].tolist() for a in arrays), strict=True):
                coder.encode_reverse(symbol, models[level][chosen])
        return coder.get_compressed()

    def decode(data: object, latents: Latents) -> np.ndarray:
        coder = AnsCoder(data)

        def at_once(place: tuple[slice, int], chosen: np.ndarray) -> np.ndarray:
            pairs = zip(latents.levels[place].tolist(), chosen.tolist(), strict=True)
            return np.array([coder.decode(models[level][context]) for level, context in pairs])

        return follow(tables, latents, at_once)

    return Coder(encode, decode)


class CompressAI:
    """Its index of a row is level · contexts + context; its offset −K; its tables running sums."""

    def __init__(self, tables: Tables) -> None:
        self.tables, self.ans = tables, compressai("ans")
        levels = range(SIGMA_LEVELS)
        self.sums = [
            [0, *np.cumsum(row).tolist()] for level in levels for row in tables.frequency_rows(level)
        ]
        self.sizes = [len(row) for row in self.sums]
        self.offsets = (-np.repeat(tables.alphabet, tables.settings.contexts)).tolist()
        self.lists: dict[int, tuple[list[int], list[int]]] = {}

    def prepared(self, latents: Latents) -> tuple[list[int], list[int]]:
        """Indices and rows as lists, in its order; made once."""
        if id(latents) not in self.lists:
            rows = latents.levels.astype(int) * self.tables.settings.contexts + latents.contexts
            ordered = [
                np.concatenate([a[block : block + LANES].T.ravel() for block in range(0, len(a), LANES)])
                for a in (latents.indices, rows)
            ]
            self.lists[id(latents)] = ordered[0].tolist(), ordered[1].tolist()
        return self.lists[id(latents)]

    def encode(self, latents: Latents) -> object:
        return self.ans.RansEncoder().encode_with_indexes(
            *self.prepared(latents), self.sums, self.sizes, self.offsets
        )

    def decode(self, data: object, latents: Latents) -> np.ndarray:
        decoder = self.ans.RansDecoder()
        decoder.set_stream(data)

        def at_once(place: tuple[slice, int], chosen: np.ndarray) -> np.ndarray:
            rows = (latents.levels[place].astype(int) * self.tables.settings.contexts + chosen).tolist()
            tables = ([of[row] for row in rows] for of in (self.sums, self.sizes, self.offsets))
            found = np.array(decoder.decode_stream(list(range(len(rows))), *tables))
            return found + self.tables.alphabet[latents.levels[place]]

        return follow(self.tables, latents, at_once)

    def decode_known(self, data: object, latents: Latents) -> np.ndarray:
        rows = self.prepared(latents)[1]
        flat = self.ans.RansDecoder().decode_with_indexes(data, rows, self.sums, self.sizes, self.offsets)
        shape = latents.indices.shape
        blocks, place = [], 0
        for block in range(0, shape[0], LANES):
            count = min(LANES, shape[0] - block) * shape[1]
            blocks.append(np.array(flat[place : place + count]).reshape(shape[1], -1).T)
            place += count
        return np.concatenate(blocks)


def compare(context: str, checkpoint: str, folder: str, runs: int, images: int) -> None:
    tables = design(settings("tcq", "vvc8", context=context))
    latents = photographs(checkpoint, folder, images, tables)
    theirs = CompressAI(tables)
    coders = {
        "ours": ours(tables, LATENT_CODERS),
        **{f"ours, {count} interleaved": ours(tables, count) for count in (1, 4)},
        "constriction, family": constriction_family(tables),
        "constriction, models": constriction_models(tables),
        "CompressAI": Coder(theirs.encode, theirs.decode),
        "CompressAI, no context": Coder(theirs.encode, theirs.decode_known),
    }
    works: dict[str, Callable[[], object]] = {}
    sizes = {}
    for name, coder in coders.items():
        data = [coder.encode(each) for each in latents]
        for each, bits in zip(latents, data, strict=True):
            assert np.array_equal(coder.decode(bits, each), each.indices), name
        sizes[name] = sum(memoryview(bits).nbytes for bits in data)
        works[f"{name} encode"] = lambda coder=coder: [coder.encode(each) for each in latents]
        works[f"{name} decode"] = lambda coder=coder, data=data: [*map(coder.decode, data, latents)]
    seconds = alternately(works, runs)
    count = sum(each.indices.size for each in latents)
    print(f"\nTables by the trellis's {context}, {count:,} symbols, {tables.settings.contexts} contexts")
    print(f"  {'':22} {'encode':>9} {'decode':>9}  M symbols/s   {'bytes':>9}")
    for name, size in sizes.items():
        speeds = [count / np.median(seconds[f"{name} {way}"]) / 1e6 for way in ("encode", "decode")]
        print(f"  {name:22} {speeds[0]:9.2f} {speeds[1]:9.2f} {'':14} {size:9,}")


def main(checkpoint: str, folder: str, runs: int = 5, images: int = 4) -> None:
    torch.set_num_threads(1)
    print(machine("numpy", "numba", "constriction", "compressai"))
    print(
        f"{Path(checkpoint).name}, {images} images of {Path(folder).name}; medians of {runs} runs in turn, one core"
    )
    for context in ("quantizer", "state"):
        compare(context, checkpoint, folder, runs, images)


if __name__ == "__main__":
    main(*sys.argv[1:3], *map(int, sys.argv[3:]))
