"""Golden digests: a key that changes orphans every cached result; an output that changes needs a new stage version.

When one of these fails, nothing is wrong with the test: either undo the change, or bump the stage's version in
`jobs.plan.STAGE_VERSIONS` (or `jobs.quantize.SET_VERSION`) and put the new digest here, in the same commit.
"""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from jobs.arms import Arm
from jobs.experiment import Train
from jobs.graph import ENCODER_SETTINGS, SETTINGS_OF_NO_TRAINING, _settings
from jobs.plan import STAGE_VERSIONS
from jobs.quantize import SET_VERSION, set_key
from jobs.quantizer_section import QuantizerSection
from pipeline.pixels import canonical_pixels
from pipeline.quantizers import dequantize, quantize
from pipeline.quantizers.lloyd import midpoint_tables
from pipeline.quantizers.tables import Settings
from pipeline.sigma import SIGMA_LEVELS, sigma_levels
from storage.images import image_set_digest, pixel_digest
from storage.keys import digest, sha256

VERSIONS = {
    **dict.fromkeys(("ingest", "train", "import"), 1),
    "quantize": 3,
    "finetune": 2,
    **dict.fromkeys(("tables", "tune", "evaluate"), 3),
    "report": 5,
}

KEYS = {
    "train": "4609fa72e2e0b1d7a5624f68c791aaf6b125f1c07c0d64ee02a6e3e9938d20a3",
    "finetune": "436569ea7749ed71619cb7aeb0337cfd956eafe9a2b1628de1909c1a44235133",
    "tables": "f5d8405019e1174645ebe02103465fb91949568fa98096b8cf4de0f0fc1b3ca7",
    "set": "e75b5ae3ce5a28a2ccb16e581c6d94f297a1ffc5be44898ea7144391b567875e",
}

IMAGE_SET = "3cde41bed63b3e11465bcb3de2a83bd90abdf6578003b0c2734dbd9cb9c188ca"


def test_versions_and_golden_values_change_together() -> None:
    assert dict(STAGE_VERSIONS) == VERSIONS
    assert SET_VERSION == 3


@pytest.mark.parametrize("stage", ["train", "finetune", "tables"])
def test_settings_digests(stage: str) -> None:
    section = {
        "train": Train.model_validate({"images": "photos"}),
        "finetune": Arm(parts="decoder"),
        "tables": QuantizerSection(kind="tcq", trellis="vvc8", step=0.7, lmbda_q=0.1),
    }[stage]
    left_out = SETTINGS_OF_NO_TRAINING - {"lmbda"} | {"after", "retune", "effort"} | ENCODER_SETTINGS
    assert digest(_settings(stage, section, left_out)) == KEYS[stage]


def test_set_key() -> None:
    codec = {"digest": "c", "note": {"grid": "g", "rate": "r"}}
    assert set_key({"codec": codec, "tables": {"digest": "t"}}, {}) == KEYS["set"]


def test_canonical_pixels_and_image_sets() -> None:
    generator = np.random.default_rng(0)
    grey16 = generator.integers(0, 65536, (5, 7), np.uint16)
    rgba = generator.integers(0, 256, (6, 4, 4), np.uint8)
    digests = []
    for array, scale in ((grey16, 1.0), (rgba, 1.0)):
        buffer = io.BytesIO()
        Image.fromarray(array).save(buffer, "PNG")
        digests.append(pixel_digest(canonical_pixels(buffer.getvalue(), scale)))
    assert image_set_digest(digests) == IMAGE_SET


@pytest.mark.parametrize(
    ("kind", "trellis", "expected"),
    [
        ("urq", None, "136763dfe518c161"),
        ("rdoq", None, "030571ef7afd2149"),
        ("tcq", "vvc4", "494284543ad3f8f6"),
        ("tcq", "vvc8", "57133486588da53e"),
    ],
)
def test_indices_of_fixed_latents(kind: str, trellis: str | None, expected: str) -> None:
    """Midpoint tables, since designed ones may differ in the last place between platforms."""
    tables = midpoint_tables(Settings(kind, trellis, 0.7, 0.0 if kind == "urq" else 0.1))
    generator = np.random.default_rng(1)
    level = generator.integers(0, SIGMA_LEVELS, (40, 64)).astype(np.uint8)
    residual = (generator.normal(size=level.shape) * sigma_levels()[level]).astype(np.float32)
    quantized = quantize(residual, level, tables)
    assert np.array_equal(dequantize(quantized.indices, level, tables), quantized.reconstruction)
    assert sha256(quantized.indices.astype("<i4").tobytes())[:16] == expected
