"""Finetuning: crops are what inference sees, arms change what they should, controls match what they simulate."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from trainings import pictures, uncompilable

from jobs.evaluate import check_decoded, score
from pipeline.bitstream import ImageCoder
from pipeline.codec.artifact import Codec
from pipeline.codec.hyperprior import MeanScaleHyperprior
from pipeline.coding import analyse, code, decode_latent, scale_inputs, synthesise
from pipeline.quantizers import Tables, design, settings
from pipeline.quantizers.lloyd import midpoint_tables
from pipeline.sigma import SIGMA_LEVELS, sigma_levels
from pipeline.training.finetune import (
    Control,
    FinetuneSettings,
    FinetuneTraining,
    level_places,
    noise_widths,
    rounding_step,
)
from pipeline.training.group import ALONE, Group
from pipeline.training.latent_crops import LatentCrops

# Golden, in float32: when one of these moves, what a stage computes has changed, and so must its version
GOLDEN_ARM_LOSS = {"quantized": 241.21565, "noise": 241.20993, "rounded": 241.20451}
GOLDEN_SCORE = {"bits_y": 10677.4905, "bits_z": 259.779796, "psnr_db": 5.069275}
ARM = FinetuneSettings(
    parts="decoder",
    latents="quantized",
    lmbda=0.01,
    steps=6,
    batch=3,
    crop=96,
    learning_rate=1e-3,
    warmup=2,
    clip=1.0,
    precision="float32",
    seed=3,
)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def images() -> list[np.ndarray]:
    return pictures()


@pytest.fixture(scope="module")
def codec() -> Codec:
    network = MeanScaleHyperprior(4, 6).initialise(torch.Generator().manual_seed(1))
    with torch.no_grad():
        network.g_a[-1].weight.mul_(30)  # latents that are not all zero
    return Codec.from_network(network)


@pytest.fixture(scope="module")
def tables() -> Tables:
    return design(settings("urq"))


@pytest.fixture(scope="module")
def fields(codec: Codec, tables: Tables, images: list[np.ndarray]) -> dict[str, list[np.ndarray]]:
    found: dict[str, list[np.ndarray]] = {}
    for pixels in images:
        a, coded = analyse(codec, pixels), code(codec, tables, pixels)
        contexts, features = scale_inputs(codec, tables, coded.indices, coded.hyper_indices)
        row = {
            "latent": a.latent,
            "means": a.means,
            "sigma_index": a.sigma_index,
            "reconstruction": coded.latent,
        }
        row |= {"indices": coded.indices, "contexts": contexts, "features": features}
        for name, value in row.items():
            found.setdefault(name, []).append(value)
    return found


def test_the_interior_of_a_crop_is_what_inference_decodes(
    codec: Codec, images: list[np.ndarray], fields: dict[str, list[np.ndarray]]
) -> None:
    crops = LatentCrops({"reconstruction": fields["reconstruction"]}, images, 96, seed=5)
    covered = 0
    for step in range(6):
        batch = crops.batch(step, 4)
        with torch.no_grad():
            decoded = (
                codec.network.g_s(torch.from_numpy(batch.fields["reconstruction"]))
                .permute(0, 2, 3, 1)
                .numpy()
            )
        for row in range(4):
            crop = crops._crop(step * 4 + row)
            height, width, _ = images[crop.image].shape
            with torch.no_grad():
                whole = codec.network.g_s(torch.from_numpy(fields["reconstruction"][crop.image])[None])[0]
            top, left = crop.top * 16, crop.left * 16
            expected = whole.permute(1, 2, 0).numpy()[top : top + 96, left : left + 96]
            mask = batch.loss_mask[row][: expected.shape[0], : expected.shape[1]]
            assert not batch.loss_mask[row][height - top :].any()
            assert not batch.loss_mask[row][:, width - left :].any()
            inside = decoded[row][: expected.shape[0], : expected.shape[1]]
            np.testing.assert_allclose(inside[mask], expected[mask], atol=2e-5)
            pixels = batch.pixels[row][: expected.shape[0], : expected.shape[1]][mask]
            shown = images[crop.image][top : top + 96, left : left + 96]
            assert np.array_equal(
                pixels, np.pad(shown, [(0, 96), (0, 96), (0, 0)])[: mask.shape[0], : mask.shape[1]][mask]
            )
            covered += int(mask.sum())
    assert covered > 0.1 * 24 * 96 * 96  # of 6 latents a side, 2 are within both margins


def test_every_image_comes_once_an_epoch(
    images: list[np.ndarray], fields: dict[str, list[np.ndarray]]
) -> None:
    crops = LatentCrops({"latent": fields["latent"]}, images, 96, seed=5)
    epochs = [[crops._crop(epoch * 3 + i).image for i in range(3)] for epoch in range(8)]
    assert all(sorted(epoch) == [0, 1, 2] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


@pytest.mark.parametrize(
    ("latents", "optimizer"),
    [("quantized", "adam"), ("noise", "adam"), ("rounded", "adam"), ("quantized", "muon")],
)
def test_decoder_arms_change_the_decoder_alone_and_resume(
    latents: str,
    optimizer: str,
    codec: Codec,
    tables: Tables,
    images: list[np.ndarray],
    fields: dict[str, list[np.ndarray]],
) -> None:
    control = Control(np.full(SIGMA_LEVELS, 0.5, np.float32), 1.1)
    crops = LatentCrops(fields, images, ARM.crop, ARM.seed)
    arm = replace(ARM, latents=latents, optimizer=optimizer)
    whole = FinetuneTraining(arm, codec, tables, crops, control)
    losses = [whole.advance()["loss"] for _ in range(6)]
    assert losses[0] == pytest.approx(GOLDEN_ARM_LOSS[latents], rel=1e-5)
    first, second = (FinetuneTraining(arm, codec, tables, crops, control) for _ in range(2))
    for _ in range(3):
        first.advance()
    second.resume(first.to_bytes())
    assert [second.advance()["loss"] for _ in range(3)] == losses[3:]
    result = whole.result()
    assert result.digests().codec == second.result().digests().codec != codec.digests().codec
    assert (result.digests().grid, result.digests().rate) == (codec.digests().grid, codec.digests().rate)
    coded = code(codec, tables, images[0])
    assert np.array_equal(code(result, tables, images[0]).indices, coded.indices)


@pytest.mark.parametrize("failing_pass", ["forward", "backward"])
def test_a_finetuning_that_torch_cannot_compile_goes_on_without(
    failing_pass: str,
    codec: Codec,
    tables: Tables,
    images: list[np.ndarray],
    fields: dict[str, list[np.ndarray]],
) -> None:
    crops = LatentCrops(fields, images, ARM.crop, ARM.seed)
    plain, failing = (FinetuneTraining(ARM, codec, tables, crops, Control()) for _ in range(2))
    failing.synthesise.function = uncompilable(failing.side.synthesise, failing_pass)
    assert [failing.advance() for _ in range(2)] == [plain.advance() for _ in range(2)]
    (remark,) = failing.remarks
    assert "no such operation here" in remark


HALVES = (slice(0, 2), slice(2, 4))


class InThread(Group):
    """A worker in a thread, which meets the others of its group to average."""

    def __init__(self, rank: int, barrier: threading.Barrier, given: dict[int, list[torch.Tensor]]) -> None:
        super().__init__(rank, barrier.parties)
        self.__dict__.update(barrier=barrier, given=given)

    def average(self, tensors: Sequence[torch.Tensor]) -> None:
        self.given[self.rank] = [tensor.clone() for tensor in tensors]
        self.barrier.wait(60)
        means = [torch.stack(all_of_one).mean(0) for all_of_one in zip(*self.given.values(), strict=True)]
        self.barrier.wait(60)
        for tensor, mean in zip(tensors, means, strict=True):
            tensor.copy_(mean)


@pytest.mark.parametrize("latents", ["scale", "noise"])
def test_two_workers_finetune_as_one(
    latents: str, codec: Codec, tables: Tables, images: list[np.ndarray], fields: dict[str, list[np.ndarray]]
) -> None:
    arm = replace(ARM, batch=4, steps=3)
    arm = replace(arm, parts="decoder+scale") if latents == "scale" else replace(arm, latents=latents)
    control = Control(np.full(SIGMA_LEVELS, 0.5, np.float32))
    crops = LatentCrops(fields, images, ARM.crop, ARM.seed)

    def metrics(group: Group) -> list[dict[str, float]]:
        torch.set_num_threads(1)
        training = FinetuneTraining(arm, codec, tables, crops, control, group=group)
        return [training.advance() for _ in range(arm.steps)]

    barrier, given = threading.Barrier(2), dict[int, list[torch.Tensor]]()
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(metrics, [InThread(rank, barrier, given) for rank in range(2)])
    assert first == second
    alone = metrics(ALONE)
    assert all(ours == pytest.approx(theirs, rel=1e-5) for ours, theirs in zip(first, alone, strict=True))
    halves = [[crops.batch(step, 4, rows).loss_mask.sum() for rows in HALVES] for step in range(arm.steps)]
    assert any(first != second for first, second in halves)  # or this shows nothing of how masks are counted


def test_scale_rows_train_on_the_rate_of_the_tables(
    codec: Codec, tables: Tables, images: list[np.ndarray], fields: dict[str, list[np.ndarray]]
) -> None:
    crops = LatentCrops(fields, images, ARM.crop, ARM.seed)
    training = FinetuneTraining(replace(ARM, parts="decoder+scale"), codec, tables, crops, Control())
    before = training.advance()["bpp_y"]
    for _ in range(4):
        training.advance()
    training.step = 0  # the same crops again
    assert training.advance()["bpp_y"] < before
    result = training.result()
    assert result.digests().grid == codec.digests().grid
    assert result.digests().rate != codec.digests().rate
    row, column = codec.network.h_s[-1], result.network.h_s[-1]
    assert torch.equal(row.weight[6:], column.weight[6:])
    assert not torch.equal(row.weight[:6], column.weight[:6])


def test_rate_at_a_level_is_the_rate_of_the_tables(
    codec: Codec, tables: Tables, images: list[np.ndarray], fields: dict[str, list[np.ndarray]]
) -> None:
    """With σ exactly on its level the interpolated rate is the one that quantization counted."""
    pixels = images[0][:128, :128]
    coded = code(codec, tables, pixels)
    contexts, features = scale_inputs(codec, tables, coded.indices, coded.hyper_indices)
    _, level = codec.entropy_parameters(torch.from_numpy(coded.hyper_indices)[None])
    one = {"features": [features], "indices": [coded.indices], "contexts": [contexts]}
    crops = LatentCrops(one, [pixels], 128, 0)
    training = FinetuneTraining(
        replace(ARM, parts="decoder+scale", crop=128), codec, tables, crops, Control()
    )
    sigma = torch.from_numpy(sigma_levels()[level.numpy()].astype(np.float32))
    training.side.scales = lambda features: sigma  # type: ignore[method-assign,assignment]
    batch = crops.batch(0, 1)
    rate = training._rate(batch, training._count(batch.latent_mask))
    assert float(rate) * 128 * 128 == pytest.approx(coded.bits_y, rel=1e-3)


def test_scores_are_golden(codec: Codec, images: list[np.ndarray]) -> None:
    tables = midpoint_tables(settings("tcq", step=0.7, lmbda_q=0.1))
    coder = ImageCoder(codec, tables)
    row = score(coder, images[0], ["psnr", "ms_ssim"], to_file=False)
    assert {name: row[name] for name in GOLDEN_SCORE} == pytest.approx(GOLDEN_SCORE, rel=1e-3)
    assert row["bpp"] == pytest.approx((row["bits_y"] + row["bits_z"]) / (150 * 200))
    assert row["ms_ssim"] is None  # a side of 150 pixels
    written = score(coder, images[0], ["psnr"], to_file=True)
    assert written["bpp"] == 8 * len(coder.encode(images[0])) / (150 * 200)
    same = ("bits_y", "bits_z", "indices", "psnr_db")
    assert {name: written[name] for name in same} == {name: row[name] for name in same}


def test_a_file_that_decodes_to_something_else_is_no_score(codec: Codec, images: list[np.ndarray]) -> None:
    coder = ImageCoder(codec, midpoint_tables(settings("urq")))
    coded = code(codec, coder.tables, images[0])
    found = coder.decode_indices(coder.encode_indices(coded, 150, 200))
    check_decoded(coded, found)
    found.indices[0, 0, :2] += 1
    with pytest.raises(
        RuntimeError, match=r"expected the decoded file's indices to be the encoder's, found 2 of"
    ):
        check_decoded(coded, found)


def test_level_places_are_linear_in_log_sigma() -> None:
    levels = torch.from_numpy(sigma_levels().astype(np.float32))
    np.testing.assert_allclose(level_places(levels).numpy(), np.arange(SIGMA_LEVELS), atol=1e-3)
    between = torch.sqrt(levels[10] * levels[11])
    assert float(level_places(between)) == pytest.approx(10.5, abs=1e-3)


def test_controls_have_the_variance_and_the_error_they_are_given() -> None:
    generator = np.random.default_rng(0)
    index = generator.integers(0, 3, (4, 1000)).astype(np.uint8)
    spread = np.array([0.1, 0.5, 2.0])
    width = noise_widths([generator.normal(0, spread[index])], [index])
    np.testing.assert_allclose(width[:3], np.sqrt(12) * spread, rtol=0.05)
    assert not width[3:].any()
    residual = generator.normal(0, 3, 200_000)
    step, reached = rounding_step([residual], residual.size, 0.2)
    assert reached == pytest.approx(0.2, rel=1e-2)
    assert rounding_step([residual], residual.size, 50.0)[1] == pytest.approx(
        9, rel=0.05
    )  # all of it, and no more
    assert np.mean(np.square(residual - np.round(residual / step) * step)) == pytest.approx(0.2, rel=1e-2)


def test_what_is_stored_decodes_to_what_was_evaluated(codec: Codec, images: list[np.ndarray]) -> None:
    tables = design(settings("tcq", step=0.7, lmbda_q=0.1))
    for pixels in images:
        coded = code(codec, tables, pixels)
        assert np.abs(coded.indices).max() > 0
        latent = decode_latent(
            codec, tables, coded.indices.astype(np.int8), coded.hyper_indices.astype(np.int8)
        )
        assert np.array_equal(latent, coded.latent)
        assert synthesise(codec, latent, *pixels.shape[:2]).shape == pixels.shape
        assert coded.squared_error == pytest.approx(
            np.square(latent - analyse(codec, pixels).latent).sum(), rel=1e-4
        )
