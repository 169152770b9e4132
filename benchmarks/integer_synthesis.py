"""What integer hyper synthesis costs: σ indices and means in integers, against the same network in float32.

    python benchmarks/integer_synthesis.py CHECKPOINT FOLDER

Both paths snap σ to the 64 levels, take the same rounded hyper latents, and pay the ideal code length of the residual's
uniform quantization (Δ = 1) by the same integer tables; hyper bits are the same too. So the difference is the cost of
integers alone. The float path stands for a format that would only decode on the machine that wrote it.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from machine import machine

from jobs.import_codec import read_codec
from pipeline.codec.contract import pad
from pipeline.coding import to_tensor
from pipeline.pixels import canonical_pixels
from pipeline.quantizers import design, quantize, settings
from pipeline.sigma import sigma_midpoints


@torch.inference_mode()
def main(checkpoint: str, folder: str) -> None:
    codec, tables = read_codec(Path(checkpoint).read_bytes()), design(settings("urq"))
    medians, h_s = codec.network.entropy_bottleneck.medians[:, None, None], codec.network.h_s
    print(machine("torch", "numpy"))
    print(f"{Path(checkpoint).name}, {Path(folder).name}\n")
    print(
        f"{'image':12} {'bits, float':>12} {'bits, integer':>13} {'cost':>9} {'σ indices':>10} {'largest Δμ':>11}"
    )
    totals = []
    for path in sorted(Path(folder).iterdir()):
        y, n = codec.analyse(pad(to_tensor(canonical_pixels(path.read_bytes())), codec.stride))
        means, sigma_index = codec.entropy_parameters(n)
        scales, float_means = h_s(n + medians).chunk(2, 1)
        float_index = np.searchsorted(sigma_midpoints(), scales.numpy().astype(np.float64)).astype(np.uint8)
        channels = y.shape[1]
        bits = [
            float(
                quantize(
                    (y - mu).numpy().reshape(channels, -1), index.reshape(channels, -1), tables
                ).bits.sum()
            )
            for mu, index in ((float_means, float_index), (means, sigma_index.numpy()))
        ]
        hyper = float(codec.hyper_bits(n)[0])
        differ = (float_index != sigma_index.numpy()).sum()
        totals.append((bits[0] + hyper, bits[1] + hyper, differ, sigma_index.numel()))
        row(path.stem, *totals[-1], f"{float((means - float_means).abs().max()):11.2e}")
    row("all", *np.sum(totals, 0))


def row(name: str, floating: float, integer: float, differ: float, of: float, end: str = "") -> None:
    print(
        f"{name:12} {floating:12.0f} {integer:13.0f} {integer / floating - 1:+9.4%} {differ / of:10.4%} {end}"
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
