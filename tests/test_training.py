"""Training of base codecs: schedules, optimizers, starts, and that resuming changes nothing."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from trainings import BASE, pictures, uncompilable

from pipeline.codec.artifact import Codec
from pipeline.training.ahead import Ahead
from pipeline.training.base import BaseTraining, random_crop, reflect_pad
from pipeline.training.optimization import (
    CheckpointError,
    DivergedError,
    FilterMuon,
    learning_rate_factor,
    step_metrics,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def images() -> list[np.ndarray]:
    return pictures()


def test_schedule_rises_and_falls() -> None:
    factors = [learning_rate_factor(step, 100, 10) for step in range(100)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[10] == pytest.approx(1)
    assert max(factors) == factors[10]
    assert factors[-1] < 0.02


@pytest.mark.parametrize("failing_pass", ["forward", "backward"])
def test_a_training_that_torch_cannot_compile_goes_on_without(
    failing_pass: str, images: list[np.ndarray]
) -> None:
    plain, failing = BaseTraining(BASE, images), BaseTraining(BASE, images)
    failing.forward.function = uncompilable(failing.network, failing_pass)
    assert [failing.advance() for _ in range(2)] == [plain.advance() for _ in range(2)]
    (remark,) = failing.remarks
    assert remark.startswith("torch cannot compile this training, which goes on without: ")
    assert "no such operation here" in remark


def test_batches_made_ahead_are_the_same(images: list[np.ndarray]) -> None:
    plain, ahead = BaseTraining(BASE, images), BaseTraining(BASE, images)
    ahead.ahead = Ahead()  # as on a device of its own
    assert [ahead.advance() for _ in range(3)] == [plain.advance() for _ in range(3)]
    ahead.step = plain.step = 1  # as after a checkpoint
    assert ahead.advance() == plain.advance()


def test_a_batch_that_could_not_be_made_ahead_is_made_again() -> None:
    failures = [OSError("the disk is away"), OSError("the disk is away")]

    def make(step: int) -> int:
        if step == 1 and failures:
            raise failures.pop()
        return step

    ahead = Ahead[int]()
    assert ahead(make, 0) == 0
    for _ in range(2):
        with pytest.raises(OSError, match="away"):
            ahead(make, 1)
    assert ahead(make, 1) == 1


def test_small_images_are_reflected() -> None:
    pixels = np.arange(4 * 5 * 3, dtype=np.uint8).reshape(4, 5, 3)
    padded = reflect_pad(pixels, 6)
    assert padded.shape == (6, 6, 3)
    assert np.array_equal(padded[4, :5], pixels[2])
    assert random_crop(pixels, 64, np.random.default_rng(0)).shape == (64, 64, 3)


def test_base_training_resumes_bit_identically(images: list[np.ndarray]) -> None:
    whole = BaseTraining(BASE, images)
    losses = [whole.advance()["loss"] for _ in range(BASE.steps)]
    first = BaseTraining(BASE, images)
    for _ in range(3):
        first.advance()
    second = BaseTraining(BASE, images)
    second.resume(first.to_bytes())
    assert [second.advance()["loss"] for _ in range(3)] == losses[3:]
    ours, theirs = second.network.state_dict(), whole.network.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert losses[0] == pytest.approx(GOLDEN_FIRST_LOSS, rel=1e-5)


GOLDEN_FIRST_LOSS = 199.05925
GOLDEN_FOURTH_LOSS = {"random": 204.994, "transform": 5.14895}


def test_muon_turns_a_filter_by_as_much_in_every_direction() -> None:
    weight = torch.nn.Parameter(torch.randn(8, 6, 5, 5).to(memory_format=torch.channels_last))
    before = weight.detach().clone()
    optimizer = FilterMuon([weight], 1e-3)
    weight.grad = torch.randn(8, 6, 5, 5)
    optimizer.step()
    moved = torch.linalg.svdvals((before - weight.detach()).flatten(1))
    assert (moved / (1e-3 * 0.2 * math.sqrt(150))).tolist() == pytest.approx([1] * 8, abs=0.35)


def test_muon_refuses_filters_that_it_would_copy() -> None:
    with pytest.raises(
        ValueError, match=r"expected filters in channels_last, found strides \(150, 25, 5, 1\)"
    ):
        FilterMuon([torch.nn.Parameter(torch.zeros(8, 6, 5, 5))], 1e-3)


@pytest.mark.parametrize("start", ["random", "transform"])
def test_golden_losses_of_muon(images: list[np.ndarray], start: str) -> None:
    training = BaseTraining(replace(BASE, optimizer="muon", initialise=start), images)
    losses = [training.advance()["loss"] for _ in range(4)]
    assert losses[3] == pytest.approx(GOLDEN_FOURTH_LOSS[start], rel=5e-3)


@pytest.mark.parametrize(("kind", "names"), [("muon", {"main", "filters"}), ("adam", {"main"})])
def test_every_parameter_has_one_optimizer(images: list[np.ndarray], kind: str, names: set[str]) -> None:
    training = BaseTraining(replace(BASE, optimizer=kind), images)
    before = {name: leaf.detach().clone() for name, leaf in training.network.named_parameters()}
    training.advance()
    assert set(training.main) == names
    assert not [name for name, leaf in training.network.named_parameters() if torch.equal(leaf, before[name])]


def test_transforms_learn_at_a_rate_of_their_own(images: list[np.ndarray]) -> None:
    def moved(share: float) -> dict[str, float]:
        training = BaseTraining(replace(BASE, optimizer="adam", transform_rate=share), images)
        before = {name: leaf.detach().clone() for name, leaf in training.network.named_parameters()}
        training.advance()
        return {
            name: float((leaf.detach() - before[name]).abs().max())
            for name, leaf in training.network.named_parameters()
        }

    slow, fast = moved(0.1), moved(1.0)
    for name, distance in fast.items():
        share = 0.1 if name.startswith(("g_a", "g_s")) else 1.0
        assert slow[name] == pytest.approx(share * distance, rel=1e-3), name


@pytest.mark.parametrize("optimizer", ["muon", "adam"])
def test_two_rates_resume_bit_identically(images: list[np.ndarray], optimizer: str) -> None:
    settings = replace(BASE, optimizer=optimizer, transform_rate=0.3)
    first, second = BaseTraining(settings, images), BaseTraining(settings, images)
    first.advance()
    second.resume(first.to_bytes())
    assert first.advance() == second.advance()
    assert first.to_bytes() == second.to_bytes()


def test_a_start_at_another_rate_codes_with_the_step_that_its_rate_wants(images: list[np.ndarray]) -> None:
    """Four times λ: latents, means and scales are twice as large, and the pictures of unquantized latents the same."""
    codec = Codec.from_network(BaseTraining(BASE, images).network)
    scaled = BaseTraining(replace(BASE, lmbda=0.04), images, start=codec, start_lmbda=0.01).network
    plain, image = codec.network, torch.rand(1, 3, 128, 64)
    with torch.no_grad():
        y, doubled = plain.g_a(image), scaled.g_a(image)
        z = plain.h_a(y)
        assert torch.allclose(doubled, 2 * y, rtol=1e-4, atol=1e-5)
        assert torch.allclose(scaled.h_a(doubled), z, rtol=1e-4, atol=1e-5)
        assert torch.allclose(scaled.h_s(z), 2 * plain.h_s(z), rtol=1e-4, atol=1e-5)
        assert torch.allclose(scaled.g_s(doubled), plain.g_s(y), rtol=1e-4, atol=1e-5)


def test_training_starts_from_another_codec(images: list[np.ndarray]) -> None:
    trained = BaseTraining(BASE, images)
    trained.advance()
    codec = Codec.from_network(trained.network)
    again = BaseTraining(replace(BASE, lmbda=0.05), images, start=codec)
    ours, theirs = again.network.state_dict(), codec.network.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    again.advance()
    assert not torch.equal(again.network.g_a[0].weight, codec.network.g_a[0].weight)
    with pytest.raises(
        ValueError, match=r"train\.start: expected a codec of N = 5, M = 6, found N = 4, M = 6"
    ):
        BaseTraining(replace(BASE, N=5), images, start=codec)


def test_held_out_loss_is_that_of_the_codec_alone(images: list[np.ndarray]) -> None:
    training = BaseTraining(BASE, images)
    found = training.held_out(images)
    assert training.held_out(images) == found  # the same noise again, and nothing has been trained
    mse = 10 ** (-found["held_out_psnr_db"] / 10)
    assert found["held_out_loss"] == pytest.approx(found["held_out_bpp"] + BASE.lmbda * 255**2 * mse)
    for _ in range(BASE.steps):
        training.advance()
    assert training.held_out(images)["held_out_loss"] < found["held_out_loss"]


def test_a_checkpoint_of_another_shape_is_refused(images: list[np.ndarray]) -> None:
    other = BaseTraining(replace(BASE, N=5), images).to_bytes()
    with pytest.raises(CheckpointError, match=r"checkpoint leaf module/network/.*: expected \(.*found \("):
        BaseTraining(BASE, images).resume(other)


def test_divergence_is_told() -> None:
    with pytest.raises(DivergedError, match=r"diverged at step 7 .*: lower train\.learning_rate"):
        step_metrics(7, "train.learning_rate", loss=torch.tensor(float("nan")), mse=torch.tensor(1.0))
