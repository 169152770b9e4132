"""docs/EXPERIMENT.md from a workspace: an experiment's report, where each number comes from, what it took.

    python benchmarks/results.py WORKSPACE [EXPERIMENT]

docs/EXPERIMENT/notes.md, written by hand, stands at the head; all else is made here. Crops show test images: they
stay in the workspace.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from machine import machine

from storage.workspace import Workspace

DOCS = Path(__file__).parents[1] / "docs"
STAGES = ("ingest", "train", "import", "tables", "tune", "quantize", "finetune", "evaluate", "report")
Record = Mapping[str, Any]


def main(root: str, experiment: str = "results") -> None:
    """Write the page and, into the folder of its name, its figures and tables."""
    workspace = Workspace.open(root, create=False)
    records = list(workspace.records.load("results").values())
    reports = [r for r in records if r["stage"] == "report" and r["axes"]["experiment"] == experiment]
    if not reports:
        raise SystemExit(
            f"{root}: expected a report of the experiment {experiment}, found none; run it first"
        )
    report = max(reports, key=lambda record: record["ended"])
    ancestors = _ancestors(report, records)
    folder = DOCS / experiment
    notes = folder / "notes.md"
    if not notes.is_file():
        raise SystemExit(
            f"{notes}: expected what stands above the numbers, found no such file: write it first"
        )
    files = {name: workspace.blobs.get(blob) for name, blob in report["outputs"]["report"]["files"].items()}
    figures = [name for name in files if name.endswith(".png") and name != "crops.png"]
    figures.sort(key=lambda name: name != "rate-distortion.png")  # it comes first
    for name in [*figures, *(name for name in files if name.endswith(".csv"))]:
        (folder / name).write_bytes(files[name])
    _write_runs(folder / "runs.csv", ancestors)
    tables = files["report.md"].decode().partition("\n\n")[2].partition("\n## Files")[0]
    lines = [
        notes.read_text().strip(),
        *(f"![{Path(name).stem.replace('-', ' ')}]({experiment}/{name})" for name in figures),
        tables.strip(),
        _where_from(experiment, report, ancestors),
        _cost(ancestors),
    ]
    (DOCS / f"{experiment}.md").write_text("\n\n".join(lines) + "\n")


def _ancestors(report: Record, records: Iterable[Record]) -> list[Record]:
    """The report and what it rests on by its keys, by stage and instance: for each digest one that made it.

    Of several that made the same, one of the same experiment comes first, then the earliest, which no import precedes.
    """
    makers: dict[str, Record] = {}
    latest_first = sorted(records, key=lambda r: r["ended"], reverse=True)
    for record in sorted(latest_first, key=lambda r: r["experiment"] == report["experiment"]):
        makers |= {output["digest"]: record for output in record["outputs"].values()}
    found = {report["key"]: report}
    unread = [report]
    while unread:
        for digest in unread.pop()["ingredients"]["inputs"].values():
            maker = makers.get(digest)  # none of digests of parts, such as a codec's grid
            if maker is not None and maker["key"] not in found:
                found[maker["key"]] = maker
                unread.append(maker)
    return sorted(found.values(), key=lambda r: (STAGES.index(r["stage"]), r["instance"]))


def _write_runs(file: Path, records: Iterable[Record]) -> None:
    """A line per stage instance: its key, what it read and made, when and how long."""
    with file.open("w", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(
            ["instance", "key", "ended", "seconds", "worker_seconds", "reads", "outputs", "summary"]
        )
        for r in records:
            reads = " ".join(f"{name}={digest[:12]}" for name, digest in sorted(r["reads"].items()))
            outputs = " ".join(f"{name}={o['digest'][:12]}" for name, o in sorted(r["outputs"].items()))
            summary = " ".join(f"{name}={value}" for name, value in sorted(r["summary"].items()))
            if r["stage"] == "report":
                reads = ""  # all scores
            row = [r["instance"], r["key"][:12], r["ended"][:19], r["seconds"], r["worker_seconds"]]
            writer.writerow([*row, reads, outputs, summary])


def _where_from(experiment: str, report: Record, records: Iterable[Record]) -> str:
    return (
        "## Where the numbers come from\n\n"
        f"The report {report['key'][:12]}, made {report['ended'][:10]} from the {len(list(records))} stage instances "
        f"in [{experiment}/runs.csv]({experiment}/runs.csv), each with its key, the digests of what it read and made, "
        "and its times. What it has for each image stands in its `report.json`; its tables are also the other `.csv` "
        f"files there. `python benchmarks/results.py WORKSPACE {experiment}` made this page."
    )


def _cost(records: Iterable[Record]) -> str:
    """Hours per stage, and where they were spent."""
    by_stage: dict[str, list[Record]] = {}
    for record in records:
        by_stage.setdefault(record["stage"], []).append(record)
    rows = [
        f"| {stage} | {len(group)} | {sum(r['worker_seconds'] for r in group) / 3600:.2f} |"
        for stage, group in by_stage.items()
    ]
    return "\n".join(
        [
            "## What it took",
            "",
            "| stage | instances | hours of work |",
            "|---|---|---|",
            *rows,
            "",
            f"Work is the time of tasks, of one or two cores each. This page was made on "
            f"{machine('torch', 'ray', 'zarr')}.",
        ]
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
