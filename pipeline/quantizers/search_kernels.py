"""The compiled searches: the best index of each residual by itself, and the best path through a trellis.

One file with all that it calls, because Numba's cache notices changes of a function's own file only. Two more rules of
that cache and of Numba's speed: arguments are arrays, numbers and tuples of them (a cache that names a class of ours
cannot be loaded once it is renamed), contiguous and writable (each other kind compiles again: see `kernels.plain`).

The trellis search takes all lanes at once, a lane an element of a vector. Numba cannot be told that two rows of an
array never overlap, without which LLVM does not vectorize; so the inner steps are written with LLVM's vectors
(`_turn`, `_line_costs`, `_survive`).

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
UNKNOWN = -MAX_INDEX - 2
"""Index of a line in a bin that does not tell: int16's least."""
_TILE, _BACK_TILE = 32, 256
"""Steps turned at once from [C, T] to lanes side by side: what the first-level cache holds, forward and back."""
_PRICED = 32
"""Branches · steps whose costs are found at once."""

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


def _interleaved(builder: Any, one: Any, other: Any) -> list[Any]:
    """Two vectors of 8, elements in turn: the first 8 and the last."""
    order = [place for i in range(8) for place in (i, 8 + i)]
    halves = (ir.Constant(ir.VectorType(_I32, 8), half) for half in (order[:8], order[8:]))
    return [builder.shuffle_vector(one, other, half) for half in halves]


def _widened(builder: Any, vector: Any, element: Any) -> Any:
    wanted = ir.VectorType(element, vector.type.count)
    if vector.type == wanted:
        return vector
    return (
        builder.fpext(vector, wanted) if isinstance(element, ir.DoubleType) else builder.sext(vector, wanted)
    )


@intrinsic
def _turn(typingctx: Any, source: Any, start: Any, stride: Any, target: Any, place: Any, width: Any) -> Any:
    """target[place + width·j + i] = source[start + stride·i + j] for i and j from 0 to 7."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        one, other = (_pointer(context, builder, signature.args[i], args[i]) for i in (0, 3))

        def row(pointer: Any, first: Any, step: Any, i: int) -> Any:
            offset = builder.add(first, builder.mul(step, ir.Constant(step.type, i)))
            return _vector(builder, pointer, offset, 8)

        rows = [builder.load(row(one, args[1], args[2], i), align=1) for i in range(8)]
        for _ in range(3):  # three perfect shuffles of 8 × 8 make a transposition
            pairs = zip(rows[:4], rows[4:], strict=True)
            rows = [half for pair in pairs for half in _interleaved(builder, *pair)]
        for j, turned in enumerate(rows):
            kept = _widened(builder, turned, other.type.pointee)
            builder.store(kept, row(other, args[4], args[5], j), align=1)
        return context.get_dummy_value()

    return types.void(source, types.intp, types.intp, target, types.intp, types.intp), generate


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
# steps of all lanes, lanes side by side: residuals, σ indices, rows of the grid; `place` is where these steps begin in
# the trail. Nothing is sliced in the loop over steps, and few functions are called: a view, or the many words that make
# an array as an argument, cost as much as a step.


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
    residual, sigma_index = residual_CT.reshape(-1), sigma_index_CT.reshape(-1)
    together = max(1, _PRICED // branches)
    now, then, cost = 0, states * WIDTH, 2 * states * WIDTH  # rows of `work`, WIDTH lanes each
    work, least = np.full((2 * states + together * branches) * WIDTH, np.inf), np.empty(WIDTH)
    work[:WIDTH] = 0.0  # state 0
    tile = (np.zeros(_TILE * WIDTH), np.zeros(_TILE * WIDTH, np.uint8), np.zeros(_TILE * WIDTH, np.uint32))
    state, place, marks, active = np.zeros(WIDTH, np.uint64), 0, 0, 0
    for channel in range(0, channels, WIDTH):
        active = min(WIDTH, channels - channel)
        _finish(work[now : now + states * WIDTH], active, WIDTH, state)
        for position in range(0, positions, _TILE):
            steps, start = min(_TILE, positions - position), channel * positions + position
            _transpose(residual, start, positions, active, steps, tile[0], 0, WIDTH)
            _transpose(sigma_index, start, positions, active, steps, tile[1], 0, WIDTH)
            for first in range(0, steps, together):
                count = min(together, steps - first)
                _find_rows(first, count, tile, grid, trail[1], place)
                if _price(first, count, tile, grid, work, cost, trail[2], place):
                    _mend(first, count, tile, envelopes, grid, work, cost)
                place += count * WIDTH
                for costs in range(cost, cost + count * branches * WIDTH, branches * WIDTH):
                    for byte in range(marks, marks + (states + 7) // 8 * WIDTH):
                        trail[0][_U(byte)] = 0
                    for s in range(states):
                        one, one_cost = now + into[s, 0, 0] * WIDTH, costs + into[s, 0, 1] * WIDTH
                        other, other_cost = now + into[s, 1, 0] * WIDTH, costs + into[s, 1, 1] * WIDTH
                        byte, bit = marks + (s >> 3) * WIDTH, np.uint8(1 << (s & 7))
                        _survive(
                            work, one, one_cost, other, other_cost, then + s * WIDTH, trail[0], byte, bit
                        )
                    now, then = then, now
                    marks += (states + 7) // 8 * WIDTH
            _normalise(work, now, states, least)
    _finish(work[now : now + states * WIDTH], 0, active, state)
    return state


@numba.njit(nogil=True, cache=True)
def _transpose(
    source: Any, start: int, stride: int, rows: int, columns: int, target: Any, place: int, width: int
) -> None:
    """target[place + width·j + i] = source[start + stride·i + j] for i below rows, j below columns."""
    whole = columns // 8 * 8 if rows % 8 == 0 else 0
    for i in range(0, rows, 8):
        for j in range(0, whole, 8):
            _turn(source, start + stride * i + j, stride, target, place + width * j + i, width)
    for i in range(rows):
        for j in range(whole, columns):
            target[_U(place + width * j + i)] = source[_U(start + stride * i + j)]


@numba.njit(nogil=True, cache=True)
def _find_rows(first: int, count: int, tile: Any, grid: Any, bins: Any, place: int) -> None:
    """The bin of the grid that each residual falls into, and its row."""
    r, level, row = tile
    bins_per_unit, middle, first_row = grid[:3]
    for i in range(first * WIDTH, (first + count) * WIDTH):
        s, at = level[_U(i)], _U(place + i - first * WIDTH)
        found = np.int32(min(max(r[_U(i)] * bins_per_unit + middle[s], 0.0), 2 * middle[s] - 1))
        bins[at] = found
        row[_U(i)] = first_row[s] + np.uint32(found)


@numba.njit(nogil=True, cache=True)
def _price(first: int, count: int, tile: Any, grid: Any, work: Any, cost: int, upper: Any, place: int) -> Any:
    """The least cost of every branch, as far as the grid tells; whether it does not somewhere."""
    branches = grid[5].shape[2]
    if branches == CHUNK:  # tables by quantizer: a number that the compiler knows, and no loop over branches
        return _price_lines(CHUNK, first, count, tile, grid, work, cost, upper, place)
    return _price_lines(branches, first, count, tile, grid, work, cost, upper, place)


@numba.njit(nogil=True, cache=True, inline="always")
def _price_lines(
    branches: int,
    first: int,
    count: int,
    tile: Any,
    grid: Any,
    work: Any,
    cost: int,
    upper: Any,
    place: int,
) -> Any:
    r, _, row = tile
    lines, wild = grid[3], grid[4]
    any_wild = np.uint8(0)
    for step in range(count):
        for lane in range(WIDTH):
            i, target = _U((first + step) * WIDTH + lane), cost + step * branches * WIDTH + lane
            offset, bits = np.int64(row[i]) * branches * LINE_FIELDS, np.uint16(0)
            any_wild |= wild[row[i]]
            for b in range(0, branches, CHUNK):
                chunk = _line_costs(lines, offset + b * LINE_FIELDS, r[i], work, target + b * WIDTH)
                bits |= np.uint16(chunk) << b
            upper[_U(place + step * WIDTH + lane)] = bits
    return any_wild


@numba.njit(nogil=True, cache=True)
def _mend(first: int, count: int, tile: Any, envelopes: Any, grid: Any, work: Any, cost: int) -> None:
    """Costs where bins do not tell: escapes far out, and where three lines meet in one bin."""
    r, level, row = tile
    wild, branches = grid[4], grid[5].shape[2]
    for step in range(count):
        for lane in range(WIDTH):
            i = (first + step) * WIDTH + lane
            if wild[row[i]]:
                for b in range(branches):
                    found = _best(r[i], branches * np.int64(level[i]) + b, *envelopes)[0]
                    work[cost + (step * branches + b) * WIDTH + lane] = found


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
    sigma_index, indices = sigma_index_CT.reshape(-1), indices_CT.reshape(-1)
    level, k = np.zeros(_BACK_TILE * WIDTH, np.uint8), np.zeros(_BACK_TILE * WIDTH, np.int16)
    branch, branches = np.zeros(WIDTH, np.uint64), grid[5].shape[2]
    ways, packed, rows = into.reshape(-1), _pack(into), (grid[2], grid[5].reshape(-1), branches)
    marks, place = len(trail[0]), len(trail[1])
    for channel in range((channels - 1) // WIDTH * WIDTH, -1, -WIDTH):
        active = min(WIDTH, channels - channel)
        for position in range((positions - 1) // _BACK_TILE * _BACK_TILE, -1, -_BACK_TILE):
            steps, start = min(_BACK_TILE, positions - position), channel * positions + position
            _transpose(sigma_index, start, positions, active, steps, level, 0, WIDTH)
            for first in range((steps - 1) * WIDTH, -1, -WIDTH):
                marks -= (len(into) + 7) // 8 * WIDTH
                place -= WIDTH
                if len(into) <= 8:
                    _trace_packed(marks, trail[0], packed[0], packed[1], active, state, branch)
                else:
                    _trace(marks, trail[0], ways, active, state, branch)
                if _choose(first, level, branch, rows, trail, place, k):
                    for lane in range(active):
                        if k[first + lane] == UNKNOWN:
                            number = branches * np.int64(level[first + lane]) + np.int64(branch[lane])
                            r = np.float64(residual_CT[channel + lane, position + first // WIDTH])
                            k[first + lane] = _best(r, number, *envelopes)[1]
            _transpose(k, 0, WIDTH, steps, active, indices, start, positions)


@numba.njit(nogil=True, cache=True)
def _pack(into: Any) -> Any:
    """Of up to 8 states the first ways into all, then the second: a byte each, 3 bits of state, then the branch."""
    packed = np.zeros(2, np.uint64)
    for s in range(min(8, len(into))):
        for way in range(2):
            packed[way] |= (_U(into[s, way, 0]) | (_U(into[s, way, 1]) << _U(3))) << _U(8 * s)
    return packed


@numba.njit(nogil=True, cache=True)
def _trace_packed(
    marks: int, survivors: Any, first: int, second: int, active: int, state: Any, branch: Any
) -> None:
    """As `_trace`, for up to 8 states: shifts in place of lookups, so that LLVM vectorizes."""
    differing = first ^ second
    for lane in range(active):
        s = state[_U(lane)]
        bit = (_U(survivors[_U(marks + lane)]) >> s) & _U(1)
        way = (first ^ (differing & (_U(0) - bit))) >> (s << _U(3))
        state[_U(lane)], branch[_U(lane)] = way & _U(7), (way >> _U(3)) & _U(31)


@numba.njit(nogil=True, cache=True)
def _trace(marks: int, survivors: Any, into: Any, active: int, state: Any, branch: Any) -> None:
    """One step back: the branch by which each lane came into its state, and the state it came from."""
    for lane in range(active):
        s = state[lane]
        byte = survivors[_U(marks) + (s >> _U(3)) * _U(WIDTH) + _U(lane)]
        way = _U(4) * s + _U(2) * ((_U(byte) >> (s & _U(7))) & _U(1))
        state[lane], branch[lane] = into[way], into[way + _U(1)]


@numba.njit(nogil=True, cache=True)
def _choose(first: int, level: Any, branch: Any, rows: Any, trail: Any, place: int, k: Any) -> Any:
    """The index of each lane's branch, as far as the grid tells; whether it does not of some lane."""
    first_row, indices, branches = rows[0], rows[1], _U(rows[2])
    bins, upper = trail[1], trail[2]
    least = np.int16(0)
    for lane in range(WIDTH):
        i, at = _U(first + lane), _U(place + lane)
        row = _U(first_row[level[i]] + bins[at])
        line = _U(2) * row + ((_U(upper[at]) >> branch[lane]) & _U(1))
        k[i] = indices[line * branches + branch[lane]]
        least = min(least, k[i])
    return least == UNKNOWN
