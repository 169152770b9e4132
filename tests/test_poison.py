"""Images that cannot be quantized: given up one by one, named with their reasons, and nobody else suffers."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import ray
import torch
from hostile_files import photograph
from laboratory import Lab
from typer.testing import CliRunner

from jobs.cli import app
from jobs.cluster import Cluster, TaskFailed
from jobs.run import RunFailed
from jobs.shares import Share
from pipeline.codec.artifact import Codec
from pipeline.codec.hyperprior import MeanScaleHyperprior
from storage.image_table import ImageTable
from storage.latents import LatentSet

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import this file

EXPERIMENT = """
name: poison
codec: {file: codec.safetensors, lmbda: 0.013}
latents: {images: photos}
quantizers: {urq: {kind: urq}}
arms:
  base: {}
  noise: {parts: decoder, latents: noise, steps: 2, batch: 2, crop: 96, precision: float32}
  paper: {parts: decoder, steps: 2, batch: 2, crop: 96, precision: float32}
evaluate: {images: dark, metrics: [psnr]}
resources: {finetune: {num_cpus: 1}}
"""
REASON = "expected finite latents, found NaN or infinity"


def save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(exist_ok=True)
    PIL.Image.fromarray(pixels).save(path)


@pytest.fixture
def lab(tmp_path: Path, ray_address: str) -> Lab:
    """Five dark images, and a codec that overflows wherever it is not dark."""
    network = MeanScaleHyperprior(8, 12).initialise(torch.Generator().manual_seed(0))
    with torch.no_grad():
        network.g_a[0].weight.fill_(1e38)
    (tmp_path / "codec.safetensors").write_bytes(Codec.from_network(network).to_bytes())
    for width in range(96, 96 + 5 * 16, 16):
        save(tmp_path / f"photos/dark-{width}.png", np.zeros((96, width, 3), np.uint8))
    save(tmp_path / "dark/one.png", np.zeros((96, 208, 3), np.uint8))
    (tmp_path / "experiment.yaml").write_text(EXPERIMENT)
    return Lab(tmp_path, str(tmp_path / "workspace"))


def test_the_image_at_fault_is_given_up_and_the_rest_goes_on(lab: Lab) -> None:
    save(lab.folder / "photos/poison.png", photograph(96, 128))
    said = lab.run()
    latents = lab.record("quantize")["outputs"]["latents"]["note"]
    (poison,) = latents["given_up"]
    assert f"gave up image {poison[:12]}: ValueError: {REASON}" in said
    assert lab.record("quantize")["summary"]["given_up"] == 1
    (failed,) = [name for name in lab.records("latents") if "/failed/" in name]
    assert failed == f"latents/{latents['set']}/failed/{poison}"
    assert REASON in lab.records("latents")[failed]["reason"]
    assert f"{failed}.json" in said
    assert "nothing to compute" in lab.run()
    shown = CliRunner().invoke(app, ["latents", "show", latents["set"], "--workspace", lab.root])
    assert f"given up   image {poison}: ValueError: {REASON}" in shown.output
    assert "5 images, all there" in shown.output

    save(lab.folder / "photos/dark-256.png", np.zeros((96, 256, 3), np.uint8))  # new work, and the old fault
    said = lab.run()
    assert "quantize lmbda=0.013 quantizer=urq: 6/6 images" in said
    assert "gave up" not in said
    parts = [record for name, record in lab.records("latents").items() if "/parts/" in name]
    assert sorted(image["width"] for part in parts for image in part["images"]) == [
        96,
        112,
        128,
        144,
        160,
        256,
    ]


def test_too_many_end_the_stage_and_are_not_given_up(lab: Lab) -> None:
    for seed in range(3):
        save(lab.folder / f"photos/poison-{seed}.png", photograph(96, 128 + 16 * seed))
    limit = "resources.quantize.max_failures=2"
    with pytest.raises(
        RunFailed, match=rf"more than 2 images failed \(resources\.quantize\.max_failures\), .*{REASON}"
    ):
        lab.run(limit)
    assert not [name for name in lab.records("latents") if "/failed/" in name]
    lab.run()
    assert lab.record("quantize")["summary"]["given_up"] == 3


def test_a_codec_that_fails_on_all_images_gives_none_up(lab: Lab) -> None:
    for dark in (lab.folder / "photos").iterdir():
        dark.unlink()
    save(lab.folder / "photos/poison.png", photograph(96, 128))
    with pytest.raises(RunFailed, match=REASON):
        lab.run()
    assert not [name for name in lab.records("latents") if "/failed/" in name]


@pytest.fixture
def cluster(ray_address: str) -> Iterator[Cluster]:
    cluster = Cluster()
    yield cluster
    cluster.stop()


def crash_on(fault: int, number: int) -> int:
    """As a broken library does, with the whole worker."""
    if number == fault:
        os.kill(os.getpid(), signal.SIGSEGV)
    return number


def test_a_task_that_takes_its_worker_with_it_is_one_failure(cluster: Cluster) -> None:
    found = dict(cluster.attempt(crash_on, [(2, number) for number in range(4)], Share(num_cpus=0.5)))
    assert {item[1]: result for item, result in found.items() if item[1] != 2} == {0: 0, 1: 1, 3: 3}
    failure = found[2, 2]
    assert isinstance(failure, TaskFailed)
    assert failure.cause is None
    assert "WorkerCrashedError" in str(failure)


def out_of_memory(fault: int, number: int) -> int:
    """As torch says it."""
    if number == fault:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory")
    if number == fault + 1:
        raise MemoryError
    return number


def test_missing_memory_is_no_inputs_fault(cluster: Cluster) -> None:
    found = dict(cluster.attempt(out_of_memory, [(2, number) for number in range(5)], Share(num_cpus=0.5)))
    failures = [result for result in found.values() if isinstance(result, TaskFailed)]
    assert [failure.blames_input for failure in failures] == [False, False]
    crashed = dict(cluster.attempt(crash_on, [(0, 0)], Share(num_cpus=0.5)))[0, 0]
    assert isinstance(crashed, TaskFailed)
    assert crashed.blames_input


def test_a_part_withdrawn_meanwhile_gives_no_image_up(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    compact = LatentSet.compact

    def withdraw(latents: LatentSet) -> ImageTable:
        latents.retire(latents.part_names()[0], "a test")
        return compact(latents)

    with monkeypatch.context() as patch:
        patch.setattr(LatentSet, "compact", withdraw)
        with pytest.raises(RunFailed, match=r"their parts were withdrawn meanwhile\. Run again"):
            lab.run()
    lab.run()
    assert "given_up" not in lab.record("quantize")["summary"]
