"""Encode and decode one image, beside CompressAI's compress and decompress of the very same weights.

    OMP_NUM_THREADS=2 python benchmarks/image_coding.py IMAGE [RUNS]      # in the environment of benchmarks/peers.py

N = 128, M = 192, float32, warm, in turn, medians. The network is drawn at random, since none of that size is trained
here; then every channel of y gets a spread as in a trained codec, and h_s a σ and μ that fit it, so that the number of
bits and of symbols that are not 0 is realistic. Ours goes from pixels to a file and back, checksum and
trellis search included; CompressAI's from a float tensor to strings and back.

What bounds it: g_a and g_s are 33 GFLOP each, most of it in one 5×5 convolution of 128 to 128 channels (20 GFLOP) that
oneDNN runs at the processor's peak; integer h_s is 4.2 GFLOP in float64, at its matrix products' peak too, twice.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from machine import alternately, machine
from peers import compressai

from pipeline.bitstream import ImageCoder
from pipeline.codec import inference
from pipeline.codec.artifact import Codec
from pipeline.codec.compressai import export_state_dict
from pipeline.codec.hyperprior import MeanScaleHyperprior
from pipeline.coding import code, to_pixels, to_tensor
from pipeline.pixels import canonical_pixels
from pipeline.quantizers import design, quantize, settings

N, M = 128, 192
SPREADS = np.geomspace(4, 0.03, M)
THREADS = 2


@torch.no_grad()
def network(image: torch.Tensor) -> MeanScaleHyperprior:
    """Random, with channels of y of given spreads on this image, and σ and μ about right for them."""
    made = MeanScaleHyperprior(N, M).initialise(torch.Generator().manual_seed(0)).eval()
    y = made.g_a(image)
    spread, mean = y.std((0, 2, 3)), y.mean((0, 2, 3))
    gain = torch.from_numpy(SPREADS).float() / spread
    last = made.g_a[-1]
    last.bias.sub_(mean).mul_(gain)
    last.weight.mul_(gain[:, None, None, None])
    made.h_s[-1].weight.mul_(0.1)
    made.h_s[-1].bias.copy_(torch.from_numpy(np.append(SPREADS, np.zeros(M))))
    return made.requires_grad_(False)


def profile(
    coder: ImageCoder, peer: object, image: torch.Tensor, pixels: np.ndarray
) -> tuple[dict[str, Callable[[], object]], dict[str, Callable[[], object]]]:
    """The parts, ours and theirs; each of them works on what the one before gives."""
    codec, net = coder.codec, coder.codec.network
    y, n = codec.analyse(image)
    means, sigma_index = codec.entropy_parameters(n)
    residual_CT, sigma_CT = (y - means)[0].numpy().reshape(M, -1), sigma_index[0].numpy().reshape(M, -1)
    coded = code(codec, coder.tables, pixels)
    data = coder.encode_indices(coded, *pixels.shape[:2])
    latent = torch.from_numpy(coded.latent)[None]
    z, conditional = peer.h_a(y), peer.gaussian_conditional
    scales, peer_means = peer.h_s(z).chunk(2, 1)
    index = conditional.build_indexes(scales)
    strings = conditional.compress(y, index, means=peer_means)
    return {
        "g_a": lambda: inference.analyse(net.g_a, image),
        "h_a": lambda: inference.hyper_analyse(net.h_a, y),
        "integer h_s (encoder and decoder)": lambda: codec.entropy_parameters(n),
        "search, reconstruction, bits": lambda: quantize(residual_CT, sigma_CT, coder.tables),
        "entropy coding to a file": lambda: coder.encode_indices(coded, *pixels.shape[:2]),
        "file to latents, integer h_s included": lambda: coder.decode_indices(data),
        "g_s, pixels": lambda: to_pixels(codec.synthesise(latent)),
    }, {
        "CompressAI g_a": lambda: peer.g_a(image),
        "CompressAI h_a": lambda: peer.h_a(y),
        "CompressAI h_s (encoder and decoder)": lambda: peer.h_s(z),
        "CompressAI indexes (encoder and decoder)": lambda: conditional.build_indexes(scales),
        "CompressAI entropy coding of y": lambda: conditional.compress(y, index, means=peer_means),
        "CompressAI entropy decoding of y": lambda: conditional.decompress(strings, index, means=peer_means),
        "CompressAI g_s": lambda: peer.g_s(latent),
    }


@torch.inference_mode()
def main(path: str, runs: int = 9) -> None:
    torch.set_num_threads(THREADS)
    pixels = canonical_pixels(Path(path).read_bytes())
    image = to_tensor(pixels)
    assert not any(side % 64 for side in image.shape[2:]), (
        "an image of a multiple of 64, so that none of both pads"
    )
    made = network(image)
    coder = ImageCoder(Codec.from_network(made), design(settings("tcq")))
    peer = compressai("models").MeanScaleHyperprior(N, M)
    peer.load_state_dict(export_state_dict(made))
    peer.eval()
    data, packed = coder.encode(pixels), peer.compress(image)
    size = 8 / (image.shape[2] * image.shape[3])
    theirs = sum(len(strings[0]) for strings in packed["strings"])
    print(machine("torch", "numpy", "numba", "compressai"), f"{torch.get_num_threads()} threads", sep=", ")
    print(
        f"{Path(path).name}, {pixels.shape[1]} × {pixels.shape[0]}, N = {N}, M = {M}: ours {len(data) * size:.3f} bpp "
        f"(tcq, vvc8), CompressAI's {theirs * size:.3f} bpp; median of {runs} runs in turn, milliseconds\n"
    )
    seconds = alternately(
        {
            "encode": lambda: coder.encode(pixels),
            "compress": lambda: peer.compress(image),
            "decode": lambda: coder.decode(data),
            "decompress": lambda: peer.decompress(packed["strings"], packed["shape"]),
        },
        runs,
    )
    print(f"{'':12} {'ours':>8} {'CompressAI':>11} {'ratio':>7}")
    row("encode", seconds["encode"], seconds["compress"])
    row("decode", seconds["decode"], seconds["decompress"])
    row("both", seconds["encode"] + seconds["decode"], seconds["compress"] + seconds["decompress"])
    print("\nWhere the time goes, each part by itself:")
    for parts in profile(coder, peer, image, pixels):
        for name, times in alternately(parts, runs).items():
            print(f"  {name:45} {1e3 * np.median(times):8.1f}")


def row(name: str, ours: np.ndarray, theirs: np.ndarray) -> None:
    print(
        f"{name:12} {1e3 * np.median(ours):8.1f} {1e3 * np.median(theirs):11.1f} {np.median(theirs / ours):7.2f}"
    )


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:3]))
