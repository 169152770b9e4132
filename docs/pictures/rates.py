"""Draws rate-distortion.png and rate-distortion-dark.png from benchmarks/rate_distortion.csv.

python docs/pictures/rates.py
"""

from __future__ import annotations

import csv
import itertools

from make import DARK, FOLDER, LIGHT, Theme, save
from matplotlib import colormaps
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

TABLE = FOLDER.parents[1] / "benchmarks" / "rate_distortion.csv"
SIZE = (12.0, 4.4)  # inches
SHOWN = {
    "scalar (ECSQ)": "scalar",
    "vvc8, plain levels": "8, plain levels",
    "vvc4": "4 states",
    "vvc8": "8",
    "ungerboeck16": "16",
    "ungerboeck32": "32",
    "ungerboeck64": "64",
    "ungerboeck128": "128",
    "ungerboeck256": "256",
}
"""Quantizers from the worst to the best, and their labels."""
SPACE_FILLING_DB = 1.533
"""What a scalar quantizer lacks at high rate: 10 log10(2πe/12)."""


def curves() -> dict[str, dict[str, tuple[list[float], list[float]]]]:
    """Source, quantizer -> bits and gap in dB."""
    with TABLE.open() as file:
        rows = list(csv.DictReader(file))
    found: dict[str, dict[str, tuple[list[float], list[float]]]] = {}
    for (source, name), lines in itertools.groupby(rows, lambda row: (row["source"], row["quantizer"])):
        points = [(float(row["bits"]), float(row["gap_db"])) for row in lines]
        found.setdefault(source, {})[name] = ([x for x, _ in points], [y for _, y in points])
    return found


def panel(axes: Axes, theme: Theme, source: str, found: dict[str, tuple[list[float], list[float]]]) -> None:
    trellises = colormaps["plasma"]
    axes.set_facecolor(theme.background)
    axes.axhline(SPACE_FILLING_DB, color=theme.faint, linewidth=0.8, linestyle=":")
    for i, (name, label) in enumerate(SHOWN.items()):
        color = trellises(0.95 - 0.11 * (i - 2)) if theme is DARK else trellises(0.85 - 0.12 * (i - 2))
        style = {"color": color}
        if name == "scalar (ECSQ)":
            style = {"color": theme.ink}
        elif "plain" in name:
            style = {"color": theme.faint, "linestyle": "--"}
        axes.plot(*found[name], marker="o", markersize=3.5, linewidth=1.4, label=label, **style)
    axes.set_title(source, color=theme.ink, fontsize=12.5)
    axes.set(xlim=(0, 4.15), ylim=(0, 1.7), xlabel="bits a sample")
    axes.xaxis.label.set_color(theme.ink)
    axes.tick_params(colors=theme.faint, labelsize=9.5)
    axes.grid(color=theme.faint, linewidth=0.4, alpha=0.35)
    for spine in axes.spines.values():
        spine.set_color(theme.faint)


def draw(theme: Theme) -> None:
    found = curves()
    figure, row = plt.subplots(1, len(found), figsize=SIZE, sharey=True, facecolor=theme.background)
    for axes, (source, of_source) in zip(row, found.items(), strict=True):
        panel(axes, theme, source, of_source)
    row[0].set_ylabel("above D(R), dB", color=theme.ink)
    figure.legend(
        *row[0].get_legend_handles_labels(),
        loc="center right",
        frameon=False,
        fontsize=10,
        labelcolor=theme.ink,
    )
    figure.tight_layout(rect=(0, 0, 0.875, 1))
    save(figure, theme, "rate-distortion")


if __name__ == "__main__":
    for version in (LIGHT, DARK):
        draw(version)
