"""Latent sets as a person sees them: tables and lines from `storage.inventory`, with units."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from jobs.local import image_digests
from jobs.quantize import quantized
from storage.digests import Digests
from storage.inventory import Entry, Sizes
from storage.latents import LatentSet
from storage.workspace import Workspace

WIDE = 200  # columns of a file or pipe, where nothing need be folded
SHORT = 8  # digits of a digest, enough to tell a workspace's sets apart
SIZES = ("raw", "stored", "estimate", "stored/est.")
NUMBERS = ("images", "parts", *SIZES, "rate", "bpp")

Record = Mapping[str, Any]


def print_table(table: Table, console: Console) -> None:
    """A table, folded to a terminal's width but to no file's."""
    wide = console if console.is_terminal else Console(file=console.file, width=WIDE)
    wide.print(table, soft_wrap=False)


def sets_table(entries: Iterable[Entry]) -> Table:
    """One row a set."""
    columns = ("set", "codec", "λ", "quantizer", "images", "parts")
    table = _table(None, *columns, *SIZES, "made by", "read by")
    for entry in entries:
        table.add_row(
            entry.key[:SHORT],
            _listed(_codecs(entry)),
            _listed(entry.axes("lmbda")),
            _quantizer(entry),
            f"{len(entry.images):,}",
            f"{len(entry.parts):,}",
            *_sizes(entry.total),
            _listed(dict.fromkeys(record["experiment"] for record in entry.made_by)) or "no result",
            _stages(entry.read_by) or "no result",
        )
    return table


def _sizes(sizes: Sizes) -> tuple[str, str, str, str]:
    raw = "?" if sizes.raw is None else decimal(sizes.raw)
    ratio = "" if math.isnan(sizes.ratio) else f"{sizes.ratio:.3f}"
    return raw, decimal(sizes.stored), decimal(round(sizes.estimate)), ratio


def description(entry: Entry, workspace: Workspace, results: list[Record]) -> Iterator[str]:
    """A set in lines: what it is, how large, and the results on both sides of it."""
    raw, stored, estimate, ratio = _sizes(entry.total)
    yield f"set        {entry.key}"
    yield f"codec      {_listed(_codecs(entry)) or 'unknown: no result names this set'}"
    yield f"λ          {_listed(entry.axes('lmbda'))}"
    yield f"quantizer  {_quantizer(entry)}"
    yield f"images     {len(entry.images):,}, in {len(entry.parts):,} part(s)"
    yield f"raw        {raw}, integers as int8 or int16"
    yield f"stored     {stored}" + (f", {ratio} of the estimate" if ratio else "")
    yield f"estimate   {estimate}, what an entropy coder would take"
    yield f"host       {_counted(part['host'] for part in entry.parts.values())}"
    yield f"versions   {_counted(_versions(part) for part in entry.parts.values())}"
    for record in entry.made_by:
        yield f"made by    {_result(record)}; {_complete(entry, record, workspace, results)}"
    for record in entry.read_by:
        yield f"read by    {_result(record)}"
    for name, failure in LatentSet(workspace, entry.key).given_up().items():
        yield f"given up   image {name}: {failure['reason']}"
    if not entry.made_by:
        yield "made by    no result: unfinished, or the result was moved away"
    if not entry.read_by:
        yield "read by    no result"


def missing_images(
    entry: Entry, record: Record, workspace: Workspace, results: Iterable[Record]
) -> list[str] | None:
    """Those images of a result that its set lacks; None where nothing says any more which images it has."""
    digests, there = _images_of(record, workspace, results), entry.images
    return None if digests is None else [name for name in digests if name not in there]


def changed(entry: Entry, record: Record, workspace: Workspace, results: Iterable[Record]) -> str:
    """How the latents of a complete result differ from those it was recorded with, in words; "" if they do not.

    Parts computed again on another machine can hold other indices, and then nothing can be finetuned on the result.
    """
    digests = _images_of(record, workspace, results)
    if digests is None or missing_images(entry, record, workspace, results):
        return ""
    expected = record["outputs"]["latents"]["digest"]
    found = LatentSet(workspace, entry.key).content_digest(digests)
    return "" if found == expected else f"expected latents {expected[:SHORT]}, found {found[:SHORT]}"


def _images_of(record: Record, workspace: Workspace, results: Iterable[Record]) -> Digests | None:
    """Of a result, less those given up."""
    outputs = (r["outputs"]["images"] for r in results if "images" in r["outputs"])
    blob = next((o["blob"] for o in outputs if o["digest"] == record["reads"].get("images")), None)
    return None if blob is None else quantized(image_digests(workspace, blob), record["outputs"]["latents"])


def parts_table(entry: Entry) -> Table:
    """One row a part that counts."""
    table = _table("parts", "part", "images", *SIZES, "host", "written (UTC)")
    for name, record in entry.parts.items():
        count, when = f"{len(record['images']):,}", _when(record["created_ns"])
        table.add_row(name, count, *_sizes(entry.sizes[name]), record["host"], when)
    return table


def retired_table(entry: Entry) -> Table:
    """One row a part that was withdrawn."""
    table = _table("retired parts", "part", "retired (UTC)", "reason")
    for name, record in entry.retired.items():
        table.add_row(name, _when(record["created_ns"]), record["reason"])
    return table


def images_table(entry: Entry) -> Table:
    """One row an image; `rate` is the estimate."""
    table = _table("images", "image", "part", "pixels", "indices", "hyper indices", "rate", "bpp")
    rows = {(part, row["digest"]): row for part, r in entry.parts.items() for row in r["images"]}
    for name, part in entry.images.items():
        row = rows[part, name]
        bits = row["bits_y"] + row["bits_z"]
        table.add_row(
            name,
            part,
            f"{row['width']} × {row['height']}",
            " × ".join(map(str, row["shape"])),
            " × ".join(map(str, row["hyper_shape"])),
            decimal(round(bits / 8)),
            f"{bits / (row['width'] * row['height']):.4f}",
        )
    return table


def age(seconds: float) -> str:
    """A span of time, to the unit that fits it."""
    days = max(seconds, 0.0) / 86_400
    return f"{days:.1f} days" if days >= 1 else f"{days * 24:.1f} h"


def _table(title: str | None, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for column in columns:
        number = column in NUMBERS
        table.add_column(
            column, justify="right" if number else "left", no_wrap=number or column == "set", overflow="fold"
        )
    return table


def _codecs(entry: Entry) -> list[str]:
    return list(dict.fromkeys(record["reads"]["codec"][:SHORT] for record in entry.made_by))


def _quantizer(entry: Entry) -> str:
    kinds = f" ({_listed(entry.kinds)})" if entry.kinds else ""
    made_with = [record["ingredients"]["settings"] for record in entry.made_by]
    efforts = dict.fromkeys(str(settings["effort"]) for settings in made_with if "effort" in settings)
    effort = f", effort {_listed(efforts)}" if efforts else ""
    return f"{_listed(entry.axes('quantizer'))}{kinds}{effort}"


def _result(record: Record) -> str:
    where = f"experiment {record['experiment']}, ended {record['ended'][:19]}"
    return f"{record['instance']} ({record['key'][:SHORT]}), {where}"


def _complete(entry: Entry, record: Record, workspace: Workspace, results: list[Record]) -> str:
    missing = missing_images(entry, record, workspace, results)
    if missing is None:
        return "which images it had is not recorded any more"
    count = record["outputs"]["latents"]["note"]["images"]
    state = f"{len(missing):,} of them missing" if missing else "all there"
    return f"{count:,} images, {changed(entry, record, workspace, results) or state}"


def _when(nanoseconds: int) -> str:
    return datetime.fromtimestamp(nanoseconds / 1e9, UTC).isoformat(timespec="seconds")[:19]


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names)


def _stages(records: Iterable[Record]) -> str:
    counts = Counter(record["stage"] for record in records)
    return ", ".join(f"{count} {stage}" for stage, count in counts.items())


def _versions(part: Record) -> str:
    return " ".join(f"{package} {version}" for package, version in part["versions"].items())


def _counted(names: Iterable[str]) -> str:
    """One value where all parts agree; else each with its number of parts."""
    counts = Counter(names)
    return ", ".join(
        counts if len(counts) < 2 else (f"{name} ({count} parts)" for name, count in counts.items())
    )
