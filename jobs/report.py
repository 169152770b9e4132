"""report: scores -> tables (Markdown, CSV, JSON), plots of rate-distortion, BD-rate and bits per channel, crops.

Reads   the scores of every arm; codecs and tables again for the crops.
Key     digests of all scores and of the test images; the names of the arms.
Work    one Ray task.
Commits the files, as blobs; `show` lays them out under reports/ in the workspace and prints the table.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from jobs.quantize import refinement
from jobs.report_tables import GAINS_TITLE, as_csv, as_markdown, flat
from jobs.stage import Node, Outcome, Output, Task
from storage.keys import canonical_json, digest
from storage.workspace import Workspace

if TYPE_CHECKING:
    from pipeline.comparison import Scored

References = Mapping[str, list[list[float]]]  # name -> [bpp, PSNR in dB] of each point
CROP_SIDE = 160  # pixels
CROP_IMAGES = 3


def amount(node: Node, inputs: dict[str, Output] | None, workspace: Workspace) -> str:
    """What `plan` says of it."""
    return f"{len(node.inputs) - 1} arms"


def compute(task: Task) -> Outcome:
    """Make one experiment's report."""
    task.progress(0, 1, "reports")
    arms, axes = task.node.settings["arms"], task.node.settings["scores"]
    entries = [
        {"scores": task.inputs[name]["blob"], **{"seed": None} | axes[name], **arms[axes[name]["arm"]]}
        for name in axes
    ]
    title, references = task.node.settings["title"], task.node.settings.get("references", {})
    args = (task.workspace.root, title, entries, task.inputs["images"]["blob"], references)
    files, table = task.cluster.run(make_report, args, task.share)
    output = {"kind": "report", "digest": digest(files), "files": files, "note": {}}
    return Outcome({"report": output}, {"arms": len(table)})


def make_report(
    root: str, name: str, entries: list[dict[str, Any]], manifest: str, references: References
) -> tuple[dict[str, str], list[dict[str, Any]]]:
    """Runs in a worker: the blobs of the files by name, and the table's rows."""
    from pipeline.comparison import Scored, rows
    from pipeline.figures import bd_rate_figures, channel_rates, crops, rate_distortion
    from pipeline.rate_gains import bd_rates, gains, over_references

    workspace = Workspace(root)
    blobs = [json.loads(workspace.blobs.get(entry["scores"])) for entry in entries]
    scored = [
        Scored(
            e["lmbda"],
            e["quantizer"],
            e["arm"],
            e["seed"],
            e["parts"],
            e["latents"],
            e["recipe"],
            blob["images"],
        )
        for e, blob in zip(entries, blobs, strict=True)
    ]
    names = {r["digest"]: Path(r["source"]).name for r in json.loads(workspace.blobs.get(manifest))["images"]}
    tables = {"table": rows(scored), "bd_rate": bd_rates(scored), "gains": gains(scored)}
    tables["references"] = over_references(scored, references)
    pair = _before_after(scored)
    title = f"{name}: {len(names)} test images"
    files = rate_distortion(scored, title, references) | bd_rate_figures(scored, tables["bd_rate"], title)
    if pair:
        files |= channel_rates(*_first_and_last(scored), title)
        files |= crops(_crops(workspace, names, [(scored[i], blobs[i]) for i in pair]))
    detail = [{**entry, **blob} for entry, blob in zip(entries, blobs, strict=True)]
    files["report.json"] = canonical_json({"name": name, "arms": detail, "images": names, **tables})
    files["report.csv"] = as_csv(tables["table"])
    nested = {"bd-rate.csv": tables["bd_rate"], "gains.csv": tables["gains"]}
    files |= {file: as_csv([flat(row) for row in table]) for file, table in nested.items() if table}
    rate = blobs[0]["rate"]  # one experiment has one
    files["report.md"] = as_markdown(name, tables, names, rate, sorted(files)).encode()
    stored = {file: workspace.blobs.put(data, Path(file).suffix) for file, data in sorted(files.items())}
    return stored, tables["table"]


def show(workspace: Workspace, record: dict[str, Any], console: Console) -> None:
    """Lay a report's files out in the workspace and print its table."""
    name = record["axes"]["experiment"]
    files = record["outputs"]["report"]["files"]
    for file, blob in files.items():
        workspace.put(f"reports/{name}/{file}", workspace.blobs.get(blob))
    text = workspace.blobs.get(files["report.md"]).decode()
    short = text.split("\n## Files")[0].split(f"\n## {GAINS_TITLE}")[0]  # a line per pair and λ: many
    console.print(short, markup=False, highlight=False)
    for file in files:
        console.print(f"  {workspace.path(f'reports/{name}/{file}')}", markup=False, highlight=False)


def _before_after(scored: list[Scored]) -> tuple[int, int] | None:
    """Which two to show: the last arm on real latents, with a finetuned decoder if any has one, and its base.

    Of its λ the one at which it gains most in PSNR, which is where a difference can be seen.
    """
    real = [i for i, s in enumerate(scored) if not s.is_base and not s.is_control]
    if not real:
        return None
    last = scored[([i for i in real if "decoder" in scored[i].parts] or real)[-1]]
    shown = [i for i in real if _same_arm(scored[i], last)]
    bases = {(s.lmbda, s.quantizer): i for i, s in enumerate(scored) if s.is_base}
    pairs = [(bases[key], i) for i in shown if (key := (scored[i].lmbda, scored[i].quantizer)) in bases]
    psnr_db = [s.mean("psnr_db") or 0.0 for s in scored]
    gains_db = {(i, j): psnr_db[j] - psnr_db[i] for i, j in pairs}
    return max(gains_db, key=gains_db.__getitem__, default=None)


def _same_arm(one: Scored, other: Scored) -> bool:
    return (one.quantizer, one.arm, one.seed) == (other.quantizer, other.arm, other.seed)


def _first_and_last(scored: list[Scored]) -> tuple[Scored, Scored]:
    """Whose bits to compare: the last arm on real latents, and the base of the first quantizer at its λ.

    A finetuned decoder has the bits of its own base.
    """
    after = [s for s in scored if not s.is_base and not s.is_control][-1]
    return next(s for s in scored if s.is_base and s.lmbda == after.lmbda), after


def _crops(workspace: Workspace, names: dict[str, str], pair: list[tuple[Any, Any]]) -> list[dict[str, Any]]:
    """The window where before and after differ most, of the first images by name."""
    from pipeline.codec.artifact import Codec
    from pipeline.coding import code, synthesise
    from pipeline.figures import busiest_window
    from pipeline.quantizers import Tables
    from storage.images import ImageStore

    store = ImageStore(workspace)
    coders = [
        (
            Codec.from_bytes(workspace.blobs.get(blob["codec"])),
            Tables.from_bytes(workspace.blobs.get(blob["tables"])),
            refinement(blob["encoder"]),
        )
        for _, blob in pair
    ]
    shown = []
    for image in sorted(names, key=lambda digest: names[digest])[:CROP_IMAGES]:
        original = store.read(image)
        height, width, _ = original.shape
        before, after = (
            synthesise(codec, code(codec, tables, original, effort).latent, height, width)
            for codec, tables, effort in coders
        )
        top, left = busiest_window(before, after, CROP_SIDE)
        window = (slice(top, top + CROP_SIDE), slice(left, left + CROP_SIDE))
        titles = [_crop_title(scored, image) for scored, _ in pair]
        cut = {"original": original[window], "before": before[window], "after": after[window]}
        shown.append(cut | {"name": names[image], "before_title": titles[0], "after_title": titles[1]})
    return shown


def _crop_title(scored: Any, image: str) -> str:
    row = next(row for row in scored.images if row["image"] == image)
    return f"{scored.quantizer}, {scored.arm}: {row['bpp']:.3f} bpp, {row['psnr_db']:.2f} dB"
