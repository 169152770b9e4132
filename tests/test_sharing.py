"""Two runs, one latent set: each image is quantized once, whichever of them does it."""

from __future__ import annotations

import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import photos
import pytest
from laboratory import Lab

from jobs import quantize
from storage.claims import Claims
from storage.latents import LatentSet

SQUARES = tuple(
    (photograph, top, left, 96, 96)
    for photograph in ("astronaut", "coffee", "chelsea", "rocket")
    for top in (0, 100)
    for left in range(0, 350, 24)
)


def quantized_images(lab: Lab) -> Counter[str]:
    """How often each image lies in a part of any set."""
    parts = [record for name, record in lab.records("latents").items() if "/parts/" in name]
    return Counter(image["digest"] for part in parts for image in part["images"])


def test_two_runs_with_overlapping_images_quantize_each_once(
    reference: Lab, ray_address: str, tmp_path: Path
) -> None:
    lab = reference.copy(tmp_path / "workspace", without=["quantize"])
    photos.write(tmp_path / "first", SQUARES[:60])
    photos.write(tmp_path / "second", SQUARES[20:])  # so many more that its buckets are others
    other = lab.start(
        "quantize",
        lab.file,
        *("--only", "quantizer=tcq4", "--set", f"latents.images={tmp_path / 'first'}"),
        address=ray_address,
    )
    other.until(lambda: lab.workspace.list("claims"), "its first claim")
    lab.run(f"latents.images={tmp_path / 'second'}", stage="quantize", only={"quantizer": "tcq4"})
    assert other.finish() == 0, other.text
    assert quantized_images(lab) == dict.fromkeys(quantized_images(lab), 1)
    counts = {
        record["outputs"]["latents"]["note"]["images"] for record in lab.records("results/quantize").values()
    }
    assert counts == {60, len(SQUARES) - 20}
    assert quantized_images(lab).total() == len(SQUARES)


def test_what_another_run_holds_is_waited_for(
    reference: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantize, "POLL_S", 0.2)
    lab = reference.copy(tmp_path / "workspace", without=["quantize"])
    done = reference.record("quantize", quantizer="urq")["outputs"]["latents"]
    theirs = LatentSet(reference.workspace, done["note"]["set"])
    ours = LatentSet(lab.workspace, theirs.key)
    with Claims(lab.workspace, f"claims/{theirs.key}").hold("") as held, ThreadPoolExecutor() as pool:
        assert held
        run = pool.submit(lab.run, stage="quantize", only={"quantizer": "urq"})
        time.sleep(4)
        assert not run.done()
        assert quantized_images(lab).total() == 0
        for part, record in theirs.parts().items():
            ours.write_part(record["prefix"], theirs.read_part(part))
        said = run.result(timeout=30)
    assert "another run is at work on 6 of these images" in said
    assert lab.record("quantize", quantizer="urq")["outputs"]["latents"]["digest"] == done["digest"]
    assert set(quantized_images(lab).values()) == {1}
