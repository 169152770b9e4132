"""`retrellis latents`: look at latent sets, check them, withdraw parts, make room. Starts no torch, Ray or MLflow."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer
from rich.filesize import decimal

from jobs import latents_view as view
from jobs.options import WorkspaceOption, console, exit_if, workspace_root
from jobs.status import rows
from storage.collection import DAY_S, Item, Policy, collect
from storage.export import export_set
from storage.inventory import entry, find_set, leftovers, set_keys
from storage.latents import LatentSet, Record
from storage.records import RecordError
from storage.verification import PartCheck, reason, verify
from storage.workspace import Workspace

latents = typer.Typer(
    help="Look at the quantized latents of a workspace.\n\nList, check and export sets; withdraw parts; make room.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

SetArgument = Annotated[str, typer.Argument(metavar="SET", help="the set's key, or its first digits")]


def _open(option: str | None) -> Workspace:
    return Workspace.open(workspace_root(option), create=False)


def _results(workspace: Workspace) -> list[Record]:
    return list(workspace.records.load("results").values())


def _say(line: str) -> None:
    console.print(line, markup=False, highlight=False)


@latents.command("ls")
def list_sets(workspace: WorkspaceOption = None) -> None:
    """List all sets.

    What made and reads them, and their sizes: raw (integers as int8 or int16), stored, and estimated by the
    quantizer's tables.
    """
    opened = _open(workspace)
    keys, results = set_keys(opened), _results(opened)
    if not keys:
        _say(f"{opened.root}: no latent set yet; `retrellis quantize` makes one")
        return
    view.print_table(view.sets_table(entry(opened, key, results) for key in keys), console)


@latents.command()
def show(
    name: SetArgument,
    images: Annotated[bool, typer.Option("--images", help="also a row for each image")] = False,
    workspace: WorkspaceOption = None,
) -> None:
    """Show one set.

    Its parts, withdrawn parts with the reasons, the results that made it and those that read it.
    """
    opened = _open(workspace)
    results = _results(opened)
    found = entry(opened, find_set(opened, name), results)
    for line in view.description(found, opened, results):
        _say(line)
    tables = [view.parts_table(found)] + ([view.retired_table(found)] if found.retired else [])
    for table in [*tables, *([view.images_table(found)] if images else [])]:
        view.print_table(table, console)


@latents.command("verify")
def verify_sets(
    name: Annotated[
        str | None, typer.Argument(metavar="[SET]", help="the set's first digits; else all sets")
    ] = None,
    repair: Annotated[
        bool, typer.Option("--repair", help="withdraw bad parts, so that their images are computed again")
    ] = False,
    workspace: WorkspaceOption = None,
) -> None:
    """Read sets again and compare them with their records.

    Every object by size and SHA-256, every image by its content. Exit code 1 if anything is bad, repaired or not.
    """
    opened = _open(workspace)
    keys = [find_set(opened, name)] if name is not None else set_keys(opened)
    exit_if(sum([_verify_set(opened, key, repair) for key in keys]))


def _verify_set(workspace: Workspace, key: str, repair: bool) -> int:
    """Verify one set, say what was found, withdraw what is bad if asked to; how much is bad."""
    good: list[PartCheck] = []
    bad: list[PartCheck] = []
    for check in verify(workspace, key):
        (bad if check.faults else good).append(check)
        for fault in check.faults:
            _say(f"bad part {check.part}: {fault}")
    size, images = decimal(sum(check.size for check in good)), sum(check.images for check in good)
    whole = f"{len(good):,} of {len(good) + len(bad):,} part(s) as recorded, {images:,} image(s), {size}"
    _say(f"set {key[:8]}: {whole}" + (f"; {len(bad):,} bad" if bad else ""))
    if bad and repair:
        _repair(workspace, key, bad)
    elif bad:
        _say(f"  restore them from a backup, or: retrellis latents verify {key[:8]} --repair")
    _say_leftovers(workspace, key)
    return len(bad) + (_say_results(workspace, key) if repair or not bad else 0)


def _repair(workspace: Workspace, key: str, bad: Iterable[PartCheck]) -> None:
    stored = LatentSet(workspace, key)
    for check in bad:
        stored.retire(check.part, reason(check.faults))
        _say(f"  retired {check.part}; its images count as missing, its data stays until `gc`")


def _say_leftovers(workspace: Workspace, key: str) -> None:
    try:
        groups = leftovers(workspace, key)
    except RecordError as error:  # then nobody knows what it names
        _say(f"  not looked for leftovers: {error}")
        return
    for group in groups:
        usage = workspace.usage(group)
        _say(
            f"  leftover {workspace.path(group)}: expected a record that names it, found none ({decimal(usage.size)}, "
            f"{view.age(time.time() - usage.newest_s)} old); a killed task's, or of one that still writes. "
            "`retrellis latents gc` clears old ones"
        )


def _say_results(workspace: Workspace, key: str) -> int:
    """What results name and the set, in which nothing is bad any more, lacks or has otherwise; the number of those."""
    results, others = _results(workspace), 0
    found = entry(workspace, key, results)
    for record in found.made_by:
        again = f"run its experiment again ({record['experiment']}: retrellis run, or retrellis quantize)"
        if missing := view.missing_images(found, record, workspace, results):
            count = (
                f"{len(missing):,} image(s) of `{record['instance']}` are missing, such as {missing[0][:8]}"
            )
            _say(f"  {count}: {again}, which computes them alone")
        elif change := view.changed(found, record, workspace, results):
            place = workspace.path(f"records/results/quantize/{record['key']}.json")
            _say(f"  `{record['instance']}` has changed: {change}. Move {place} away and {again}")
            others += 1
    return others


@latents.command()
def retire(
    name: SetArgument,
    part: Annotated[str, typer.Argument(metavar="PART", help="the part's name, see `show`")],
    why: Annotated[str, typer.Option("--reason", metavar="TEXT", help="is kept with the set")],
    workspace: WorkspaceOption = None,
) -> None:
    """Withdraw a part.

    Its images count as missing, so that the next run quantizes them again. Its data stays until `gc`.
    """
    if not why.strip():
        raise typer.BadParameter("--reason: expected words, found none")
    opened = _open(workspace)
    stored = LatentSet(opened, find_set(opened, name))
    stored.retire(part, why)
    _say(f"retired part {part} of set {stored.key[:8]}")
    _say_results(opened, stored.key)


@latents.command()
def gc(
    delete: Annotated[bool, typer.Option("--delete", help="do it; else it is only said")] = False,
    grace_days: Annotated[
        float, typer.Option(min=0.0, metavar="DAYS", help="nothing younger is deleted")
    ] = 7.0,
    older_than: Annotated[
        float | None,
        typer.Option(min=0.0, metavar="DAYS", help="of sets that no result refers to, if that is more"),
    ] = None,
    workspace: WorkspaceOption = None,
) -> None:
    """Make room.

    Sets that no result refers to, data of withdrawn parts, and leftovers of killed tasks. Without --delete it says what
    would go. What a result refers to stays, and it says by whom.
    """
    opened = _open(workspace)
    grace_s = grace_days * DAY_S
    policy = Policy(time.time(), grace_s, grace_s if older_than is None else older_than * DAY_S)
    freed = count = 0
    for item in collect(opened, policy, lambda: _running(opened), delete):
        _say(_line(item, delete))
        if not item.kept:
            freed, count = freed + item.size, count + 1
    did = "deleted" if delete else "would delete"
    _say(f"{did} {count:,} item(s), {decimal(freed)}" + ("" if delete or not count else "; --delete does it"))


def _running(workspace: Workspace) -> list[str]:
    return [row["instance"] for row in rows(workspace) if row["state"] == "running"]


def _line(item: Item, delete: bool) -> str:
    verb = "keep" if item.kept else "deleted" if delete else "would delete"
    what = f"{item.kind} {item.key[:8]}" + (f" {item.name}" if item.name else "")
    reasons = "; ".join(filter(None, [item.why, item.kept]))
    return f"{verb} {what}: {decimal(item.size)}, {view.age(item.age_s)} old; {reasons}"


@latents.command()
def export(
    name: SetArgument,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="a new or empty folder")],
    workspace: WorkspaceOption = None,
) -> None:
    """Write a set as plain arrays.

    One .npz an image (`indices`, `hyper_indices`, `shape`), and `index.json`.
    """
    opened = _open(workspace)
    stored = LatentSet(opened, find_set(opened, name))
    count = export_set(stored, folder)
    _say(f"wrote {count:,} image(s) of set {stored.key[:8]} to {folder}")
