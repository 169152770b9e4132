"""report: scores -> tables (Markdown, CSV, JSON), rate-distortion plot (PNG, SVG), crops.

Reads   the scores of every arm; codecs and tables again for the crops.
Key     digests of all scores and of the test images; the names of the arms.
Work    one Ray task.
Commits the files, as blobs; `show` lays them out under reports/ in the workspace and prints the table.
"""

from __future__ import annotations

import csv
import io
import json
import textwrap
from pathlib import Path
from typing import Any

from rich.console import Console

from jobs.stage import Node, Outcome, Output, Task
from storage.keys import canonical_json, digest
from storage.workspace import Workspace

CROP_SIDE = 160  # pixels
CROP_IMAGES = 3
RATES = {  # what stands above the column, and what that is
    "bitstream": ("bpp (files)", "the sizes of files, each decoded and compared"),
    "tables": ("bpp (ideal)", "ideal code lengths, by the tables that drove the search"),
}
LIMITS = (
    "Minutes of training prove the plumbing, not the gain: an under-trained codec exaggerates what finetuning gives. "
    "Look at the difference to the controls, and train until the curve is flat before believing a number."
)


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
    args = (task.workspace.root, task.node.settings["title"], entries, task.inputs["images"]["blob"])
    files, table = task.cluster.run(make_report, args, task.share)
    output = {"kind": "report", "digest": digest(files), "files": files, "note": {}}
    return Outcome({"report": output}, {"arms": len(table)})


def make_report(
    root: str, name: str, entries: list[dict[str, Any]], manifest: str
) -> tuple[dict[str, str], list[dict[str, Any]]]:
    """Runs in a worker: the blobs of the files by name, and the table's rows."""
    from pipeline.comparison import Scored, bd_rates, rows
    from pipeline.figures import crops, rate_distortion

    workspace = Workspace.open(root)
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
    table, bd = rows(scored), bd_rates(scored)
    pair = _before_after(scored)
    files = rate_distortion(scored, f"{name}: {len(names)} test images")
    if pair:
        files |= crops(_crops(workspace, names, [(scored[i], blobs[i]) for i in pair]))
    detail = [{**entry, **blob} for entry, blob in zip(entries, blobs, strict=True)]
    files["report.json"] = canonical_json(
        {"name": name, "table": table, "bd_rate": bd, "arms": detail, "images": names}
    )
    files["report.csv"] = _csv(table)
    rate = blobs[0]["rate"]  # one experiment has one
    files["report.md"] = _markdown(name, table, bd, len(names), rate, sorted(files)).encode()
    return {file: workspace.blobs.put(data, Path(file).suffix) for file, data in sorted(files.items())}, table


def show(workspace: Workspace, record: dict[str, Any], console: Console) -> None:
    """Lay a report's files out in the workspace and print its table."""
    name = record["axes"]["experiment"]
    files = record["outputs"]["report"]["files"]
    for file, blob in files.items():
        workspace.put(f"reports/{name}/{file}", workspace.blobs.get(blob))
    text = workspace.blobs.get(files["report.md"]).decode()
    console.print(text.split("\n## Files")[0], markup=False, highlight=False)
    for file in files:
        console.print(f"  {workspace.path(f'reports/{name}/{file}')}", markup=False, highlight=False)


def _before_after(scored: list[Any]) -> tuple[int, int] | None:
    """Which two to show: the last base and the last arm finetuned on real latents over it."""
    after = next(
        (i for i in reversed(range(len(scored))) if not scored[i].is_base and not scored[i].is_control), None
    )
    if after is None:
        return None
    same = (scored[after].lmbda, scored[after].quantizer)
    before = next((i for i, s in enumerate(scored) if s.is_base and (s.lmbda, s.quantizer) == same), None)
    return None if before is None else (before, after)


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
        )
        for _, blob in pair
    ]
    shown = []
    for image in sorted(names, key=lambda digest: names[digest])[:CROP_IMAGES]:
        original = store.read(image)
        height, width, _ = original.shape
        before, after = (synthesise(c, code(c, t, original).latent, height, width) for c, t in coders)
        top, left = busiest_window(before, after, CROP_SIDE)
        window = (slice(top, top + CROP_SIDE), slice(left, left + CROP_SIDE))
        titles = [_crop_title(scored, image) for scored, _ in pair]
        cut = {"original": original[window], "before": before[window], "after": after[window]}
        shown.append(cut | {"name": names[image], "before_title": titles[0], "after_title": titles[1]})
    return shown


def _crop_title(scored: Any, image: str) -> str:
    row = next(row for row in scored.images if row["image"] == image)
    return f"{scored.quantizer}, {scored.arm}: {row['bpp']:.3f} bpp, {row['psnr_db']:.2f} dB"


def _csv(table: list[dict[str, Any]]) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(table[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    return text.getvalue().encode()


def _markdown(
    name: str, table: list[dict[str, Any]], bd: list[dict[str, Any]], images: int, rate: str, files: list[str]
) -> str:
    """The report as a person reads it."""
    over = [column for column in table[0] if column.startswith("over_")]
    bpp, what = RATES[rate]
    intro = f"{images} test images; rate: {what}."
    head = ["λ", "quantizer", "arm", "seed", bpp, "PSNR dB", "MS-SSIM"]
    head += ["ΔJ over base"]
    head += [f"ΔPSNR over {column.removeprefix('over_').removesuffix('_db')}" for column in over]
    lines = [f"# {name}", "", intro, ""]
    lines += _table(head, [_cells(row, over) for row in table])
    lines += [
        "",
        "ΔPSNR is in dB, averaged over images, at equal indices and bits; — where those, or the arms' recipes, differ. "
        "J is bpp + λ · 255² · MSE: negative is better, also where indices differ.",
    ]
    if bd:
        lines += ["", "## BD-rate", "", "PCHIP, per image, then averaged; negative is better.", ""]
        cells = [[r["quantizer"], r["arm"], _text(r["seed"]), r["anchor"], _percent(r)] for r in bd]
        lines += _table(["quantizer", "arm", "seed", "over", "BD-rate"], cells)
    lines += ["", LIMITS, "", "## Files", "", *(f"- {file}" for file in [*files, "report.md"]), ""]
    return "\n".join(lines)


def _cells(row: dict[str, Any], over: list[str]) -> list[str]:
    numbers = [
        f"{row['bpp']:.4f}",
        f"{row['psnr_db']:.3f}",
        "—" if row["ms_ssim"] is None else f"{row['ms_ssim']:.4f}",
    ]
    cost = row["cost_over_base_percent"]
    numbers.append("—" if cost is None else f"{cost:+.2f} %")
    gains = ["—" if row[column] is None else f"{row[column]:+.3f}" for column in over]
    return [f"{row['lmbda']:g}", row["quantizer"], row["arm"], _text(row["seed"]), *numbers, *gains]


def _table(head: list[str], body: list[list[str]]) -> list[str]:
    """A Markdown table whose columns are aligned for a terminal too."""
    widths = [max(len(line[i]) for line in [head, *body]) for i in range(len(head))]
    drawn = [
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |"
        for line in [head, *body]
    ]
    return [drawn[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *drawn[1:]]


def _text(value: Any) -> str:
    return "" if value is None else str(value)


def _percent(row: dict[str, Any]) -> str:
    if row["bd_rate_percent"] is None:  # the whole reason is in report.json
        return textwrap.shorten(row["reason"], 60, placeholder=" …")
    return f"{row['bd_rate_percent']:+.2f} %"
