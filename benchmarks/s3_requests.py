"""How many requests each stage makes of an S3 server, and each command that only looks.

    PYTHONPATH=tests python benchmarks/s3_requests.py [IMAGES]

The tests' small experiment (one λ, two quantizers, five arms) on 64 crops of 96 × 96 pixels unless told otherwise and
two test images, stage by stage, against moto's server on loopback. Signs of life are counted apart: they depend on how
long a stage takes, one every two seconds for each instance that runs.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from itertools import islice, product
from pathlib import Path

import photos
from laboratory import EXPERIMENT, Lab
from machine import machine
from rich.console import Console
from s3_server import Request, S3Server

from jobs import status
from jobs.lineage import all_records
from storage.inventory import entry, set_keys
from storage.verification import verify

STAGES = ("ingest", "train", "tables", "quantize", "finetune", "evaluate", "report")
KINDS = ("LIST", "PUT", "GET", "DELETE", "beats")
IMAGES = 64


def kind(request: Request) -> str:
    """HEAD is billed as GET, and the POST that begins or ends an upload in pieces as PUT."""
    if request.path.endswith("/progress.json") and request.kind == "PUT":
        return "beats"
    return {"HEAD": "GET", "POST": "PUT"}.get(request.kind, request.kind)


def latents_ls(lab: Lab) -> None:
    results = list(lab.records("results").values())
    for key in set_keys(lab.workspace):
        entry(lab.workspace, key, results)


def latents_verify(lab: Lab) -> None:
    for key in set_keys(lab.workspace):
        assert not any(check.faults for check in verify(lab.workspace, key))


def looks(lab: Lab) -> dict[str, Callable[[], object]]:
    """What computes nothing."""
    quiet = Console(quiet=True)
    return {
        "run again": lab.run,
        "plan": lab.plan,
        "status": lambda: status.show(lab.root, False, quiet),
        "latents ls": lambda: latents_ls(lab),
        "latents verify": lambda: latents_verify(lab),
        "sync (MLflow)": lambda: all_records(lab.workspace),
    }


def main() -> None:
    """Print a table."""
    images = int(sys.argv[1]) if len(sys.argv) > 1 else IMAGES
    server = S3Server()
    os.environ |= server.environment
    server.make_bucket("bucket")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["RETRELLIS_SCRATCH"] = f"{folder}/scratch"
        lab = Lab.new(Path(folder, "lab")).beside("s3://bucket/workspace")
        places = product(("astronaut", "coffee", "chelsea", "rocket"), (0, 100, 200), range(0, 350, 24))
        squares = tuple((name, top, left, 96, 96) for name, top, left in places)
        photos.write(lab.folder / "squares", squares[:images])
        Path(lab.file).write_text(EXPERIMENT.replace("images: train", "images: squares"))
        works: dict[str, Callable[[], object]] = {
            stage: lambda stage=stage: lab.run(stage=stage) for stage in STAGES
        }
        print(machine("obstore", "moto"))
        print(f"{images} images to train on, {len(photos.TEST)} test images\n")
        print(f"{'':<16}{'instances':>10}" + "".join(f"{name:>8}" for name in KINDS))
        for name, work in (works | looks(lab)).items():
            before = len(server.requests)
            work()
            counts = Counter(map(kind, islice(server.requests, before, None)))
            made = len(lab.workspace.records.list(f"results/{name}")) if name in STAGES else ""
            print(f"{name:<16}{made:>10}" + "".join(f"{counts[kind]:>8}" for kind in KINDS), flush=True)
        parts = [r for n, r in lab.records("latents").items() if "/parts/" in n]
        print(f"\n{len(parts)} parts of latents, of {len(parts[0]['objects'])} objects each")
    server.close()


if __name__ == "__main__":
    main()
