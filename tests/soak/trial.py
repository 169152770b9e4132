"""A tiny experiment on a real cluster that something happens to, and what must hold when it is run again."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import islice, product
from pathlib import Path

import photos
from laboratory import Lab, Running
from nodes import Nodes

EXPERIMENT = """
name: soak
train:
  images: train
  N: 8
  M: 12
  lmbda: 0.013
  steps: 200
  batch: 2
  crop: 64
  optimizer: adam
  warmup: 4
  precision: float32
latents: {images: latents}
tune: {count: 4, crop: 64}
quantizers:
  urq: {kind: urq}
  tcq4: {kind: tcq, trellis: vvc4, step: 0.7, lmbda_q: 0.1, tune: true}
arms:
  base: {}
  paper: {parts: decoder, steps: 60, batch: 2, crop: 96, precision: float32}
evaluate: {images: test, metrics: [psnr]}
resources:
  train: {num_cpus: 1, log_every: 5, checkpoint_every: 10}
  finetune: {num_cpus: 1, log_every: 5, checkpoint_every: 10}
"""
# Each stage's tasks run one function; in the order in which stages run
FUNCTIONS = {
    "ingest": "ingest_chunk",
    "train": "train_codec",
    "tables": "design_tables",
    "tune": "tune_quantizer",
    "quantize": "quantize_part",
    "finetune": "finetune_codec",
    "evaluate": "score_images",
    "report": "make_report",
}
STAGES = tuple(FUNCTIONS)
PARTS = 3  # recorded, of some eight in two sets: in the midst of quantizing
RUN_S = 600.0


def new_lab(folder: Path, latent_images: int = 80) -> Lab:
    """With nothing run yet. Images to quantize are crops of 192 pixels a side, no two alike."""
    photos.write(folder / "train", photos.TRAIN)
    photos.write(folder / "test", photos.TEST)
    places = product(range(0, 100, 5), range(0, 240, 5), ("astronaut", "coffee", "chelsea", "rocket"))
    crops = ((name, top, left, 192, 192) for top, left, name in islice(places, latent_images))
    photos.write(folder / "latents", tuple(crops))
    (folder / "experiment.yaml").write_text(EXPERIMENT)
    return Lab(folder, str(folder / "workspace"))


@dataclass
class Trial:
    """One workspace, the cluster it is worked on, and what the same experiment comes to undisturbed."""

    lab: Lab
    nodes: Nodes
    undisturbed: Lab

    def start(self, *arguments: str) -> Running:
        """`retrellis run` in a process of its own."""
        return self.lab.start("run", self.lab.file, *arguments, address=self.nodes.address)

    def until_amid(self, stage: str, run: Running) -> None:
        """Wait until a stage is surely in the midst of its work, as far as records and processes tell."""

        def amid() -> bool:
            if stage in ("train", "finetune"):
                return any(f"/{stage}/" in name for name in self.lab.checkpoints())
            if stage == "quantize" and len(self.lab.parts()) < PARTS:
                return False
            return bool(self.nodes.workers(FUNCTIONS[stage]))

        run.until(amid, f"work of {stage}")

    def complete(self, *arguments: str) -> str:
        """Give the same command again: it completes what is left, and leaves alone what was recorded.

        Returns:
            What it printed.
        """
        before, tries = self._recorded(), self._tries()
        run = self.start(*arguments)
        assert run.finish(RUN_S) == 0, run.text
        self.check()
        assert before.items() <= self._recorded().items(), "a record was changed"
        results = [tuple(name.split("/")[-2:]) for name in before if name.startswith("results/")]
        assert [key for key in results if self._tries()[key] != tries[key]] == [], (
            "a result was computed again"
        )
        return run.text

    def check(self) -> None:
        """The content is that of an undisturbed run, and each image lies in one part of a set."""
        assert self.lab.content() == self.undisturbed.content()
        assert set(images_in_parts(self.lab).values()) == {1}, "an image was quantized twice"

    def _recorded(self) -> dict[str, tuple[bytes, int]]:
        """All records: bytes, and when they were written."""
        root = Path(self.lab.root, "records")
        files = [path for path in root.rglob("*.json") if path.is_file()]
        return {
            str(f.relative_to(root).with_suffix("")): (f.read_bytes(), f.stat().st_mtime_ns) for f in files
        }

    def _tries(self) -> Counter[tuple[str, ...]]:
        """How often each (stage, key) was begun."""
        return Counter(tuple(name.split("/")[1:3]) for name in self.lab.workspace.records.list("attempts"))


def images_in_parts(lab: Lab) -> Counter[tuple[str, str]]:
    """In how many parts of a set each image lies, by (set, image)."""
    parts = [(name.split("/")[1], r) for name, r in lab.records("latents").items() if "/parts/" in name]
    return Counter((key, image["digest"]) for key, record in parts for image in record["images"])
