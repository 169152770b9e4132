"""The tables that search, rate estimate, entropy coder and decoder share: one truth, and its bytes.

Shapes: L σ levels (64); K_l the largest |k| of level l coded without escape; C contexts; Q quantizers. Rows are
ragged because K grows with σ: level l has C rows of 2K_l + 2 frequencies (k = −K_l … K_l, then the escape) and Q
rows of K_l + 1 reconstruction points (|k| = 0 … K_l), all stored one after another.
"""

from __future__ import annotations

import hashlib
import json
import reprlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors.numpy

from pipeline.frequencies import TOTAL
from pipeline.quantizer_kinds import LMBDA_Q_MAX, STATE_CONTEXTS, STEP_RANGE, check
from pipeline.quantizers.trellis import SCALAR, TRELLISES, Trellis
from pipeline.sigma import SIGMA_LEVELS

MAX_INDEX = 32766
"""Largest |k|. Searches saturate here, so int16's minimum, the fill value of latent stores, is never an index."""
MAX_ALPHABET = 2047
"""Bound of K: more symbols would leave too little of the 2**16 for the likely ones."""
SEARCHES_KEPT = 16
"""Of so many tables what a search needs is kept: 4 MB each by quantizer, 18 MB by state, more with a small step. Ten
steps of effort ask for eleven weights of rate where all lower J, as most do."""
METADATA_KEY = "retrellis.tables"
FORMAT_VERSION = 2
_SETTING_TYPES: dict[str, tuple[Any, str]] = {  # and what a message calls them
    "kind": (str, "a name"),
    "trellis": (str | None, "a name or null"),
    "step": (float | int, "a number"),
    "lmbda_q": (float | int, "a number"),
    "context": (str, "a name"),
    "offset": (tuple, "a list of numbers"),
}
_DTYPES = {
    "alphabet": np.dtype(np.int32),
    "frequencies": np.dtype(np.uint16),
    "reconstruction": np.dtype(np.float32),
}


@dataclass(frozen=True, slots=True)
class Settings:
    """What a user chooses of a quantizer; `pipeline.quantizers.settings` fills in each kind's defaults.

    Attributes:
        kind: name in `pipeline.quantizer_kinds.KINDS`.
        trellis: name in `TRELLISES`, or None for a scalar quantizer.
        step: Δ, latent units. A scalar quantizer's levels lie Δ apart, the union of a trellis quantizer's two as well.
        lmbda_q: λ_q/Δ², the weight of one bit against squared error in units of Δ²; 0 ignores the rate.
        context: what of a trellis selects the frequency table: the "quantizer" of its state, or the "state" itself.
        offset: a deadzone quantizer's rounding offset, k = ⌊|r|/Δ + offset⌋: one number, or one a σ level.

    Raises:
        ValueError: if a value is impossible, or the kind has no use for it.
    """

    kind: str
    trellis: str | None
    step: float
    lmbda_q: float
    context: str = "quantizer"
    offset: tuple[float, ...] = (0.5,)

    def __post_init__(self) -> None:
        for name, (kind, words) in _SETTING_TYPES.items():
            _check_type(name, getattr(self, name), kind, words)
        for number in self.offset:
            _check_type("offset", number, float | int, "numbers")
        if self.trellis is not None and self.trellis not in TRELLISES:
            raise ValueError(
                f"quantizer trellis: expected one of {', '.join(TRELLISES)}, found {self.trellis!r}"
            )
        low, high = STEP_RANGE
        if not low <= self.step <= high:  # also refuses NaN
            raise ValueError(f"quantizer step Δ: expected {low} to {high} (latent units), found {self.step}")
        if not 0 <= self.lmbda_q <= LMBDA_Q_MAX:
            raise ValueError(
                f"quantizer lmbda_q (λ_q/Δ²): expected 0 to {LMBDA_Q_MAX}, found {reprlib.repr(self.lmbda_q)}"
            )
        if self.context not in ("quantizer", "state"):
            raise ValueError(f"quantizer context: expected quantizer or state, found {self.context!r}")
        if self.context == "state" and self.trellis not in STATE_CONTEXTS:
            raise ValueError(
                "quantizer context state: expected a trellis of at most 8 states, each of which gets tables of its "
                f"own, found trellis {self.trellis}"
            )
        if len(self.offset) not in (1, SIGMA_LEVELS) or not all(0 <= o <= 0.5 for o in self.offset):
            raise ValueError(
                f"quantizer offset: expected 1 or {SIGMA_LEVELS} numbers from 0 to 0.5, found {self.offset}"
            )
        offset = None if self.offset == (0.5,) else self.offset
        check(self.kind, {"trellis": self.trellis, "lmbda_q": self.lmbda_q, "offset": offset})

    @property
    def machine(self) -> Trellis:
        """How indices move the state; a scalar quantizer has one state."""
        return SCALAR if self.trellis is None else TRELLISES[self.trellis]

    @property
    def quantizers(self) -> int:
        """Q: 1 for a scalar quantizer, 2 for a trellis."""
        return 1 if self.trellis is None else 2

    @property
    def state_contexts(self) -> npt.NDArray[np.uint8]:
        """The context of each state, uint8 [S]."""
        machine = self.machine
        return np.arange(machine.states, dtype=np.uint8) if self.context == "state" else machine.quantizer

    @property
    def context_quantizers(self) -> npt.NDArray[np.uint8]:
        """The quantizer of each context, uint8 [C]: which levels its indices have."""
        everyone = np.arange(self.quantizers, dtype=np.uint8)
        return self.machine.quantizer if self.context == "state" else everyone

    @property
    def contexts(self) -> int:
        """C: how many frequency tables a σ level has; a trellis has one per quantizer, or one per state."""
        return len(self.context_quantizers)

    @property
    def spacing(self) -> float:
        """Distance of one quantizer's neighbouring levels, latent units: Δ, or 2Δ with a trellis."""
        return self.step * self.quantizers

    def lattice(self, magnitude: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """Plain levels of |k| [n]: float64 [Q, n]. Scalar: |k|Δ. Trellis: Q0 2|k|Δ, Q1 (2|k| − 1)Δ and 0."""
        m = np.asarray(magnitude, np.float64)
        shift = self.step * np.arange(self.quantizers)[:, None]
        levels: npt.NDArray[np.float64] = np.maximum(m * self.spacing - shift, 0.0)
        return levels


def alphabet_sizes(settings: Settings, sigmas: npt.NDArray[np.float64]) -> npt.NDArray[np.int32]:
    """K of each σ level [L], int32 [L]: covers 4σ (a Gaussian leaves 6e-5 to the escape), at least 4."""
    cover = np.ceil(4 * sigmas / settings.spacing).astype(np.int32) + 1
    return np.clip(cover, 4, MAX_ALPHABET)


@dataclass(frozen=True, eq=False)
class Tables:
    """Everything encoder and decoder must agree on. Checked when made; compared by `digest`.

    Attributes:
        settings: the quantizer's settings.
        alphabet: K_l, int32 [L].
        frequencies: uint16 [Σ C(2K_l + 2)], each row sums to 2**16, no entry 0.
        reconstruction: float32 [Σ Q(K_l + 1)], r̂ for |k| in latent units; k's sign is applied, |k| = 0 gives 0.
            Beyond the alphabet the levels are `settings.lattice`.

    Raises:
        ValueError: naming the array, what was expected and what was found.
    """

    settings: Settings
    alphabet: npt.NDArray[np.int32]
    frequencies: npt.NDArray[np.uint16]
    reconstruction: npt.NDArray[np.float32]

    def __post_init__(self) -> None:
        for name, dtype in _DTYPES.items():
            found = getattr(self, name)
            if found.dtype != dtype or found.ndim != 1:
                raise ValueError(
                    f"tables: {name}: expected {dtype} in 1 dimension, found {found.dtype} {found.shape}"
                )
        _expect_shape("alphabet", self.alphabet, SIGMA_LEVELS)
        if self.alphabet.min() < 1 or self.alphabet.max() > MAX_ALPHABET:
            span = f"{self.alphabet.min()} to {self.alphabet.max()}"
            raise ValueError(f"tables: alphabet: expected 1 to {MAX_ALPHABET} everywhere, found {span}")
        _expect_shape("frequencies", self.frequencies, self.frequency_start[-1])
        _expect_shape("reconstruction", self.reconstruction, self.reconstruction_start[-1])
        for level in range(SIGMA_LEVELS):
            _check_level(level, self.frequency_rows(level), self.reconstruction_rows(level))

    @cached_property
    def frequency_start(self) -> npt.NDArray[np.int64]:
        """Where level l's frequencies begin, int64 [L + 1]."""
        return _starts(self.settings.contexts * (2 * self.alphabet.astype(np.int64) + 2))

    @cached_property
    def reconstruction_start(self) -> npt.NDArray[np.int64]:
        """Where level l's reconstruction points begin, int64 [L + 1]."""
        return _starts(self.settings.quantizers * (self.alphabet.astype(np.int64) + 1))

    def frequency_rows(self, level: int) -> npt.NDArray[np.uint32]:
        """Frequencies of one σ level, uint32 [C, 2K + 2]."""
        first, last = self.frequency_start[level : level + 2]
        return self.frequencies[first:last].reshape(self.settings.contexts, -1).astype(np.uint32)

    def reconstruction_rows(self, level: int) -> npt.NDArray[np.float32]:
        """Reconstruction points of one σ level, float32 [Q, K + 1]."""
        first, last = self.reconstruction_start[level : level + 2]
        return self.reconstruction[first:last].reshape(self.settings.quantizers, -1)

    @classmethod
    def from_rows(
        cls,
        settings: Settings,
        frequency_rows: Sequence[npt.NDArray[np.uint32]],
        reconstruction_rows: Sequence[npt.NDArray[np.float32]],
    ) -> Tables:
        """Join the rows of the L levels, as `frequency_rows` and `reconstruction_rows` give them."""
        alphabet = np.array([rows.shape[-1] - 1 for rows in reconstruction_rows], np.int32)
        frequencies = np.concatenate([rows.ravel() for rows in frequency_rows]).astype(np.uint16)
        return cls(
            settings, alphabet, frequencies, np.concatenate([rows.ravel() for rows in reconstruction_rows])
        )

    def weighing(self, lmbda_q: float) -> Tables:
        """Tables that mean the same to a decoder, searched with this weight of rate, λ_q/Δ²; their digest is another.

        A scalar quantizer of any kind is then searched as `rdoq`.
        """
        return _weighing(self, lmbda_q)

    def to_bytes(self) -> bytes:
        """As safetensors; equal tables give equal bytes."""
        header = json.dumps({"version": FORMAT_VERSION, "settings": asdict(self.settings)}, sort_keys=True)
        arrays = {name: getattr(self, name) for name in _DTYPES}
        return safetensors.numpy.save(arrays, metadata={METADATA_KEY: header})

    @classmethod
    def from_bytes(cls, data: bytes) -> Tables:
        """Read what `to_bytes` wrote.

        Raises:
            ValueError: if it is not, naming the array or field that is wrong.
        """
        try:
            arrays = safetensors.numpy.load(data)
            length = int.from_bytes(data[:8], "little")
            metadata = json.loads(data[8 : 8 + length]).get("__metadata__", {})
        except Exception as error:
            raise ValueError(
                f"tables: expected safetensors bytes, found {len(data)} others: {error}"
            ) from error
        if set(arrays) != set(_DTYPES):
            raise ValueError(f"tables: expected the arrays {sorted(_DTYPES)}, found {sorted(arrays)}")
        return cls(_parse_settings(metadata), **arrays)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the bytes, hexadecimal."""
        return hashlib.sha256(self.to_bytes()).hexdigest()


@lru_cache(maxsize=SEARCHES_KEPT)
def _weighing(tables: Tables, lmbda_q: float) -> Tables:
    """Kept, since what a search needs is kept by the tables themselves, and not by what they hold."""
    kind = "rdoq" if tables.settings.trellis is None else tables.settings.kind
    return replace(tables, settings=replace(tables.settings, kind=kind, lmbda_q=lmbda_q, offset=(0.5,)))


def _check_type(name: str, found: object, kind: Any, words: str) -> None:
    """A file's JSON can hold anything anywhere, and its `true` is an int to Python."""
    if not isinstance(found, kind) or isinstance(found, bool):
        raise ValueError(f"quantizer {name}: expected {words}, found {reprlib.repr(found)}")


def _starts(lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])


def _expect_shape(name: str, array: npt.NDArray[Any], size: int) -> None:
    if array.size != size:
        raise ValueError(f"tables: {name}: expected {size} entries, found {array.size}")


def _check_level(
    level: int, frequencies: npt.NDArray[np.uint32], reconstruction: npt.NDArray[np.float32]
) -> None:
    sums = frequencies.sum(-1, dtype=np.uint64)
    if (sums != TOTAL).any() or not frequencies.all():
        raise ValueError(
            f"tables: frequencies of σ level {level}: expected rows of positive integers that sum to {TOTAL}, "
            f"found sums {sums.tolist()} and least entry {frequencies.min()}"
        )
    if not np.isfinite(reconstruction).all() or reconstruction[:, 0].any():
        raise ValueError(
            f"tables: reconstruction of σ level {level}: expected finite points, 0 for k = 0, "
            f"found {reconstruction.min()} to {reconstruction.max()}, {reconstruction[:, 0].tolist()} for k = 0"
        )


def _parse_settings(metadata: dict[str, str]) -> Settings:
    if METADATA_KEY not in metadata:
        raise ValueError(
            f"tables: expected metadata {METADATA_KEY!r}, found {sorted(metadata)}; not a table file"
        )
    text = metadata[METADATA_KEY]
    try:
        header = json.loads(text)
        version, given = header.get("version"), header.get("settings")
    except (ValueError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"tables: expected version and settings in JSON, found {reprlib.repr(text)}"
        ) from error
    if type(version) is not int or version != FORMAT_VERSION:
        raise ValueError(
            f"tables: expected format version {FORMAT_VERSION}, found {reprlib.repr(version)}; "
            "read it with the release that wrote it"
        )
    names = sorted(_SETTING_TYPES)
    if not isinstance(given, dict) or sorted(given) != names:
        found = sorted(given) if isinstance(given, dict) else given
        raise ValueError(f"tables: expected the settings {names}, found {reprlib.repr(found)}")
    offset = given["offset"]
    return Settings(**given | {"offset": tuple(offset) if isinstance(offset, list) else offset})
