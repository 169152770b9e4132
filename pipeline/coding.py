"""One image through a codec and a quantizer, and back: what `quantize`, `finetune` and `evaluate` share.

Whole images, float32, batch 1: on patches up to half of the σ indices would differ from those of the whole image.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from pipeline.codec.artifact import Codec
from pipeline.codec.contract import pad
from pipeline.quantizers import Tables, contexts, dequantize, quantize
from pipeline.refinement import Refinement, refine

Pixels = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class CodedImage:
    """What a bitstream would carry, what it costs, and how far ŷ is from y.

    Attributes:
        indices: int32 (M, h, w). hyper_indices: int16 (N, h/4, w/4).
        sigma_index: uint8 (M, h, w), which level's tables code each index.
        latent: ŷ, float32 (M, h, w).
        channel_bits: float64 (M,), ideal code lengths by the integer frequencies, escapes included.
        bits_z: the same of the hyper indices.
        squared_error: Σ(ŷ − y)² over all latents.
    """

    indices: npt.NDArray[np.int32]
    hyper_indices: npt.NDArray[np.int16]
    sigma_index: npt.NDArray[np.uint8]
    latent: Floats
    channel_bits: npt.NDArray[np.float64]
    bits_z: float
    squared_error: float

    @property
    def bits_y(self) -> float:
        """Of all channels."""
        return float(np.sum(self.channel_bits))


@dataclass(frozen=True)
class Analysed:
    """The encoder's view: y, μ (float32), σ index (uint8), each (M, h, w); hyper indices int16 (N, h/4, w/4)."""

    latent: Floats
    means: Floats
    sigma_index: npt.NDArray[np.uint8]
    hyper_indices: npt.NDArray[np.int16]


def to_tensor(pixels_HWC: Pixels) -> torch.Tensor:
    """uint8 (H, W, 3) -> float32 (1, 3, H, W) in [0, 1]."""
    return torch.from_numpy(np.array(pixels_HWC)).permute(2, 0, 1)[None].float().div_(255)


def to_pixels(image_BCHW: torch.Tensor) -> Pixels:
    """float32 (1, 3, H, W) -> uint8 (H, W, 3): clipped to [0, 1] and rounded to 8 bits."""
    rounded = image_BCHW[0].clamp(0, 1).mul(255).round().to(torch.uint8)
    return np.ascontiguousarray(rounded.permute(1, 2, 0).numpy())


@torch.inference_mode()
def analyse(codec: Codec, pixels_HWC: Pixels) -> Analysed:
    """y, and what the decoder will know of it."""
    y, hyper_indices = codec.analyse(pad(to_tensor(pixels_HWC), codec.stride))
    means, sigma_index = codec.entropy_parameters(hyper_indices)
    return Analysed(y[0].numpy(), means[0].numpy(), sigma_index[0].numpy(), hyper_indices[0].numpy())


@torch.inference_mode()
def code(
    codec: Codec, tables: Tables, pixels_HWC: Pixels, refinement: Refinement | None = None
) -> CodedImage:
    """Encode one image as far as its indices, with the effort of a refinement where one is given."""
    a = analyse(codec, pixels_HWC)
    shape = a.latent.shape
    flat = (shape[0], -1)
    if refinement is None:
        quantized = quantize((a.latent - a.means).reshape(flat), a.sigma_index.reshape(flat), tables)
    else:
        latents = a.latent, a.means, a.sigma_index
        quantized = refine(codec, tables, to_tensor(pixels_HWC), *latents, refinement)
    latent = a.means + quantized.reconstruction.reshape(shape)
    return CodedImage(
        indices=quantized.indices.reshape(shape),
        hyper_indices=a.hyper_indices,
        sigma_index=a.sigma_index,
        latent=latent,
        channel_bits=quantized.bits,
        bits_z=float(codec.hyper_bits(torch.from_numpy(a.hyper_indices)[None])[0]),
        squared_error=float(np.square(latent - a.latent, dtype=np.float64).sum()),
    )


@torch.inference_mode()
def decode_latent(
    codec: Codec, tables: Tables, indices: npt.NDArray[np.integer], hyper_indices: npt.NDArray[np.integer]
) -> Floats:
    """ŷ, float32 (M, h, w), from what a bitstream carries; equal to the encoder's bit for bit."""
    means, sigma_index = codec.entropy_parameters(torch.from_numpy(hyper_indices.astype(np.int16))[None])
    flat = (indices.shape[0], -1)
    residual = dequantize(
        indices.astype(np.int32).reshape(flat), sigma_index[0].numpy().reshape(flat), tables
    )
    latent: Floats = means[0].numpy() + residual.reshape(indices.shape)
    return latent


@torch.inference_mode()
def scale_inputs(
    codec: Codec, tables: Tables, indices: npt.NDArray[np.integer], hyper_indices: npt.NDArray[np.integer]
) -> tuple[npt.NDArray[np.uint8], Floats]:
    """What training the scale rows needs: contexts uint8 (M, h, w), features of h_s float32 (3M/2, h, w)."""
    context = contexts(indices.astype(np.int32).reshape(indices.shape[0], -1), tables)
    features = codec.hyper_features(torch.from_numpy(hyper_indices.astype(np.int16))[None])
    return context.reshape(indices.shape), features[0].numpy()


@torch.inference_mode()
def synthesise(codec: Codec, latent: Floats, height: int, width: int) -> Pixels:
    """x̂ of ŷ, clipped, rounded to 8 bits and cropped to the image: uint8 (height, width, 3)."""
    return to_pixels(codec.synthesise(torch.from_numpy(latent)[None]))[:height, :width]
