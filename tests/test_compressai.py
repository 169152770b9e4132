"""CompressAI checkpoints in and out: names, numbers, tables, and what is said about dicts that do not fit."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.codec.compressai import export_state_dict, import_state_dict
from pipeline.codec.entropy_models import gaussian_bits
from pipeline.codec.hyperprior import MeanScaleHyperprior

SHARED = Path(os.environ.get("RETRELLIS_SHARED", Path(__file__).parents[1] / ".." / "shared"))
CHECKPOINT = SHARED / "data" / "compressai" / "mbt2018-mean_N64_M96_lambda0.013.pth"
COMPUTED = SHARED / "data" / "compressai" / "kodim23_crop.npz"

needs_checkpoint = pytest.mark.skipif(
    not (CHECKPOINT.exists() and COMPUTED.exists()),
    reason="needs data/compressai in the folder that RETRELLIS_SHARED names",
)


@pytest.fixture(scope="module")
def foreign() -> dict[str, Tensor]:
    state: dict[str, Tensor] = torch.load(CHECKPOINT, weights_only=True)
    return state


def small() -> MeanScaleHyperprior:
    return MeanScaleHyperprior(4, 6).initialise(torch.Generator().manual_seed(0))


@needs_checkpoint
@torch.no_grad()
def test_computes_what_compressai_computes(foreign: dict[str, Tensor]) -> None:
    network = import_state_dict(foreign).eval()
    assert (network.N, network.M) == (64, 96)
    expected: Any = np.load(COMPUTED)
    image = torch.from_numpy(expected["image"]).permute(2, 0, 1)[None].float() / 255
    y = network.g_a(image)
    z = network.h_a(y)
    medians = network.entropy_bottleneck.medians[:, None, None]
    z_hat = torch.round(z - medians) + medians
    scales, means = network.h_s(z_hat).chunk(2, 1)
    y_hat = torch.round(y - means) + means
    found = {
        "y": y,
        "z": z,
        "z_hat": z_hat,
        "means": means,
        "scales": scales,
        "y_hat": y_hat,
        "x_hat": network.g_s(y_hat),
    }
    for name, value in found.items():
        assert np.abs(value[0].numpy() - expected[name]).max() < 1e-4, name
    assert float(gaussian_bits(y_hat, scales, means).sum()) == pytest.approx(
        float(expected["bits_y"]), rel=1e-3
    )
    assert float(network.entropy_bottleneck.bits(z_hat).sum()) == pytest.approx(
        float(expected["bits_z"]), rel=1e-3
    )


@needs_checkpoint
def test_export_gives_the_checkpoint_back(foreign: dict[str, Tensor]) -> None:
    exported = export_state_dict(import_state_dict(foreign))
    assert exported.keys() == foreign.keys()
    for name, leaf in foreign.items():
        assert exported[name].dtype == leaf.dtype, name
        assert exported[name].shape == leaf.shape, name
        if name.endswith("_quantized_cdf"):  # another libm may round a probability the other way
            assert (exported[name] - leaf).abs().max() <= 2, name
        else:
            torch.testing.assert_close(exported[name], leaf, rtol=1e-6, atol=0)


def test_round_trip() -> None:
    network = small()
    exported = export_state_dict(network)
    back = import_state_dict(exported).state_dict()
    assert back.keys() == network.state_dict().keys()
    assert all(torch.equal(leaf, back[name]) for name, leaf in network.state_dict().items())
    for name in ("entropy_bottleneck", "gaussian_conditional"):
        table, lengths = exported[f"{name}._quantized_cdf"], exported[f"{name}._cdf_length"]
        assert table.shape[1] == lengths.max()
        for row, length in zip(table, lengths.tolist(), strict=True):
            assert row[0] == 0
            assert row[length - 1] == 1 << 16
            assert (row[:length].diff() > 0).all()
            assert (row[length:] == 0).all()


def test_old_names_are_understood() -> None:
    state = small().state_dict()
    former = {
        "matrices.": "_matrix",
        "entropy_bottleneck.biases.": "entropy_bottleneck._bias",
        "factors.": "_factor",
    }
    old = dict(state)
    for new, replaced in former.items():
        old = {name.replace(new, replaced): leaf for name, leaf in old.items()}
    assert old.keys() != state.keys()
    assert torch.equal(
        import_state_dict(old).entropy_bottleneck.matrices[2], state["entropy_bottleneck.matrices.2"]
    )


def test_what_does_not_fit_is_named() -> None:
    state = small().state_dict()
    without = {name: leaf for name, leaf in state.items() if name != "h_a.2.bias"}
    cases: list[tuple[dict[str, Any], str]] = [
        (
            {},
            r"g_a.0.weight: missing; expected a state dict of CompressAI's MeanScaleHyperprior, found nothing",
        ),
        ({"epoch": torch.zeros(()), "state_dict": torch.zeros(())}, r"found epoch, state_dict …"),
        (without, r"h_a.2.bias: missing; expected \(4,\) for N = 4, M = 6"),
        (
            state | {"h_s.4.weight": torch.zeros(6, 9, 3, 3)},
            r"h_s.4.weight: expected \(12, 9, 3, 3\) .* found \(6, 9",
        ),
        (
            state | {"context_prediction.weight": torch.zeros(2)},
            r"context_prediction.weight: unknown; is this another",
        ),
        (state | {"g_s.0.bias": torch.full((4,), torch.nan)}, r"g_s.0.bias: expected finite parameters"),
    ]
    for broken, message in cases:
        with pytest.raises(ValueError, match=message):
            import_state_dict(broken)
