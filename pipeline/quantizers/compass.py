"""Minimisation of a costly, smooth function of one or two variables without derivatives, in some fifteen looks.

Compass search (Kolda, Lewis, Torczon, "Optimization by direct search", SIAM Review 45, 2003, section 1): look a step to
either side along each axis, go where it is lowest, halve the step where nothing is lower. Near its minimum the function
is almost a parabola, so before each halving the vertex, known from the same looks, is tried as well.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping, Sequence

Point = tuple[float, ...]
"""Displacement from where the search starts, by axis."""


def descend(widths: Sequence[float], halvings: int) -> Generator[Point, float, Point]:
    """Yields points to look at, none twice, and wants each one's cost sent (infinite: no such place); returns the best.

    Args:
        widths: the first step of each axis: powers of two, which keep sums exact, so that places are recognised.
        halvings: how often the steps are halved before the search ends.
    """
    known: dict[Point, float] = {}
    best: Point = (0.0,) * len(widths)
    yield from _look([best], known)
    for halving in range(halvings + 1):
        steps = [width / 2**halving for width in widths]
        while True:
            around = [_moved(best, axis, way * step) for axis, step in enumerate(steps) for way in (-1, 1)]
            yield from _look(around, known)
            lowest = min(around, key=known.__getitem__)
            if known[lowest] >= known[best]:
                break
            best = lowest
        vertex = _vertex(best, steps, known)
        yield from _look([vertex], known)
        best = min(best, vertex, key=known.__getitem__)
    return best


def _look(points: Iterable[Point], known: dict[Point, float]) -> Generator[Point, float, None]:
    for point in points:
        if point not in known:
            known[point] = yield point


def _moved(point: Point, axis: int, by: float) -> Point:
    return (*point[:axis], point[axis] + by, *point[axis + 1 :])


def _vertex(best: Point, steps: Sequence[float], known: Mapping[Point, float]) -> Point:
    """Along each axis the vertex of the parabola through `best` and its two neighbours, none of which is lower.

    Taken to the next eighth of a step, again for exact sums.
    """
    vertex = best
    for axis, step in enumerate(steps):
        left, right = (known[_moved(best, axis, way * step)] for way in (-1, 1))
        bend = left - 2 * known[best] + right
        if 0 < bend < float("inf"):
            vertex = _moved(vertex, axis, step * round(4 * (left - right) / bend) / 8)
    return vertex
