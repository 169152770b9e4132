"""What an index costs and what it means, read from the tables: shared by every quantizer and by decoders.

Arrays of one call have one shape, any shape; contexts are those of `pipeline.quantizers.contexts`.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.frequencies import escape_bits, frequency_bits
from pipeline.quantizers.kernels import fill_bits, fill_levels, follow, plain
from pipeline.quantizers.tables import MAX_INDEX, Settings, Tables
from pipeline.sigma import SIGMA_LEVELS


@lru_cache(maxsize=8)
def _bits(tables: Tables) -> npt.NDArray[np.float64]:
    """Bits of each symbol, laid out as the frequencies."""
    return frequency_bits(tables.frequencies.astype(np.uint32))


@lru_cache(maxsize=1)
def _escape_bits() -> npt.NDArray[np.float64]:
    """Bits after an escape, by excess |k| − K − 1."""
    return escape_bits(np.arange(MAX_INDEX))


@lru_cache(maxsize=8)
def _lattice(settings: Settings) -> npt.NDArray[np.float32]:
    """Plain levels of each context, float32 [C, 32767], by |k|."""
    return settings.lattice(np.arange(MAX_INDEX + 1)).astype(np.float32)[settings.context_quantizers]


@lru_cache(maxsize=8)
def row_starts(tables: Tables) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Where the frequencies of a σ level and context begin, and the points of its quantizer; both int64 [L, C]."""
    chosen, K = tables.settings, tables.alphabet[:, None].astype(np.int64)
    frequencies = tables.frequency_start[:-1, None] + np.arange(chosen.contexts) * (2 * K + 2)
    return frequencies, tables.reconstruction_start[:-1, None] + chosen.context_quantizers * (K + 1)


def contexts(indices_CT: npt.NDArray[np.int32], tables: Tables) -> npt.NDArray[np.uint8]:
    """The context uint8 [C, T] that codes each index, from the indices before it in lane order.

    Raises:
        ValueError: unless the indices are int32 [C, T] with |k| ≤ 32766.
    """
    check_indices(indices_CT)
    if indices_CT.ndim != 2:
        raise ValueError(f"indices: expected int32 [C, T], found {indices_CT.dtype} {indices_CT.shape}")
    chosen = tables.settings
    contexts_CT = np.zeros(indices_CT.shape, np.uint8)
    if chosen.machine.states > 1:
        follow(plain(indices_CT), chosen.machine.next_state, chosen.state_contexts, contexts_CT)
    return contexts_CT


def code_bits(
    tables: Tables,
    sigma_index: npt.NDArray[np.uint8],
    contexts: npt.NDArray[np.uint8],
    indices: npt.NDArray[np.int32],
) -> npt.NDArray[np.float32]:
    """Ideal code length of each index in bits, escape codes included; float32 of the arguments' shape.

    The σ level is free to differ from the one that the index was chosen for: finetuning of scales reads levels i and
    i + 1 at fixed context and index and interpolates.

    Raises:
        ValueError: if shapes differ or a value is out of range.
    """
    return _bits_of(tables, sigma_index, contexts, indices, np.empty(indices.shape, np.float32))


def channel_bits(
    tables: Tables,
    sigma_index_CT: npt.NDArray[np.uint8],
    contexts_CT: npt.NDArray[np.uint8],
    indices_CT: npt.NDArray[np.int32],
) -> npt.NDArray[np.float64]:
    """Ideal code length of each channel in bits, float64 [C]. Raises as `code_bits` does."""
    bits_CT = np.empty(indices_CT.shape, np.float64)
    return _bits_of(tables, sigma_index_CT, contexts_CT, indices_CT, bits_CT).sum(-1)


def reconstruct(
    tables: Tables,
    sigma_index: npt.NDArray[np.uint8],
    contexts: npt.NDArray[np.uint8],
    indices: npt.NDArray[np.int32],
) -> npt.NDArray[np.float32]:
    """The level r̂ of each index in latent units, float32 of the arguments' shape. Raises as `code_bits` does."""
    _check(tables, sigma_index, contexts, indices)
    levels = np.empty(indices.shape, np.float32)
    rows, lattice = row_starts(tables)[1], _lattice(tables.settings)
    inputs = (plain(sigma_index.ravel()), plain(contexts.ravel()), plain(indices.ravel()))
    fill_levels(*inputs, tables.alphabet, rows, tables.reconstruction, lattice, levels.reshape(-1))
    return levels


def check_sigma_index(sigma_index: npt.NDArray[np.uint8], shape: tuple[int, ...]) -> None:
    """Compiled loops check no bounds, so their callers do.

    Raises:
        ValueError: unless `sigma_index` is uint8 of `shape` with values below 64.
    """
    if sigma_index.dtype != np.uint8 or sigma_index.shape != shape:
        found = f"{sigma_index.dtype} {sigma_index.shape}"
        raise ValueError(f"σ indices: expected uint8 {shape}, as the values have, found {found}")
    if sigma_index.size and sigma_index.max() >= SIGMA_LEVELS:
        raise ValueError(f"σ indices: expected at most {SIGMA_LEVELS - 1}, found {sigma_index.max()}")


def check_indices(indices: npt.NDArray[np.int32]) -> None:
    """Raise ValueError unless `indices` is int32 with |k| ≤ 32766."""
    if indices.dtype != np.int32:
        raise ValueError(f"indices: expected int32, found {indices.dtype}")
    if indices.size and max(-int(indices.min()), int(indices.max())) > MAX_INDEX:
        span = f"{indices.min()} to {indices.max()}"
        raise ValueError(f"indices: expected |k| ≤ {MAX_INDEX}, found {span}; missing latents are no indices")


def _check(tables: Tables, sigma_index: Any, contexts: Any, indices: Any) -> None:
    check_indices(indices)
    check_sigma_index(sigma_index, indices.shape)
    if contexts.dtype != np.uint8 or contexts.shape != indices.shape:
        raise ValueError(f"contexts: expected uint8 {indices.shape}, found {contexts.dtype} {contexts.shape}")
    if contexts.size and contexts.max() >= tables.settings.contexts:
        raise ValueError(f"contexts: expected at most {tables.settings.contexts - 1}, found {contexts.max()}")


def _bits_of(tables: Tables, sigma_index: Any, contexts: Any, indices: Any, bits: Any) -> Any:
    _check(tables, sigma_index, contexts, indices)
    rows, symbol_bits = row_starts(tables)[0], _bits(tables)
    inputs = (plain(sigma_index.ravel()), plain(contexts.ravel()), plain(indices.ravel()))
    fill_bits(*inputs, tables.alphabet, rows, symbol_bits, _escape_bits(), bits.reshape(-1))
    return bits
