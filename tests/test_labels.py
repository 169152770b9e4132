"""Labellings: what their levels are, that tables can hold them, and what they are for."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.quantizers import labels
from pipeline.quantizers.tables import Settings
from pipeline.sources import GAUSSIAN, SOURCES, Source

URQ = Settings("urq", None, 1.0, 0.0)
TCQ = Settings("tcq", "vvc8", 1.0, 0.4)
BY_STATE = Settings("tcq", "vvc8", 1.0, 0.4, context="state")


def used(rows: np.ndarray) -> list[list[float]]:
    """The levels of each quantizer in ascending order."""
    return [sorted(row[~np.isnan(row)].tolist()) for row in rows]


def test_plain_levels_are_the_lattice() -> None:
    assert used(labels.levels(TCQ, 2, "plain")) == [[-4, -2, 0, 2, 4], [-3, -1, 0, 1, 3]]
    assert used(labels.levels(URQ, 2, "plain")) == [[-2, -1, 0, 1, 2]]


def test_levels_of_the_other_labellings() -> None:
    q0, q1 = used(labels.levels(TCQ, 8, "centred"))
    assert q0 == [-16, -14, -12, -10, -8, -6, -4, -2, 0, 2, 4, 6, 8, 10, 12, 14, 16]
    assert q1 == [-7, -5, -3, -1, 0, 1, 3, 5, 7]
    q0, q1 = used(labels.levels(TCQ, 4, "offset"))
    assert q0 == [-3.5, -1.5, 0.5, 2.5]
    assert q1 == [-level for level in reversed(q0)]


@pytest.mark.parametrize("labelling", ["centred", "offset"])
def test_a_subset_has_every_fourth_level(labelling: str) -> None:
    k = np.arange(-8, 9)
    for quantizer, row in enumerate(labels.levels(TCQ, 8, labelling)):
        for parity in (0, 1):
            subset = row[(k % 2 == parity) & ~np.isnan(row)]
            if quantizer == 1:
                subset = subset[subset != 0]  # which is there in addition
            assert len(subset) >= 4
            assert np.all(np.diff(np.sort(subset)) == 4)


@pytest.mark.parametrize("labelling", labels.SHIFTS)
@pytest.mark.parametrize("settings", [URQ, TCQ])
def test_points_reconstruct_every_level(settings: Settings, labelling: str) -> None:
    K = 9
    levels, points = labels.levels(settings, K, labelling), labels.points(settings, K, labelling)
    k = np.arange(-K, K + 1)
    known = ~np.isnan(levels)
    decoded = np.sign(k) * points[:, abs(k)]
    assert points.shape == (settings.quantizers, K + 1)
    assert np.isfinite(points).all()
    assert np.array_equal(decoded[known], levels[known].astype(np.float32))


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.name)
@pytest.mark.parametrize("labelling", labels.SHIFTS)
@pytest.mark.parametrize("settings", [URQ, TCQ, BY_STATE], ids=["urq", "tcq", "by state"])
def test_cells_are_probabilities(settings: Settings, labelling: str, source: Source) -> None:
    K = 7
    cells = labels.cells(settings, K, labelling, source, sigma=1.7)
    levels = labels.levels(settings, K, labelling)[settings.context_quantizers]
    assert cells.shape == (settings.contexts, 2 * K + 2)
    assert np.all(cells >= 0)
    assert cells.sum(-1) == pytest.approx(1)
    assert np.all(cells[:, :-1][np.isnan(levels)] == 0)


def test_plain_cells_of_the_gaussian() -> None:
    cells = labels.cells(Settings("tcq", "vvc8", 0.7, 0.1), 5, "plain", GAUSSIAN, sigma=1.0)
    assert np.allclose(cells[:, :11], cells[:, 10::-1])
    # Q0's zero: |r| < Δ = 0.7; Q1's: |r| < Δ/2
    assert cells[:, 5] == pytest.approx([0.516073, 0.273661], abs=1e-6)
