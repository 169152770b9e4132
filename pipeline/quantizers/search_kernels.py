"""The compiled searches: the best index of each residual by itself, and the best path through a trellis.

One file with all that it calls, because Numba's cache notices changes of a function's own file only. Two more rules of
that cache and of Numba's speed: arguments are arrays, numbers and tuples of them (a cache that names a class of ours
cannot be loaded once it is renamed), contiguous and writable (each other kind compiles again: see `kernels.plain`).

The trellis search takes all lanes at once, a lane an element of a vector. Numba cannot be told that two rows of an
array never overlap, without which LLVM does not vectorize the step from metrics to metrics; so the two inner steps are
written with LLVM's vectors (`_line_costs`, `_survive`).

Shapes: C channels, T positions of a channel; S states of a trellis; B branches (2 · context + parity) of a σ level.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from pipeline.quantizers.tables import MAX_INDEX
from pipeline.quantizers.trellis import LANES

WIDTH = LANES
LINE_FIELDS = 4
"""Of two neighbouring lines of an envelope: level, rate, level, rate."""
CHUNK = 4
"""Branches whose lines lie side by side."""
_TILE = 32
"""Steps copied at once from [C, T] to lanes side by side; small enough for the first-level cache."""

_I32 = ir.IntType(32)
_U = np.uint64
"""Indices that cannot be negative: Numba then leaves out what it would do if they were."""


def _pointer(context: Any, builder: Any, array_type: Any, array: Any) -> Any:
    return cgutils.create_struct_proxy(array_type)(context, builder, array).data


def _vector(builder: Any, pointer: Any, offset: Any, count: int) -> Any:
    """`pointer` + `offset` as a pointer to a vector of `count`."""
    vector = ir.VectorType(pointer.type.pointee, count)
    return builder.bitcast(builder.gep(pointer, [offset]), vector.as_pointer())


def _splat(builder: Any, value: Any, count: int) -> Any:
    vector = ir.Constant(ir.VectorType(value.type, count), ir.Undefined)
    first = builder.insert_element(vector, value, ir.Constant(_I32, 0))
    return builder.shuffle_vector(first, vector, ir.Constant(ir.VectorType(_I32, count), [0] * count))


@intrinsic
def _line_costs(typingctx: Any, lines: Any, offset: Any, r: Any, work: Any, place: Any) -> Any:
    """work[place + WIDTH·b] = the lower of two lines' costs (r − level)² + rate, for the CHUNK branches at `offset`.

    Gives back a bit a branch: whether it is the upper line's.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        table = _pointer(context, builder, signature.args[0], args[0])
        out = _pointer(context, builder, signature.args[3], args[3])
        residual, integer = _splat(builder, args[2], CHUNK), args[1].type

        def field(i: int) -> Any:
            start = builder.add(args[1], ir.Constant(integer, CHUNK * i))
            return builder.load(_vector(builder, table, start, CHUNK), align=8)

        def cost(line: int) -> Any:
            error = builder.fsub(residual, field(2 * line))
            return builder.fadd(builder.fmul(error, error), field(2 * line + 1))

        one, other = cost(0), cost(1)
        upper = builder.fcmp_ordered("<", other, one)
        least = builder.select(upper, other, one)
        for b in range(CHUNK):
            target = builder.gep(out, [builder.add(args[4], ir.Constant(integer, WIDTH * b))])
            builder.store(builder.extract_element(least, ir.Constant(_I32, b)), target)
        return builder.zext(builder.bitcast(upper, ir.IntType(CHUNK)), ir.IntType(8))

    return types.uint8(lines, types.intp, r, work, types.intp), generate


@intrinsic
def _survive(
    typingctx: Any,
    work: Any,
    one: Any,
    one_cost: Any,
    other: Any,
    other_cost: Any,
    after: Any,
    survivors: Any,
    place: Any,
    bit: Any,
) -> Any:
    """Add, compare, select for one state of all lanes: rows of `work` at five offsets; marks `bit` where other wins."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        rows = _pointer(context, builder, signature.args[0], args[0])
        marks = _vector(builder, _pointer(context, builder, signature.args[6], args[6]), args[7], WIDTH)

        def row(offset: Any) -> Any:
            return builder.load(_vector(builder, rows, offset, WIDTH), align=8)

        first = builder.fadd(row(args[1]), row(args[2]))
        second = builder.fadd(row(args[3]), row(args[4]))
        less = builder.fcmp_ordered("<", second, first)
        builder.store(builder.select(less, second, first), _vector(builder, rows, args[5], WIDTH), align=8)
        bits = builder.load(marks, align=1)
        mark = builder.select(less, _splat(builder, args[8], WIDTH), ir.Constant(bits.type, [0] * WIDTH))
        builder.store(builder.or_(bits, mark), marks, align=1)
        return context.get_dummy_value()

    return types.void(work, *[types.intp] * 5, survivors, types.intp, types.uint8), generate


@numba.njit(nogil=True, cache=True)
def hull(level: Any, offset: Any) -> Any:
    """Lower envelope of the lines offset − 2r·level, sorted by level: those kept, and the r at which each ends."""
    kept = np.empty(level.size, np.int64)
    end = np.empty(level.size, np.float64)
    n = 0
    for line in range(level.size):
        if n > 0 and level[kept[n - 1]] == level[line]:
            continue
        while n > 0:
            top = kept[n - 1]
            crossing = (offset[line] - offset[top]) / (2 * (level[line] - level[top]))
            if n > 1 and crossing <= end[n - 2]:
                n -= 1
            else:
                end[n - 1] = crossing
                break
        kept[n] = line
        n += 1
    end[n - 1] = np.inf
    return kept[:n], end[:n]


@numba.njit(nogil=True, cache=True)
def _best(r: float, number: int, branches: Any, guess: Any, lines: Any) -> Any:
    """The least cost (r − r̂_k)² + λ·bits_k in a branch's subset, |k| ≤ 32766, and its k; see envelope.py."""
    branch = branches[number]
    place = min(max(r, -branch.bound), branch.bound)
    line = guess[branch.first_bin + np.int64((place + branch.bound) * branch.bins_per_unit)]
    while r > lines[line].threshold:
        line += 1
    cost, k = (r - lines[line].level) ** 2 + lines[line].rate, lines[line].index
    if place == r:
        return cost, k
    return _search_escapes(r, branch, cost, k)


# Scalars and records only: an array as argument would be reference-counted in every call of `_best`, at 3× the time.
# And Python's check of the divisor would keep `_best` from being inlined.
@numba.njit(nogil=True, cache=True, error_model="numpy")
def _search_escapes(r: float, branch: Any, cost: float, k: int) -> Any:
    """The same where escapes on r's side may beat (cost, k): the nearest level within each code length."""
    K, u, stride = branch.alphabet, branch.subset, branch.stride
    place = min((abs(r) + branch.shift) / branch.spacing, MAX_INDEX + 1.0)
    nearest = u + stride * np.int64(np.rint((place - u) / stride))
    rate = branch.escape_rate + 2 * branch.bit_rate  # of a sign bit and the code of excess 0
    length = 1  # excesses length − 1 … 2·length − 2 have codes of one length
    while K + length <= min(place + stride, MAX_INDEX):
        low, high = K + length, min(K + 2 * length - 1, MAX_INDEX)
        low, high = low + (u - low) % stride, high - (high - u) % stride
        if low <= high:
            m = min(max(nearest, low), high)
            level = np.float64(np.float32(m * branch.spacing - branch.shift))
            m_cost = (abs(r) - level) ** 2 + rate
            if m_cost < cost:
                cost, k = m_cost, m if r > 0 else -m
        length, rate = 2 * length, rate + 2 * branch.bit_rate
    return cost, k


@numba.njit(nogil=True, cache=True)
def search_each(residual: Any, sigma_index: Any, branches: Any, guess: Any, lines: Any, indices: Any) -> None:
    """Fill in the best index of each residual by itself; one branch a σ level."""
    for i in range(residual.size):
        indices[i] = _best(np.float64(residual[i]), np.int64(sigma_index[i]), branches, guess, lines)[1]


# In the trellis search `envelopes` and `grid` are those of envelope.py and `trail` that of tcq.py, as tuples; `into`,
# uint8 [S, 2, 2], has the two ways into each state: the state before, and the branch. `tile` is (r, level, row) of some
# steps of all lanes: residuals, σ indices, and of one step the rows of the grid; `place` is where the step's lanes
# begin in the trail. Nothing is sliced in the loop over steps: a view costs more than a step.


@numba.njit(nogil=True, cache=True)
def search_lanes(
    residual_CT: Any, sigma_index_CT: Any, envelopes: Any, grid: Any, into: Any, trail: Any, indices_CT: Any
) -> None:
    """Fill in the indices of the best path of each lane."""
    state = search_forward(residual_CT, sigma_index_CT, envelopes, grid, into, trail)
    _backward(residual_CT, sigma_index_CT, envelopes, grid, into, trail, state, indices_CT)


@numba.njit(nogil=True, cache=True)
def search_forward(
    residual_CT: Any, sigma_index_CT: Any, envelopes: Any, grid: Any, into: Any, trail: Any
) -> Any:
    """Viterbi's algorithm: leaves the trail to follow back; the best last state of each lane."""
    states, branches = len(into), grid[5].shape[2]
    channels, positions = residual_CT.shape
    now, then, cost = 0, states * WIDTH, 2 * states * WIDTH  # rows of `work`, WIDTH lanes each
    work = np.full((2 * states + branches) * WIDTH, np.inf)
    work[:WIDTH], least = 0.0, np.empty(WIDTH)
    r, level = np.zeros((_TILE, WIDTH)), np.zeros((_TILE, WIDTH), np.uint8)
    tile, state = (r, level, np.zeros(WIDTH, np.uint32)), np.zeros(WIDTH, np.uint64)
    place = marks = active = 0
    for channel in range(0, channels, WIDTH):
        active = min(WIDTH, channels - channel)
        _finish(work[now : now + states * WIDTH], active, WIDTH, state)
        for position in range(0, positions, _TILE):
            _load(channel, position, sigma_index_CT, level)
            for step in range(_load(channel, position, residual_CT, r)):
                _find_rows(step, tile, grid, trail[1], place)
                if _price(step, tile, grid, work, cost, trail[2], place):
                    _mend(step, tile, envelopes, grid, work, cost)
                for s in range(states):
                    one, one_cost = now + into[s, 0, 0] * WIDTH, cost + into[s, 0, 1] * WIDTH
                    other, other_cost = now + into[s, 1, 0] * WIDTH, cost + into[s, 1, 1] * WIDTH
                    byte, bit = marks + (s >> 3) * WIDTH, np.uint8(1 << (s & 7))
                    _survive(work, one, one_cost, other, other_cost, then + s * WIDTH, trail[0], byte, bit)
                now, then = then, now
                marks += (states + 7) // 8 * WIDTH
                place += WIDTH
            _normalise(work, now, states, least)
    _finish(work[now : now + states * WIDTH], 0, active, state)
    return state


@numba.njit(nogil=True, cache=True)
def _load(channel: int, position: int, values_CT: Any, side_by_side: Any) -> int:
    """Copy up to _TILE positions of the lanes that begin at a channel; how many positions."""
    steps = min(_TILE, values_CT.shape[1] - position)
    for lane in range(min(WIDTH, len(values_CT) - channel)):
        for step in range(steps):
            side_by_side[step, lane] = values_CT[channel + lane, position + step]
    return steps


@numba.njit(nogil=True, cache=True)
def _find_rows(step: int, tile: Any, grid: Any, bins: Any, place: int) -> None:
    """The bin of the grid that each lane's residual falls into, and its row."""
    r, level, row = tile
    bins_per_unit, middle, first_row = grid[:3]
    for lane in range(WIDTH):
        s = level[step, lane]
        found = np.int32(min(max(r[step, lane] * bins_per_unit + middle[s], 0.0), 2 * middle[s] - 1))
        bins[_U(place + lane)] = found
        row[lane] = first_row[s] + np.uint32(found)


@numba.njit(nogil=True, cache=True)
def _price(step: int, tile: Any, grid: Any, work: Any, cost: int, upper: Any, place: int) -> Any:
    """The least cost of every branch of every lane, as far as the grid tells; whether it does not of some lane."""
    r, _, row = tile
    lines, wild, branches = grid[3], grid[4], grid[5].shape[2]
    any_wild = np.uint8(0)
    for lane in range(WIDTH):
        any_wild |= wild[row[lane]]
        offset, bits = np.int64(row[lane]) * branches * LINE_FIELDS, np.uint16(0)
        for b in range(0, branches, CHUNK):
            chunk = _line_costs(lines, offset + b * LINE_FIELDS, r[step, lane], work, cost + b * WIDTH + lane)
            bits |= np.uint16(chunk) << b
        upper[_U(place + lane)] = bits
    return any_wild


@numba.njit(nogil=True, cache=True)
def _mend(step: int, tile: Any, envelopes: Any, grid: Any, work: Any, cost: int) -> None:
    """Costs of the lanes whose bins do not tell: escapes far out, and where three lines meet in one bin."""
    r, level, row = tile
    wild, branches = grid[4], grid[5].shape[2]
    for lane in range(WIDTH):
        if wild[row[lane]]:
            for b in range(branches):
                number = branches * np.int64(level[step, lane]) + b
                work[cost + b * WIDTH + lane] = _best(r[step, lane], number, *envelopes)[0]


@numba.njit(nogil=True, cache=True)
def _normalise(work: Any, now: int, states: int, least: Any) -> None:
    """Take each lane's least metric from all of its own: huge costs must not swallow the small ones after them."""
    least[:] = np.inf
    for place in range(now, now + states * WIDTH, WIDTH):
        for lane in range(WIDTH):
            least[lane] = min(least[lane], work[_U(place + lane)])
    for place in range(now, now + states * WIDTH, WIDTH):
        for lane in range(WIDTH):
            work[_U(place + lane)] -= least[lane]


@numba.njit(nogil=True, cache=True)
def _finish(metric: Any, lane: int, end: int, state: Any) -> None:
    """The best last state of the lanes from `lane` up to `end`, which have no channel any more."""
    for ended in range(lane, end):
        state[ended] = np.argmin(metric[ended::WIDTH])


@numba.njit(nogil=True, cache=True)
def _backward(
    residual_CT: Any,
    sigma_index_CT: Any,
    envelopes: Any,
    grid: Any,
    into: Any,
    trail: Any,
    state: Any,
    indices_CT: Any,
) -> None:
    """Follow the best paths from their last states, and choose the index of each branch on the way."""
    channels, positions = residual_CT.shape
    level, row = np.zeros((_TILE, WIDTH), np.uint8), np.zeros(WIDTH, np.uint32)
    branch, k = np.zeros(WIDTH, np.uint64), np.zeros((_TILE, WIDTH), np.int32)
    ways, indices, branches = into.reshape(-1), grid[5].reshape(-1), grid[5].shape[2]
    marks, place = len(trail[0]), len(trail[1])
    for channel in range((channels - 1) // WIDTH * WIDTH, -1, -WIDTH):
        active = min(WIDTH, channels - channel)
        for position in range((positions - 1) // _TILE * _TILE, -1, -_TILE):
            steps = _load(channel, position, sigma_index_CT, level)
            for step in range(steps - 1, -1, -1):
                marks -= (len(into) + 7) // 8 * WIDTH
                place -= WIDTH
                _trace(marks, trail[0], ways, active, state, branch)
                if _choose(step, level, row, branch, grid, indices, trail, place, k):
                    for lane in range(active):
                        if grid[4][row[lane]]:
                            number = branches * np.int64(level[step, lane]) + np.int64(branch[lane])
                            r = np.float64(residual_CT[channel + lane, position + step])
                            k[step, lane] = _best(r, number, *envelopes)[1]
            for lane in range(active):
                for step in range(steps):
                    indices_CT[channel + lane, position + step] = k[step, lane]


@numba.njit(nogil=True, cache=True)
def _trace(marks: int, survivors: Any, into: Any, active: int, state: Any, branch: Any) -> None:
    """One step back: the branch by which each lane came into its state, and the state it came from."""
    for lane in range(active):
        s = state[lane]
        byte = survivors[_U(marks) + (s >> _U(3)) * _U(WIDTH) + _U(lane)]
        way = _U(4) * s + _U(2) * ((_U(byte) >> (s & _U(7))) & _U(1))
        state[lane], branch[lane] = into[way], into[way + _U(1)]


@numba.njit(nogil=True, cache=True)
def _choose(
    step: int, level: Any, row: Any, branch: Any, grid: Any, indices: Any, trail: Any, place: int, k: Any
) -> Any:
    """The index of each lane's branch, as far as the grid tells; whether it does not of some lane."""
    first_row, wild, branches = grid[2], grid[4], _U(grid[5].shape[2])
    bins, upper = trail[1], trail[2]
    any_wild = np.uint8(0)
    for lane in range(WIDTH):
        row[lane] = first_row[level[step, lane]] + bins[_U(place + lane)]
        any_wild |= wild[row[lane]]
        line = _U(2) * _U(row[lane]) + ((_U(upper[_U(place + lane)]) >> branch[lane]) & _U(1))
        k[step, lane] = indices[line * branches + branch[lane]]
    return any_wild
