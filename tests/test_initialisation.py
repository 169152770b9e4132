"""A training's start as a transform: components are orthonormal, and pictures come back before anything is learnt."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hostile_files import photograph

from pipeline.codec.hyperprior import MeanScaleHyperprior
from pipeline.training.base import BaseSettings, BaseTraining
from pipeline.training.initialisation import cascade, start_as_transform


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    pixels = photograph(256, 384)
    crops = np.stack([pixels[y : y + 128, x : x + 128] for y in (0, 128) for x in (0, 128, 256)])
    return torch.from_numpy(crops).permute(0, 3, 1, 2).float() / 255


def psnr_db(a: torch.Tensor, b: torch.Tensor) -> float:
    return -10 * math.log10(float(torch.square(a - b).mean()))


def test_components_are_orthonormal_and_ordered(images: torch.Tensor) -> None:
    levels = cascade(images, [64, 48, 64, 96])
    assert [tuple(level.shape) for level in levels] == [
        (12, 3, 2, 2),
        (48, 12, 2, 2),
        (64, 48, 2, 2),
        (96, 64, 2, 2),
    ]
    x = images
    for level in levels:
        flat = level.flatten(1)
        assert torch.allclose(flat @ flat.T, torch.eye(len(flat)), atol=1e-4)
        x = torch.nn.functional.conv2d(x, level, stride=2)
        energy = x.square().mean((0, 2, 3))
        assert (energy.diff() <= 1e-4 * energy[0]).all()


def test_pictures_come_back_before_anything_is_learnt(images: torch.Tensor) -> None:
    network = MeanScaleHyperprior(64, 96).initialise(torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = psnr_db(network.g_s(network.g_a(images)), images)
        start_as_transform(network, images, 0.01)
        y = network.g_a(images)
        after = psnr_db(network.g_s(y), images)
        coarse = psnr_db(network.g_s(torch.round(y)), images)
    assert before < 12
    assert after > 26
    assert 30 < coarse < after - 1  # a unit step costs something, and not all


def test_a_larger_weight_of_distortion_makes_larger_latents(images: torch.Tensor) -> None:
    def largest(lmbda: float) -> float:
        network = MeanScaleHyperprior(16, 24).initialise(torch.Generator().manual_seed(0))
        start_as_transform(network, images, lmbda)
        return float(network.g_a(images).detach().abs().max())

    assert largest(0.04) == pytest.approx(2 * largest(0.01), rel=1e-3)


@pytest.mark.parametrize("initialise", ["random", "transform"])
def test_a_training_starts_as_told(initialise: str) -> None:
    settings = BaseSettings(24, 32, 0.01, 5, 2, 64, 1e-4, 1, 1.0, "float32", 0, initialise=initialise)
    pixels = [photograph(128, 192)]
    losses = [BaseTraining(settings, pixels).advance()["loss"] for _ in range(2)]
    assert losses[0] == losses[1]
    assert (losses[0] < 50) == (initialise == "transform")
