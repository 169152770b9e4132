"""What of the latent sets may be deleted: what no result refers to, withdrawn data, and what killed tasks left.

No stage says while it runs which set it reads. So time protects readers: nothing younger than the grace period goes, a
withdrawn part is read by nobody who starts after its withdrawal, and while anything runs in the workspace, unreferenced
sets stay (a run may be about to complete one) and the grace period is a day at least.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from storage.inventory import groups, leftovers, set_keys, uses
from storage.latents import LatentSet
from storage.workspace import Workspace

DAY_S = 86_400.0


@dataclass(frozen=True)
class Policy:
    """How old things must be to be deleted, in seconds; `set_s` is that of unreferenced sets."""

    now_s: float  # since 1970
    grace_s: float
    set_s: float


@dataclass(frozen=True)
class Item:
    """Something that may be deleted, or a set that is not.

    Attributes:
        kind: "set", "retired part" or "leftover".
        key: of the set; `name` of the part or group, "" for a set.
        folders: what is deleted, in this order.
        size: in bytes, on the disk; of a set without its records.
        age_s: since the last change or, of a part, since its withdrawal.
        why: it is no longer needed; "" where it is.
        kept: why it stays all the same; "" if it goes.
    """

    kind: str
    key: str
    name: str
    folders: tuple[str, ...]
    size: int
    age_s: float
    why: str
    kept: str


def collect(
    workspace: Workspace, policy: Policy, busy: Callable[[], Sequence[str]], delete: bool = False
) -> Iterator[Item]:
    """Go through all sets; each is looked at, and with `delete` cleared, before the next one is.

    Args:
        busy: gives what runs in the workspace just now, by name.
        delete: delete the items that are not kept, before they are yielded.

    Raises:
        RecordError: a record cannot be read, so that what it refers to is not known; nothing more is deleted.
    """
    for key in set_keys(workspace):
        results = list(workspace.records.load("results").values())
        made_by, read_by = uses(key, results)
        running = list(busy())
        whole = _set_item(workspace, key, [r["instance"] for r in [*made_by, *read_by]], policy, running)
        items = [whole] if not whole.kept else [whole, *_within(workspace, key, policy, running)]
        for item in items:
            if delete and not item.kept:
                for folder in item.folders:
                    workspace.delete(folder)
            yield item


def _set_item(
    workspace: Workspace, key: str, users: Sequence[str], policy: Policy, running: Sequence[str]
) -> Item:
    records = f"records/latents/{key}"
    data, newest = workspace.usage(f"latents/{key}"), workspace.usage(records).newest_s
    age = policy.now_s - max(data.newest_s, newest)
    why = "" if users else "no result refers to it"
    if users:
        kept = f"used by {_listed(users)}"
    elif running:
        kept = f"{_listed(running)} runs and may need it"
    else:
        kept = _young(age, max(policy.set_s, policy.grace_s))
    # A withdrawal outlives its part: killed on the way, this brings no retired part back
    folders = (f"{records}/parts", records, f"latents/{key}", f"claims/{key}")
    return Item("set", key, "", folders, data.size, age, why, kept)


def _within(workspace: Workspace, key: str, policy: Policy, running: Sequence[str]) -> Iterator[Item]:
    """Withdrawn data and leftovers of a set that stays."""
    grace = max(policy.grace_s, DAY_S) if running else policy.grace_s
    retired, group_of = LatentSet(workspace, key).retired(), groups(workspace, key)
    for part, retirement in retired.items():
        if (group := group_of.get(part)) is None:
            continue  # its record was moved away, so that its data is a leftover
        usage, age = workspace.usage(group), policy.now_s - retirement["created_ns"] / 1e9
        if usage.newest_s:  # else it has gone already; its records stay, that its name is not used again
            why = f"retired: {retirement['reason']}"
            yield Item("retired part", key, part, (group,), usage.size, age, why, _young(age, grace))
    for group in leftovers(workspace, key):
        usage = workspace.usage(group)
        age, name = policy.now_s - usage.newest_s, group.rpartition("/")[2]
        why = "no record names it: a killed task's, or of one that still writes"
        yield Item("leftover", key, name, (group,), usage.size, age, why, _young(age, grace))


def _young(age_s: float, needed_s: float) -> str:
    """Why something stays for its age, "" if it is old enough."""
    if age_s >= needed_s:
        return ""
    return f"expected an age of {needed_s / DAY_S:g} days, found {max(age_s, 0) / DAY_S:.1f}"


def _listed(names: Sequence[str]) -> str:
    unique = list(dict.fromkeys(names))
    return ", ".join(unique[:3]) + (f" and {len(unique) - 3} more" if len(unique) > 3 else "")
