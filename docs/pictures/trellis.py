"""Draws trellis.png and trellis-dark.png: the levels of Q0 and Q1 by subset, and the best path of a short sequence.

python docs/pictures/trellis.py
"""

from __future__ import annotations

import itertools

import numpy as np
from make import DARK, LIGHT, Theme, save
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from pipeline.quantizers import QUANTIZERS, Settings, contexts
from pipeline.quantizers.lloyd import midpoint_tables
from pipeline.quantizers.trellis import TRELLISES

SIZE = (12.0, 6.4)  # inches
SUBSETS = {
    LIGHT.file: ("#1f6fb2", "#7db7e8", "#b5540a", "#eda45c"),
    DARK.file: ("#58a6ff", "#2f5f91", "#f0883e", "#8f5320"),
}
"""Colours by 2 · quantizer + parity of k."""
NAMES = ("$Q_0$, $k$ even", "$Q_0$, $k$ odd", "$Q_1$, $k$ even", "$Q_1$, $k$ odd")
SETTINGS = Settings("tcq", "vvc8", step=1.0, lmbda_q=0.1)
TRELLIS = TRELLISES["vvc8"]
ROWS = {"$r/Δ$": -2.1, "$k$": -1.5, r"$\hat{r}/Δ$": -0.9}
"""What stands above the trellis, and where."""
SIGMA_LEVEL, SAMPLES = 22, 9  # σ = 1.6


def path() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Residuals [T], the indices [T] that the search finds for them, and its states [T + 1]."""
    residual_CT = np.random.default_rng(4).normal(0, 1.6, (1, SAMPLES)).astype(np.float32)
    tables = midpoint_tables(SETTINGS)
    indices_CT = QUANTIZERS["tcq"].search(
        residual_CT, np.full(residual_CT.shape, SIGMA_LEVEL, np.uint8), tables
    )
    states = [0]
    for k in indices_CT[0]:
        states.append(int(TRELLIS.next_state[states[-1], k & 1]))
    assert np.array_equal(TRELLIS.quantizer[states[:-1]], contexts(indices_CT, tables)[0])
    return residual_CT[0], indices_CT[0], np.array(states)


def write(
    axes: Axes, place: tuple[float, float], text: str, color: str, size: float, ha: str = "center"
) -> None:
    """Words beside or around a place, with true minus signs."""
    axes.text(*place, text.replace("-", "−"), color=color, fontsize=size, ha=ha, va="center", zorder=5)


def levels(axes: Axes, theme: Theme) -> None:
    """Two rulers, in Δ, with the index of each level."""
    colors = SUBSETS[theme.file]
    for place in range(-6, 7):
        label = {0: "0", 1: "Δ", -1: "-Δ"}.get(place, f"{place}Δ")
        write(axes, (place, -0.5), label, theme.faint, 10)
        axes.plot([place, place], [-0.3, 1], color=theme.faint, linewidth=0.5, alpha=0.4, zorder=0)
    for quantizer, y in ((0, 1.0), (1, 0.0)):
        axes.plot([-6.7, 6.7], [y, y], color=theme.faint, linewidth=0.8, zorder=1)
        write(axes, (-7.4, y), f"$Q_{quantizer}$", theme.ink, 15)
        for k in range(-3, 4):
            place = float(np.sign(k) * SETTINGS.lattice(abs(k))[quantizer, 0])
            color = colors[2 * quantizer + k % 2]
            axes.plot(place, y, "o", color=color, markersize=20, markeredgecolor=theme.background, zorder=2)
            write(axes, (place, y - 0.01), f"{k}", theme.ink if k % 2 else theme.background, 11)
    for i, (name, color) in enumerate(zip(NAMES, colors, strict=True)):
        y = 1.2 - 0.45 * i
        axes.plot(8.4, y, "o", color=color, markersize=11)
        write(axes, (8.75, y), name, theme.ink, 11.5, "left")
    axes.set(xlim=(-8.0, 11.0), ylim=(-0.8, 1.5))


def trellis(axes: Axes, theme: Theme) -> None:
    """All branches from the states that can be reached, and the best path, thick, with r, k and r̂ above."""
    colors, (residual, indices, states) = SUBSETS[theme.file], path()
    reached = {0}
    for t in range(SAMPLES):
        for state, parity in itertools.product(sorted(reached), (0, 1)):
            ends = [state, int(TRELLIS.next_state[state, parity])]
            color = colors[2 * int(TRELLIS.quantizer[state]) + parity]
            if state == states[t] and parity == indices[t] % 2:
                axes.plot([t, t + 1], ends, color=color, linewidth=4.5, zorder=3)
            else:
                axes.plot([t, t + 1], ends, color=color, linewidth=1.1, alpha=0.7, zorder=1)
        reached = {int(TRELLIS.next_state[state, parity]) for state in reached for parity in (0, 1)}
        level = np.sign(indices[t]) * SETTINGS.lattice(abs(indices[t]))[TRELLIS.quantizer[states[t]], 0]
        for y, value in zip(
            ROWS.values(), (f"{residual[t]:.1f}", f"{indices[t]}", f"{level:.0f}"), strict=True
        ):
            write(axes, (t + 0.5, y), value.replace("-0.0", "0.0"), theme.ink, 11.5)
    for t, state in itertools.product(range(SAMPLES + 1), range(TRELLIS.states)):
        inside = theme.ink if state == states[t] else theme.background
        axes.plot(t, state, "o", color=inside, markeredgecolor=theme.faint, markersize=6.5, zorder=4)
    for state, quantizer in enumerate(TRELLIS.quantizer):
        write(axes, (-0.2, state), f"{state}   $Q_{quantizer}$", theme.ink, 11, "right")
    for name, y in ROWS.items():
        write(axes, (-0.2, y), name, theme.ink, 12, "right")
    axes.set(xlim=(-0.95, SAMPLES + 0.2), ylim=(7.4, -2.4))  # state 0 at the top


def draw(theme: Theme) -> None:
    figure = plt.figure(figsize=SIZE, facecolor=theme.background)
    upper, lower = figure.add_axes((0.01, 0.7, 0.98, 0.29)), figure.add_axes((0.02, 0.01, 0.96, 0.67))
    for axes in (upper, lower):
        axes.axis("off")
    levels(upper, theme)
    trellis(lower, theme)
    save(figure, theme, "trellis")


if __name__ == "__main__":
    for version in (LIGHT, DARK):
        draw(version)
