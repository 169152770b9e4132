"""Canonical JSON and the digests made of it: what keys, codecs, image sets and latent sets are named by."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def canonical_json(value: object) -> bytes:
    """The one ASCII spelling of a value: sorted keys, no white space; `1`, `1.0`, `"1"`, `true` differ.

    Tuples are written as lists. Floats are written as their shortest decimal that reads back exactly.

    Raises:
        ValueError: a float is not finite.
        TypeError: something is no JSON value (say, a NumPy integer, or a key that is no string).

    Both name the place.
    """
    checked = _checked(value, "$")
    return json.dumps(checked, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def digest(value: object) -> str:
    """SHA-256 of `canonical_json(value)`, 64 hex digits."""
    return sha256(canonical_json(value))


def digest_of_pairs(pairs: Iterable[tuple[str, str]]) -> str:
    """`digest` of a list of pairs of strings, without ever holding the list's JSON."""
    hasher = hashlib.sha256(b"[")
    for count, pair in enumerate(pairs):
        hasher.update((b"," if count else b"") + canonical_json(pair))
    hasher.update(b"]")
    return hasher.hexdigest()


def sha256(data: bytes | memoryview) -> str:
    """SHA-256 of bytes, 64 hex digits."""
    return hashlib.sha256(data).hexdigest()


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, names joined by dots: {"a": {"b": 1}} -> {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def _checked(value: object, place: str) -> object:
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"expected a finite number at {place}, found {value}: JSON has no such value")
        return value
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"expected keys that are strings at {place}, found {key!r}: convert it first")
        return {key: _checked(item, f"{place}.{key}") for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, (bytes, bytearray, memoryview)):
        return [_checked(item, f"{place}[{index}]") for index, item in enumerate(value)]
    raise TypeError(
        f"expected a JSON value at {place}, found {type(value).__name__}: "
        "convert it to int, float, str, list or dict"
    )
