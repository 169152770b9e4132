"""What the stages after training ask of a codec. A network of your own takes part by fulfilling `CodecContract`.

Suffixes: B batch; C channels, M of a latent and N of a hyper latent; H and W height and width of a padded image;
h and w those of its latents (H / 16, W / 16 for ours); u and v those of its hyper latents (H / 64, W / 64 for ours).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple, Protocol, Self, TypeVar

from torch import Tensor, nn
from torch.nn import functional


class Analysis(NamedTuple):
    """Latents y, float32 (B, M, h, w), and hyper indices n, int16 (B, N, u, v), whose minimum never occurs."""

    y: Tensor
    hyper_indices: Tensor


class EntropyParameters(NamedTuple):
    """Means μ, float32 (B, M, h, w), exact; and σ indices, uint8 (B, M, h, w), 0 … 63."""

    means: Tensor
    sigma_index: Tensor


class Digests(NamedTuple):
    """Three SHA-256 digests in hexadecimal.

    codec: all bytes of the checkpoint.
    grid: what decides what indices mean: analysis, medians, hyper synthesis up to the means.
    rate: what decides which indices were chosen and what they cost: σ, its thresholds, the hyper table.
    """

    codec: str
    grid: str
    rate: str


class DecoderContract(Protocol):
    """A decoder side in training: a torch module with the parts of a codec that finetuning may change."""

    def synthesise(self, y_hat_BCHW: Tensor, *, mixed: bool = False) -> Tensor:
        """x̂ as float32 (B, 3, H, W), differentiable; `mixed` allows bfloat16 where it costs little."""
        ...

    def scales(self, features_BCHW: Tensor) -> Tensor:
        """Continuous σ ≥ 0.11, float32 (B, M, h, w), from `CodecContract.hyper_features`; differentiable."""
        ...

    def decoder_parameters(self) -> Iterable[nn.Parameter]:
        """What `parts: decoder` trains; no digest but `codec` depends on it."""
        ...

    def scale_parameters(self) -> Iterable[nn.Parameter]:
        """What `parts: decoder+scale` trains besides; the `grid` digest must not depend on it."""
        ...


Side = TypeVar("Side", bound=DecoderContract)


class CodecContract(Protocol[Side]):
    """A finished codec; `Side` is its own kind of decoder side.

    Everything runs in float32 without autocast or TF32, in contiguous format.

    Attributes:
        stride: height and width of images must be multiples of it (see `pad`).
        latent_channels: M.
    """

    @property
    def stride(self) -> int: ...

    @property
    def latent_channels(self) -> int: ...

    def pad(self, image_BCHW: Tensor) -> Tensor:
        """Images padded by the function `pad` to multiples of `stride`."""
        ...

    def analyse(self, image_BCHW: Tensor) -> Analysis:
        """Latents and hyper indices of padded images, float32 (B, 3, H, W) in [0, 1]."""
        ...

    def entropy_parameters(self, hyper_indices_BNUV: Tensor) -> EntropyParameters:
        """Means and σ indices, bit-identical on every machine, device, batch and number of threads."""
        ...

    def hyper_bits(self, hyper_indices_BNUV: Tensor) -> Tensor:
        """Bits of the hyper indices from integer frequencies, float64 (B,), on the CPU."""
        ...

    def hyper_features(self, hyper_indices_BNUV: Tensor) -> Tensor:
        """What `DecoderContract.scales` computes σ from, float32 (B, ·, h, w); never changed by finetuning."""
        ...

    def synthesise(self, y_hat_BCHW: Tensor) -> Tensor:
        """x̂, unclipped float32 (B, 3, H, W), from latents float32 (B, M, h, w)."""
        ...

    def decoder_side(self) -> Side:
        """A copy, to train, of the parts that finetuning may change."""
        ...

    def refined(self, side: Side) -> Self:
        """This codec with the parts of a finetuned decoder side; everything else stays bit-identical."""
        ...

    def to_bytes(self) -> bytes:
        """The checkpoint, the same bytes for the same codec."""
        ...

    def digests(self) -> Digests:
        """Digests of the whole, of the grid and of the rate side."""
        ...


def pad(image_BCHW: Tensor, stride: int) -> Tensor:
    """Repeat the last row and column until height and width are multiples of `stride`.

    This is the rule at inference, in quantization and in evaluation: padding is on the right and the bottom only, so
    `crop` needs nothing but the original size.
    """
    height, width = image_BCHW.shape[-2:]
    return functional.pad(image_BCHW, (0, -width % stride, 0, -height % stride), mode="replicate")


def crop(image_BCHW: Tensor, height: int, width: int) -> Tensor:
    """Undo `pad`: the upper left `height` × `width` pixels."""
    return image_BCHW[..., :height, :width]
