"""What selects tables is the same everywhere: threads, batches, formats, libraries, orders of summation, any input.

The reference is Python's integers, which know no range and no rounding, summed in random order.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from hostile_files import photograph, small_coder
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.codec.contract import EntropyParameters
from pipeline.codec.hyperprior import MeanScaleHyperprior
from pipeline.codec.integer_synthesis import (
    ACTIVATION_LIMIT,
    EXACT_LIMIT,
    FRACTION_BITS,
    HYPER_LIMIT,
    MEANS_FRACTION_BITS,
    MEANS_LIMIT,
    IntegerLayer,
    IntegerSynthesis,
)
from pipeline.coding import code

Integers = np.ndarray  # of Python's, dtype object


@contextmanager
def setting(threads: int, *, onednn: bool) -> Iterator[None]:
    """A machine of its own kind, as far as one machine can be others."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.backends.mkldnn.flags(enabled=onednn):
            yield
    finally:
        torch.set_num_threads(before)


SETTINGS = [*itertools.product((1, 2), (True, False))]


def synthesis(seed: int, N: int, M: int, gain: float = 3.0) -> IntegerSynthesis:
    """Of a random network; a gain of 3 keeps activations as large as trained ones, 40 drives them into the limits."""
    generator = torch.Generator().manual_seed(seed)
    made = MeanScaleHyperprior(N, M).initialise(generator).requires_grad_(False)
    for parameter in made.h_s.parameters():
        parameter.mul_(gain)
    made.h_s[-1].bias[:M] += 2
    return IntegerSynthesis.from_float(made.h_s, torch.empty(N).uniform_(-0.5, 0.5, generator=generator))


def same(found: EntropyParameters, expected: EntropyParameters) -> bool:
    return all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


@pytest.mark.parametrize(("N", "M"), [(6, 8), (32, 48)])
def test_settings_do_not_matter(N: int, M: int) -> None:
    made, generator = synthesis(N, N, M), np.random.default_rng(N)
    n = torch.from_numpy(generator.integers(-15, 16, (8, N, 3, 5)).astype(np.int16))
    formats: list[Callable[[Tensor], Tensor]] = [
        lambda n: n,
        lambda n: n.to(memory_format=torch.channels_last),
        lambda n: n.flip(3).flip(3).mT.contiguous().mT,
    ]
    expected = made(n)
    for threads, onednn in SETTINGS:
        with setting(threads, onednn=onednn):
            assert all(same(made(into(n)), expected) for into in formats)
            singles = [made(one) for one in n.split(1)]
            assert same(EntropyParameters(*map(torch.cat, zip(*singles, strict=True))), expected)
            assert torch.equal(made.features(n), torch.cat([made.features(one) for one in n.split(1)]))


def test_a_file_decodes_the_same_under_every_setting() -> None:
    coder = small_coder()
    with setting(2, onednn=True):
        coded = code(coder.codec, coder.tables, photograph(100, 150))
        data = coder.encode_indices(coded, 100, 150)
    pictures = []
    for threads, onednn in SETTINGS:
        with setting(threads, onednn=onednn):
            found = coder.decode_indices(data)
            pictures.append(coder.decode(data).astype(int))
        assert np.array_equal(found.indices, coded.indices)
        assert np.array_equal(found.hyper_indices, coded.hyper_indices)
        assert np.array_equal(found.latent, coded.latent)
    assert max(np.abs(picture - pictures[0]).max() for picture in pictures) <= 1  # g_s alone stays float


# Python's integers


def reference(made: IntegerSynthesis, n_NHW: Integers, order: random.Random) -> tuple[Integers, Integers]:
    """Means in units of 2^-12, and σ indices; both [M, 4h, 4w]."""
    medians = np.array(made.medians.tolist(), object)
    a = np.clip(n_NHW, -HYPER_LIMIT, HYPER_LIMIT) * 2**FRACTION_BITS + medians[:, None, None]
    a = np.clip(a, -ACTIVATION_LIMIT, ACTIVATION_LIMIT)
    for layer in made.trunk:
        a = np.clip(convolved(layer, a, order), -ACTIVATION_LIMIT, ACTIVATION_LIMIT)
        a = np.where(a >= 0, a, a * 655 // 65536)
    means = np.clip(convolved(made.means, a, order), -MEANS_LIMIT, MEANS_LIMIT)
    thresholds = np.array(made.thresholds.tolist(), object)
    scales = convolved(made.scales, a, order)
    return means, (thresholds < scales[..., None]).sum(-1)


def convolved(layer: IntegerLayer, a_IHW: Integers, order: random.Random) -> Integers:
    """floor(Σ / 2^shift + ½), each Σ in an order of its own; no part of a sum may leave the exact range."""
    weight = np.array(layer.weight.tolist(), object)
    outputs, inputs, side, _ = weight.shape
    up, (_, height, width) = 2 if layer.upsamples else 1, a_IHW.shape
    result = np.empty((outputs, up * height, up * width), object)
    for o, row, column in np.ndindex(result.shape):
        terms = [int(layer.bias[o])]
        for c, i, j in np.ndindex(inputs, side, side):
            y, x = (pair if up == 1 else -pair for pair in (i - side // 2, j - side // 2))
            (y, odd_y), (x, odd_x) = divmod(row + y, up), divmod(column + x, up)
            if not (odd_y or odd_x) and 0 <= y < height and 0 <= x < width:
                terms.append(a_IHW[c, y, x] * weight[o, c, i, j])
        order.shuffle(terms)
        assert max(map(abs, itertools.accumulate(terms))) < EXACT_LIMIT
        shift = int(layer.shift[o])
        result[o, row, column] = (2 * sum(terms) + 2**shift) >> (shift + 1)
    return result


HOSTILE = st.sampled_from([-32768, -4096, -4095, -4094, -1, 0, 1, 4094, 4095, 4096, 32767])


@given(
    seed=st.integers(0, 1000),
    gain=st.sampled_from([0.3, 3.0, 40.0]),
    values=st.lists(HOSTILE | st.integers(-32768, 32767) | st.integers(-12, 12), min_size=4, max_size=4),
)
@settings(max_examples=12, deadline=None)
def test_any_hyper_indices_give_what_pythons_integers_give(seed: int, gain: float, values: list[int]) -> None:
    made = synthesis(seed, 2, 4, gain)
    found = made(torch.tensor(values, dtype=torch.int16).view(1, 2, 1, 2))
    means, sigma_index = reference(made, np.array(values, object).reshape(2, 1, 2), random.Random(seed))
    assert (found.means[0].double() * 2**MEANS_FRACTION_BITS).tolist() == means.tolist()
    assert found.sigma_index[0].tolist() == sigma_index.tolist()
    assert torch.isfinite(made.features(torch.tensor(values, dtype=torch.int16).view(1, 2, 1, 2))).all()
