"""Layers, entropy models, the network in training, the finished codec, its checkpoint, digests and decoder side."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor
from torch.nn import functional

from pipeline.codec.artifact import Codec
from pipeline.codec.contract import crop, pad
from pipeline.codec.entropy_models import FactorizedPrior, gaussian_bits
from pipeline.codec.hyper_table import LIMIT_MAX, HyperTable
from pipeline.codec.hyperprior import MeanScaleHyperprior
from pipeline.codec.layers import GDN, Deconv, lower_bound
from pipeline.frequencies import TOTAL

N, M = 8, 12


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def network(seed: int = 0) -> MeanScaleHyperprior:
    """Untrained, but loud enough that indices and σ vary."""
    made = MeanScaleHyperprior(N, M).initialise(generator(seed))
    with torch.no_grad():
        for transform, gain in ((made.g_a, 4.0), (made.h_a, 4.0), (made.h_s, 3.0)):
            for layer in transform:
                if hasattr(layer, "weight"):
                    layer.weight *= gain
        made.entropy_bottleneck.quantiles[:, 0, 1] = torch.linspace(-0.5, 0.5, N)
    return made


@pytest.fixture(scope="module")
def codec() -> Codec:
    return Codec.from_network(network())


def images(batch: int = 2, height: int = 64, width: int = 128) -> Tensor:
    return torch.rand(batch, 3, height, width, generator=generator(1))


def hyper_indices(limit: int = 20) -> Tensor:
    return torch.randint(-limit, limit + 1, (3, N, 2, 3), generator=generator(4)).to(torch.int16)


# Layers and entropy models


def test_lower_bound_passes_gradients_that_raise() -> None:
    x = torch.tensor([0.05, 0.05, 0.3, 0.3], requires_grad=True)
    bounded = lower_bound(x, 0.11)
    assert torch.equal(bounded.detach(), torch.tensor([0.11, 0.11, 0.3, 0.3]))
    bounded.backward(torch.tensor([1.0, -1.0, 1.0, -1.0]))
    assert x.grad is not None
    assert torch.equal(x.grad, torch.tensor([0.0, -1.0, 1.0, -1.0]))


@pytest.mark.parametrize("inverse", [False, True])
def test_gdn_by_definition(inverse: bool) -> None:
    layer = GDN(3, inverse=inverse)
    with torch.no_grad():
        layer.gamma += 0.2 * torch.rand(3, 3, generator=generator())
        layer.beta[0] = -1.0  # the bound holds it at 1e-6
    x = torch.randn(2, 3, 4, 5, generator=generator(1))
    beta = (layer.beta.clamp(min=(1e-6 + 2.0**-36) ** 0.5) ** 2 - 2.0**-36)[:, None, None]
    gamma = layer.gamma.clamp(min=2.0**-18) ** 2 - 2.0**-36
    norm = torch.sqrt(beta + torch.einsum("ij,bjhw->bihw", gamma, x * x))
    torch.testing.assert_close(layer(x), x * norm if inverse else x / norm)
    assert float(beta.detach()[0]) == pytest.approx(1e-6, rel=1e-3)


def test_gdn_norm_in_float32_under_autocast() -> None:
    layer, x = GDN(3), torch.randn(1, 3, 4, 4, generator=generator())
    exact = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = layer(x)
        layer.norm_float32 = True
        assert torch.equal(layer(x), exact)
    assert not torch.equal(rough, exact)


def test_gaussian_bits_by_definition() -> None:
    y_hat, scales, means = (
        torch.tensor([0.0, 3.0, 90.0]),
        torch.tensor([0.01, 2.0, 1.0]),
        torch.tensor([0.3, 1.0, 0.0]),
    )
    normal = torch.distributions.Normal(means.double(), scales.double().clamp(min=0.11))
    mass = normal.cdf(y_hat.double() + 0.5) - normal.cdf(y_hat.double() - 0.5)
    expected = -torch.log2(mass.clamp(min=1e-9)).float()
    torch.testing.assert_close(gaussian_bits(y_hat, scales, means), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(gaussian_bits(y_hat, scales, means), gaussian_bits(y_hat, scales, means).float())


@torch.no_grad()
def test_factorized_prior_is_a_distribution() -> None:
    prior = network().entropy_bottleneck
    n = torch.arange(-300, 301).float()
    z_hat = (n + prior.medians[:, None])[None, :, None]
    mass = 2.0 ** -prior.bits(z_hat).double()
    torch.testing.assert_close(mass.sum((0, 2, 3)), torch.ones(N, dtype=torch.float64), rtol=0, atol=2e-5)


def test_auxiliary_loss_trains_quantiles_only() -> None:
    made = network()
    made.auxiliary_loss().backward()
    trained = {name for name, parameter in made.named_parameters() if parameter.grad is not None}
    assert trained == {"entropy_bottleneck.quantiles"}
    prior = FactorizedPrior(2)
    optimizer = torch.optim.Adam([prior.quantiles], lr=0.5)
    for _ in range(300):
        optimizer.zero_grad()
        prior.auxiliary_loss().backward()
        optimizer.step()
    logits = prior.cumulative_logits(prior.medians[:, None, None])
    assert logits.abs().max() < 0.2


# The network in training


def test_training_pass() -> None:
    made = network()
    out = made(images(), generator(2))
    assert out.x_hat.shape == images().shape
    assert out.bits_y.ndim == out.bits_z.ndim == 0
    (out.bits_y + out.bits_z + out.x_hat.square().sum()).backward()
    without = {name for name, parameter in made.named_parameters() if parameter.grad is None}
    assert without == {"entropy_bottleneck.quantiles"}


@torch.no_grad()
def test_training_pass_is_a_function_of_its_generator() -> None:
    made = network()
    first, again, other = (
        made(images(), generator(2)),
        made(images(), generator(2)),
        made(images(), generator(3)),
    )
    assert torch.equal(first.x_hat, again.x_hat)
    assert first.bits_y == again.bits_y
    assert first.bits_y != other.bits_y
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = made.to(memory_format=torch.channels_last)(images(), generator(2))
    assert rough.x_hat.dtype == rough.bits_y.dtype == rough.bits_z.dtype == torch.float32
    assert float(rough.bits_y) == pytest.approx(float(first.bits_y), rel=0.02)


def test_initialise_is_a_function_of_its_generator() -> None:
    first, again, other = (
        MeanScaleHyperprior(N, M).initialise(generator(seed)).state_dict() for seed in (0, 0, 1)
    )
    assert all(torch.equal(leaf, again[name]) for name, leaf in first.items())
    assert not torch.equal(first["g_a.0.weight"], other["g_a.0.weight"])


# The finished codec


@pytest.mark.parametrize(("height", "width"), [(64, 64), (1, 65), (130, 63)])
def test_pad_repeats_the_edge_and_crop_undoes_it(height: int, width: int) -> None:
    image = images(1, height, width)
    padded = pad(image, 64)
    assert padded.shape[2] % 64 == padded.shape[3] % 64 == 0
    assert padded.shape[2] - height < 64
    assert torch.equal(crop(padded, height, width), image)
    assert (padded[..., height:, width - 1] == image[..., -1:, -1]).all()


def test_analysis_is_float32_contiguous_whatever_is_around_it(codec: Codec) -> None:
    y, n = codec.analyse(images())
    assert (y.dtype, y.shape) == (torch.float32, (2, M, 4, 8))
    assert (n.dtype, n.shape) == (torch.int16, (2, N, 1, 2))
    assert n.unique().numel() > 3
    with torch.autocast("cpu", dtype=torch.bfloat16):
        around = codec.analyse(images().to(memory_format=torch.channels_last))
        image = codec.synthesise(y)
    assert torch.equal(around.y, y)
    assert torch.equal(around.hyper_indices, n)
    assert torch.equal(image, codec.synthesise(y.to(memory_format=torch.channels_last)))
    trained_in_channels_last = Codec.from_network(network().to(memory_format=torch.channels_last))
    assert torch.equal(trained_in_channels_last.analyse(images()).y, y)
    assert trained_in_channels_last.to_bytes() == codec.to_bytes()


def test_hyper_indices_are_rounded_about_the_medians(codec: Codec) -> None:
    y, n = codec.analyse(images())
    z = codec.network.h_a(y)
    torch.testing.assert_close(
        n + codec.network.entropy_bottleneck.medians[:, None, None], z, rtol=0, atol=0.5001
    )
    means, sigma_index = codec.entropy_parameters(n)
    assert means.shape == sigma_index.shape == y.shape
    assert (means.dtype, sigma_index.dtype) == (torch.float32, torch.uint8)


def test_analysis_refuses(codec: Codec) -> None:
    with pytest.raises(ValueError, match=r"expected images as float32 \(B, 3, H, W\), found torch.uint8"):
        codec.analyse(images().to(torch.uint8))
    with pytest.raises(ValueError, match=r"multiples of 64, found \(2, 3, 65, 64\): pad the images first"):
        codec.analyse(images(2, 65, 64))
    with pytest.raises(ValueError, match="expected finite latents, found NaN or infinity"):
        codec.analyse(images() * torch.nan)


def test_hyper_bits_by_hand(codec: Codec) -> None:
    n = hyper_indices(limit=300)
    table = codec.hyper_table
    for image, found in zip(n, codec.hyper_bits(n), strict=True):
        bits = 0.0
        for channel, height, width in np.ndindex(*image.shape):
            value, limit = int(image[channel, height, width]), int(table.limits[channel])
            escaped = abs(value) > limit
            row = table.row(channel)
            bits += 16 - np.log2(float(row[-1] if escaped else row[value + limit]))
            if escaped:
                bits += 2 + 2 * int(np.log2(abs(value) - limit))
        assert float(found) == pytest.approx(bits, rel=1e-12)


def test_hyper_table_is_near_the_prior(codec: Codec) -> None:
    n = hyper_indices(limit=5)
    prior = codec.network.entropy_bottleneck
    exact = prior.bits(n + prior.medians[:, None, None]).sum((1, 2, 3))
    torch.testing.assert_close(codec.hyper_bits(n).float(), exact, rtol=2e-2, atol=0)


def test_hyper_table_of_a_narrow_and_of_an_endless_prior() -> None:
    prior = FactorizedPrior(2)
    with torch.no_grad():
        for matrix in prior.matrices:
            matrix[0] += 6
            matrix[1] -= 6
    table = HyperTable.from_prior(prior)
    assert table.limits[0] <= 1
    assert table.limits[1] == LIMIT_MAX
    assert all(table.row(channel).sum() == TOTAL for channel in (0, 1))
    assert table.bits(torch.full((1, 2, 1, 1), -32768, dtype=torch.int16)) < 100


# Checkpoint


def test_checkpoint_round_trip(codec: Codec) -> None:
    data = codec.to_bytes()
    back = Codec.from_bytes(data)
    assert back.to_bytes() == data
    assert back.digests() == codec.digests()
    for ours, theirs in zip(codec.analyse(images()), back.analyse(images()), strict=True):
        assert torch.equal(ours, theirs)


def damaged(codec: Codec, **leaves: Tensor | None) -> bytes:
    """The checkpoint with some leaves replaced, dropped (None) or added; double underscores stand for dots."""
    tensors = safetensors.torch.load(codec.to_bytes())
    for name, leaf in leaves.items():
        tensors.pop(name.replace("__", "."), None)
        if leaf is not None:
            tensors[name.replace("__", ".")] = leaf
    return safetensors.torch.save(tensors, {"retrellis": metadata(codec)})


def metadata(codec: Codec, **changes: object) -> str:
    data = codec.to_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return json.dumps(json.loads(header["__metadata__"]["retrellis"]) | changes)


def test_checkpoints_that_do_not_fit_are_explained(codec: Codec) -> None:
    frequencies = safetensors.torch.load(codec.to_bytes())["hyper_table.frequencies"]
    cases = [
        (b"", "not a codec checkpoint: expected safetensors with `retrellis` metadata"),
        (b"\x80\x04" * 99, "not a codec checkpoint"),
        (safetensors.torch.save({"a": torch.zeros(1)}), "not a codec checkpoint"),
        (codec.to_bytes()[:-9], "damaged codec checkpoint: .*; copy or train it again"),
        (
            damaged(codec, network__g_s__0__bias=None),
            r"network.g_s.0.bias: expected torch.float32 \(8,\), found nothing",
        ),
        (
            damaged(codec, network__g_s__0__bias=torch.zeros(9)),
            r"network.g_s.0.bias: expected torch.float32 \(8,\), found torch.float32 \(9,\)",
        ),
        (
            damaged(codec, integer__means__weight=codec.synthesis.means.weight.long()),
            r"integer.means.weight: expected torch.int32 \(12, 18, 3, 3\), found torch.int64",
        ),
        (
            damaged(codec, extra=torch.zeros(1)),
            "extra: unknown leaf in a mean-scale-hyperprior checkpoint of N = 8",
        ),
        (
            damaged(codec, network__g_a__0__bias=torch.full((8,), torch.inf)),
            r"g_a.0.bias: expected finite parameters",
        ),
        (
            damaged(codec, hyper_table__frequencies=frequencies[1:].clone()),
            r"hyper_table.frequencies: expected shape",
        ),
        (
            damaged(codec, hyper_table__frequencies=frequencies + 1),
            r"hyper_table.frequencies: expected channel 0 to sum",
        ),
        (
            damaged(codec, hyper_table__limits=torch.full((8,), -1, dtype=torch.int32)),
            r"hyper_table.limits: expected 0 … 511, found -1 … -1",
        ),
    ]
    for data, message in cases:
        with pytest.raises(ValueError, match=message):
            Codec.from_bytes(data)


def test_other_versions_and_architectures_are_refused(codec: Codec) -> None:
    tensors = safetensors.torch.load(codec.to_bytes())
    for changes, message in (
        ({"version": 2}, "expected a codec of format version 1, found 2: use a matching release"),
        ({"architecture": "elic"}, "expected a codec with .*mean-scale-hyperprior.* found .*elic"),
        ({"N": 10**9}, "expected N and M between 1 and 4096, found"),
        ({"N": "8"}, "expected N and M between 1 and 4096, found"),
    ):
        data = safetensors.torch.save(tensors, {"retrellis": metadata(codec, **changes)})
        with pytest.raises(ValueError, match=message):
            Codec.from_bytes(data)


def test_diverged_training_is_refused() -> None:
    made = network()
    with torch.no_grad():
        made.g_s[2].weight[0] = torch.nan
    with pytest.raises(
        ValueError, match=r"g_s.2.weight: expected finite parameters, found NaN .* training diverged"
    ):
        Codec.from_network(made)


# Finetuning and digests


def test_finetuned_decoder_changes_no_grid_and_no_rate(codec: Codec) -> None:
    side = codec.decoder_side()
    with torch.no_grad():
        side.g_s[0].weight *= 1.1
    refined, before = codec.refined(side), codec.digests()
    after = refined.digests()
    assert (after.grid, after.rate) == (before.grid, before.rate)
    assert after.codec != before.codec
    assert not torch.equal(
        refined.synthesise(codec.analyse(images()).y), codec.synthesise(codec.analyse(images()).y)
    )


def test_finetuned_scale_rows_change_the_rate_alone(codec: Codec) -> None:
    side = codec.decoder_side()
    with torch.no_grad():
        side.scale_rows.weight *= 3
        side.scale_rows.bias += 1
    refined, before = codec.refined(side), codec.digests()
    after = refined.digests()
    assert after.grid == before.grid
    assert after.rate != before.rate
    n = hyper_indices()
    assert torch.equal(refined.entropy_parameters(n).means, codec.entropy_parameters(n).means)
    assert not torch.equal(refined.entropy_parameters(n).sigma_index, codec.entropy_parameters(n).sigma_index)
    assert torch.equal(refined.hyper_features(n), codec.hyper_features(n))
    assert Codec.from_network(refined.network).digests() == after
    rows = refined.network.h_s[-1].weight
    assert torch.equal(rows[M:], codec.network.h_s[-1].weight[M:])


@pytest.mark.parametrize(
    ("leaf", "changed"),
    [
        ("g_a.0.bias", {"codec", "grid"}),
        ("h_a.4.weight", {"codec", "grid"}),
        ("h_s.0.weight", {"codec", "grid"}),
        ("entropy_bottleneck.biases.1", {"codec", "rate"}),
        ("g_s.6.bias", {"codec"}),
    ],
)
def test_what_digests_depend_on(codec: Codec, leaf: str, changed: set[str]) -> None:
    made = network()
    with torch.no_grad():
        made.state_dict()[leaf] += 0.01
    before, after = codec.digests(), Codec.from_network(made).digests()
    assert {name for name in before._fields if getattr(before, name) != getattr(after, name)} == changed


def test_refined_keeps_integers_that_another_release_made(codec: Codec) -> None:
    table = replace(codec.hyper_table, frequencies=codec.hyper_table.frequencies[::-1].copy())
    older = replace(codec, hyper_table=table)
    assert older.refined(older.decoder_side()).to_bytes() == older.to_bytes()


def test_decoder_side_is_a_trainable_copy(codec: Codec) -> None:
    data, side = codec.to_bytes(), codec.decoder_side()
    y, n = codec.analyse(images())
    torch.testing.assert_close(side.synthesise(y), codec.synthesise(y), rtol=0, atol=1e-5)  # other kernels
    mixed = side.synthesise(y, mixed=True)
    assert mixed.dtype == torch.float32
    torch.testing.assert_close(mixed, side.synthesise(y), rtol=0, atol=0.05)
    optimizer = torch.optim.Adam([*side.decoder_parameters(), *side.scale_parameters()], lr=1e-2)
    loss = mixed.square().sum() + side.scales(codec.hyper_features(n)).square().sum()
    loss.backward()
    assert all(parameter.grad is not None for parameter in side.parameters())
    optimizer.step()
    assert codec.to_bytes() == data
    assert not torch.equal(side.synthesise(y), codec.synthesise(y))


def test_scales_are_those_that_chose_the_index(codec: Codec) -> None:
    n = hyper_indices()
    scales = codec.decoder_side().scales(codec.hyper_features(n)).detach()
    assert scales.min() >= 0.11
    index = torch.bucketize(scales.double(), codec.synthesis.thresholds / 65536)
    different = index != codec.entropy_parameters(n).sigma_index
    assert different.float().mean() < 0.01


def test_scales_pass_gradients_from_below_the_bound(codec: Codec) -> None:
    side = codec.decoder_side()
    with torch.no_grad():
        side.scale_rows.weight.zero_()
        side.scale_rows.bias.fill_(-1)
    side.scales(codec.hyper_features(hyper_indices())).sum().neg().backward()
    assert side.scale_rows.bias.grad is not None
    assert (side.scale_rows.bias.grad < 0).all()
    assert functional.relu(side.scale_rows.bias).max() == 0


def test_rounded_weights_take_half_the_space_and_come_back() -> None:
    whole = Codec.from_network(network())
    codec = Codec.from_network(network(), rounded=True)
    again = Codec.from_bytes(codec.to_bytes())
    assert again.digests() == codec.digests() != whole.digests()
    theirs, ours = again.network.state_dict(), codec.network.state_dict()
    assert all(leaf.dtype == torch.float32 and torch.equal(leaf, ours[name]) for name, leaf in theirs.items())
    saved = sum(2 * leaf.numel() for leaf in ours.values())
    assert len(whole.to_bytes()) - len(codec.to_bytes()) == pytest.approx(saved, rel=0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_transposed_convolution_has_torchs_values_and_gradients(dtype: torch.dtype) -> None:
    ours = Deconv(6, 4).to(dtype)
    torchs = torch.nn.ConvTranspose2d(6, 4, 5, stride=2, padding=2, output_padding=1).to(dtype)
    torchs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 6, 7, 9, dtype=dtype, generator=torch.Generator().manual_seed(0))
    found = []
    for module in (ours, torchs):
        leaf = x.clone().requires_grad_()
        out = module(leaf)
        torch.square(out).sum().backward()
        found.append([out, leaf.grad, module.weight.grad, module.bias.grad])
    assert torch.equal(found[0][0], found[1][0])
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs)
