"""Draws method.png and method-dark.png: the stages, and below them the codec's signal flow.

python docs/pictures/make.py
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch

FOLDER = Path(__file__).parent
SIZE = (12.0, 4.95)  # inches, and the picture's units
DOTS_PER_INCH = 160


@dataclass(frozen=True)
class Theme:
    """Colours of one version."""

    file: str
    background: str
    ink: str
    faint: str
    stage: str
    real: str  # what is quantized for real
    trained: str  # what finetuning changes


LIGHT = Theme("method.png", "#ffffff", "#1f2328", "#6e7781", "#eef1f5", "#fbe3c8", "#cfe6d6")
DARK = Theme("method-dark.png", "#0d1117", "#e6edf3", "#aab4bf", "#1c232c", "#5a3a17", "#1d4530")


class Drawing:
    """Boxes and arrows on one pair of axes, in inches from the lower left."""

    def __init__(self, axes: Axes, theme: Theme) -> None:
        self.axes, self.theme = axes, theme
        self._layer = 0  # what is drawn later lies above

    def box(
        self, x: float, y: float, size: tuple[float, float], text: str, fill: str, below: str = ""
    ) -> None:
        """A box centred at (x, y), with its title and, smaller, what it does."""
        width, height = size
        shape = FancyBboxPatch(
            (x - width / 2, y - height / 2),
            width,
            height,
            boxstyle="round,pad=0,rounding_size=0.1",
            facecolor=fill,
            edgecolor=self.theme.faint,
            linewidth=1,
            zorder=self._above(),
        )
        self.axes.add_patch(shape)
        self.text(x, y + (0.17 if below else 0), text, 12.5, weight="bold")
        if below:
            self.text(x, y - 0.2, below, 8.6, color=self.theme.faint)

    def path(self, *points: tuple[float, float]) -> None:
        """A line with corners that ends in an arrow. It passes over lines drawn before, with a gap."""
        xs, ys = zip(*points, strict=True)
        if xs[0] == xs[1]:
            gap = [min(ys[:2]) + 0.15, max(ys[:2]) - 0.15]
            self.axes.plot(xs[:2], gap, color=self.theme.background, linewidth=6, zorder=self._above())
        ink, layer = self.theme.ink, self._above()
        self.axes.plot(xs[:-1], ys[:-1], color=ink, linewidth=1.2, solid_joinstyle="miter", zorder=layer)
        head = FancyArrowPatch(
            points[-2],
            points[-1],
            arrowstyle="-|>",
            mutation_scale=11,
            color=ink,
            linewidth=1.2,
            shrinkA=0,
            shrinkB=0,
            zorder=layer,
        )
        self.axes.add_patch(head)

    def _above(self) -> int:
        self._layer += 1
        return self._layer

    def sum(self, x: float, y: float, sign: str) -> None:
        """A circle with a sign in it."""
        circle = Circle(
            (x, y), 0.16, facecolor=self.theme.stage, edgecolor=self.theme.faint, zorder=self._above()
        )
        self.axes.add_patch(circle)
        self.text(x, y, sign, 12)

    def text(
        self,
        x: float,
        y: float,
        text: str,
        size: float,
        color: str = "",
        weight: str = "normal",
        ha: str = "center",
    ) -> None:
        """Words centred at (x, y)."""
        self.axes.text(
            x,
            y,
            text,
            fontsize=size,
            color=color or self.theme.ink,
            weight=weight,
            ha=ha,
            va="center",
            zorder=self._above(),
        )


def stages(d: Drawing) -> None:
    """The upper row: what runs, and what passes from one to the next."""
    theme, y, size = d.theme, 4.0, (1.56, 0.92)
    row = [
        ("ingest", "canonical pixels", theme.stage),
        ("train", "one codec per λ", theme.stage),
        ("quantize", "real trellis, Ray tasks", theme.real),
        ("finetune", "on what it will see", theme.trained),
        ("evaluate", "bpp, PSNR, MS-SSIM", theme.stage),
        ("report", "tables, plots, crops", theme.stage),
    ]
    xs = [1.1 + 1.96 * i for i in range(len(row))]
    for x, (name, what, fill) in zip(xs, row, strict=True):
        d.box(x, y, size, name, fill, what)
    for x, label in zip(xs, ("images", "codec", "latents", "codec", "scores"), strict=False):
        d.path((x + 0.8, y), (x + 1.16, y))
        d.text(x + 0.98, y + 0.64, label, 8.6, color=theme.faint)


def signal_flow(d: Drawing) -> None:
    """The lower half: the codec, in the paper's symbols."""
    theme, top, low = d.theme, 2.5, 0.85
    small, wide = (0.86, 0.58), (2.1, 0.58)
    d.box(1.45, top, small, "$g_a$", theme.stage)
    d.box(4.95, top, wide, "trellis search", theme.real)
    d.box(7.35, top, small, "$Q^{-1}$", theme.stage)
    d.box(10.3, top, small, "$g_s$", theme.trained)
    d.box(2.25, low, small, "$h_a$", theme.stage)
    d.box(3.75, low, small, "round", theme.stage)
    d.box(5.95, low, wide, "$h_s$ in integers", theme.stage)
    for x, sign in ((2.95, "−"), (8.45, "+")):
        d.sum(x, top, sign)

    flow = [0.6, 1.02, 1.88, 2.79, 3.11, 3.9, 6.0, 6.92, 7.78, 8.29, 8.61, 9.87, 10.73, 11.2]
    for start, end in zip(flow[::2], flow[1::2], strict=True):
        d.path((start, top), (end, top))
    for x, label in ((0.38, "$x$"), (11.45, r"$\hat{x}$")):
        d.text(x, top, label, 15)
    for x, label in ((2.25, "$y$"), (3.5, "$r$"), (6.45, "$k$"), (8.03, r"$\hat{r}$"), (9.2, r"$\hat{y}$")):
        d.text(x, top + 0.22, label, 12)

    d.path((2.25, top), (2.25, low + 0.29))
    d.path((2.68, low), (3.32, low))
    d.path((4.18, low), (4.9, low))
    d.text(4.54, low + 0.2, "$n$", 12)
    d.path((7.0, low), (8.45, low), (8.45, top - 0.16))  # μ to the decoder's sum
    d.path((7.7, low), (7.7, 1.5), (2.95, 1.5), (2.95, top - 0.16))  # … and to the encoder's difference
    d.path((5.95, low + 0.29), (5.95, 1.85), (4.95, 1.85), (4.95, top - 0.29))  # σ to the search
    d.path((5.95, 1.85), (7.35, 1.85), (7.35, top - 0.29))  # … and to the reconstruction
    d.text(8.67, low + 0.35, "μ", 11.5)
    d.text(5.76, 1.32, "σ", 11.5)


def legend(d: Drawing) -> None:
    """What the two colours mean."""
    entries = [
        (d.theme.real, "quantized for real, over the tables that the rate is counted with"),
        (d.theme.trained, "finetuned at these indices (decoder+scale: the scale rows of $h_s$, too)"),
    ]
    for x, (fill, words) in zip((0.55, 6.15), entries, strict=True):
        d.box(x, 0.2, (0.3, 0.17), "", fill)
        d.text(x + 0.27, 0.2, words, 8.6, color=d.theme.faint, ha="left")


def save(figure: Figure, theme: Theme, name: str) -> None:
    """Write a picture under the name it has in this theme, and forget it."""
    file = FOLDER / theme.file.replace("method", name)
    figure.savefig(file, dpi=DOTS_PER_INCH, facecolor=theme.background)
    plt.close(figure)


def draw(theme: Theme) -> None:
    """One picture."""
    figure = plt.figure(figsize=SIZE, facecolor=theme.background)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, SIZE[0]), ylim=(0, SIZE[1]))
    axes.axis("off")
    drawing = Drawing(axes, theme)
    stages(drawing)
    signal_flow(drawing)
    legend(drawing)
    save(figure, theme, "method")


if __name__ == "__main__":
    for version in (LIGHT, DARK):
        draw(version)
