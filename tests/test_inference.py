"""g_a and g_s in bands are the networks: every row; threads and batches change no more than rounding."""

from __future__ import annotations

import pytest
import torch

from pipeline.codec import inference
from pipeline.codec.hyperprior import MeanScaleHyperprior

N, M = 16, 24


def network() -> MeanScaleHyperprior:
    made = MeanScaleHyperprior(N, M).initialise(torch.Generator().manual_seed(1)).eval().requires_grad_(False)
    for layer in made.modules():  # strong norms, so that a row that missed its neighbours would show
        if hasattr(layer, "gamma"):
            layer.gamma.copy_(torch.rand(N, N, generator=torch.Generator().manual_seed(2)) ** 4)
    return made


@pytest.mark.parametrize("height", [64, 128, 192, 320])
def test_bands_are_the_network(height: int) -> None:
    made, random = network(), torch.Generator().manual_seed(height)
    image = torch.rand(2, 3, height, 64, generator=random)
    latent = torch.randn(2, M, height // 16, 4, generator=random)
    before = image.clone(), latent.clone()
    torch.testing.assert_close(inference.analyse(made.g_a, image), made.g_a(image), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(inference.synthesise(made.g_s, latent), made.g_s(latent), rtol=1e-5, atol=1e-5)
    assert torch.equal(before[0], image)
    assert torch.equal(before[1], latent)


def test_strips_of_a_norm_are_the_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    made, image = network(), torch.rand(1, 3, 192, 128)
    whole = inference.analyse(made.g_a, image)
    monkeypatch.setattr(inference, "STRIP_VALUES", 1000)
    torch.testing.assert_close(inference.analyse(made.g_a, image), whole, rtol=1e-6, atol=1e-6)


def test_threads_and_batches_change_no_more_than_rounding() -> None:
    made, images = network(), torch.rand(8, 3, 192, 128, generator=torch.Generator().manual_seed(3))
    threads, found = torch.get_num_threads(), []
    try:
        for count, batch in ((1, 8), (2, 8), (2, 1)):
            torch.set_num_threads(count)
            latents = [inference.analyse(made.g_a, part) for part in images.split(batch)]
            hyper = [inference.hyper_analyse(made.h_a, part) for part in latents]
            pictures = [inference.synthesise(made.g_s, part) for part in latents]
            found.append([torch.cat(parts) for parts in (latents, hyper, pictures)])
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(found[0][1], made.h_a(found[0][0]), rtol=1e-5, atol=1e-5)
    for other in found[1:]:
        for one, again in zip(found[0], other, strict=True):
            torch.testing.assert_close(one, again, rtol=1e-5, atol=1e-5)
