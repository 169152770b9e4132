"""One image, analysed once and judged as a picture many times: what tuning asks of a codec."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from pipeline.codec.artifact import Codec
from pipeline.coding import Pixels, analyse
from pipeline.quantizers.refine import Residuals
from pipeline.quantizers.tuning import Sample


def sample(codec: Codec, pixels_HWC: Pixels) -> Sample:
    """Analyse an image, uint8 (H, W, 3), for tuning."""
    seen = analyse(codec, pixels_HWC)
    height, width, _ = pixels_HWC.shape
    flat = (seen.means.shape[0], -1)
    wanted = torch.from_numpy(pixels_HWC).permute(2, 0, 1)

    @torch.inference_mode()
    def distortion(reconstruction_CT: npt.NDArray[np.float32]) -> float:
        latent = torch.from_numpy(seen.means + reconstruction_CT.reshape(seen.means.shape))
        picture = codec.synthesise(latent[None])[0, :, :height, :width].clamp(0, 1).mul(255)
        return float((picture - wanted).square().mean(dtype=torch.float64))

    return Sample(
        latents=Residuals((seen.latent - seen.means).reshape(flat), seen.sigma_index.reshape(flat)),
        distortion=distortion,
        side_bits=float(codec.hyper_bits(torch.from_numpy(seen.hyper_indices)[None])[0]),
        pixels=height * width,
    )
