"""D(R): Blahut–Arimoto against the closed form, the Shannon lower bound, another grid."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pipeline.sources import (
    GAUSSIAN,
    LAPLACIAN,
    SOURCES,
    UNIFORM,
    Source,
    distortion_at_rate,
    point_at_slope,
)


def db(ratio: float) -> float:
    return 10 * math.log10(ratio)


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.name)
def test_sources_have_unit_variance_and_the_entropy_they_state(source: Source) -> None:
    edges = np.linspace(-source.reach, source.reach, 20_001)
    mass, middle = source.mass(edges[:-1], edges[1:]), (edges[1:] + edges[:-1]) / 2
    assert mass.sum() == pytest.approx(1, abs=1e-7)
    assert mass @ middle**2 == pytest.approx(1, abs=1e-5)
    density = mass / (edges[1] - edges[0])
    assert -(mass @ np.log2(np.maximum(density, 1e-300))) == pytest.approx(source.entropy, abs=1e-4)
    for p in (0.001, 0.3, 0.8):
        assert 1 - source.upper(source.quantile(p)) == pytest.approx(p)


@pytest.mark.parametrize("bits", [0.25, 1.0, 4.0])
def test_blahut_arimoto_finds_the_gaussian_closed_form(bits: float) -> None:
    rate, distortion = point_at_slope(GAUSSIAN, 2 * math.log(2) * 2 ** (-2 * bits))
    assert db(distortion / 2 ** (-2 * rate)) == pytest.approx(0, abs=0.01)
    assert rate == pytest.approx(bits, abs=0.01)
    assert distortion_at_rate(GAUSSIAN, bits) == 2 ** (-2 * bits)


@pytest.mark.parametrize(("source", "bits"), [(LAPLACIAN, 2.0), (UNIFORM, 1.0)])
def test_two_grids_agree(source: Source, bits: float) -> None:
    coarse, fine = (distortion_at_rate(source, bits, cells) for cells in (250, 400))
    assert db(coarse / fine) == pytest.approx(0, abs=0.01)
    assert fine > source.shannon_bound(bits)


def test_the_shannon_bound_is_tight_at_high_rate() -> None:
    assert db(distortion_at_rate(LAPLACIAN, 4.0) / LAPLACIAN.shannon_bound(4.0)) == pytest.approx(0, abs=0.01)
