"""The example of docs/format.md: a codec small enough to write down, a file of it, and how it is read, step by step.

PYTHONPATH=.:tests python tests/format_example.py      # prints the example, to paste into the document
"""

from __future__ import annotations

from functools import cache

import numpy as np
import plain_decoder
import torch

from pipeline.bitstream import ImageCoder, container
from pipeline.codec.artifact import Codec
from pipeline.codec.hyper_table import HyperTable
from pipeline.codec.hyperprior import MeanScaleHyperprior
from pipeline.codec.integer_synthesis import IntegerSynthesis
from pipeline.coding import CodedImage
from pipeline.quantizers import Settings, Tables
from pipeline.sigma import SIGMA_LEVELS

WIDTH, HEIGHT = 3, 2
SCALES, MEANS = (0.5, 2.0), (0.25, -1.0)
HYPER_ROW = (4096, 49152, 8192, 4096)  # −1, 0, 1, escape
ROWS = ((8192, 40960, 8192, 8192), (16384, 24576, 16384, 8192))  # of Q0 and Q1, in all levels
STEP = 0.5
INDICES = {(0, 0): 1, (1, 0): -1, (0, 1): 1, (1, 1): -5, (1, 2): 1}  # by channel and position; others are 0
SHOWN = 12  # steps


@cache
def example_coder() -> ImageCoder:
    """N = 1, M = 2; every weight is 0, so σ and μ are the last layer's biases, and the picture is grey."""
    network = MeanScaleHyperprior(1, 2).requires_grad_(False)
    for parameter in network.parameters():
        parameter.zero_()
    network.h_s[-1].bias.copy_(torch.tensor(SCALES + MEANS))
    network.g_s[-1].bias.fill_(0.5)
    hyper_table = HyperTable(np.array([1], np.int32), np.array(HYPER_ROW, np.uint32))
    codec = Codec(network.eval(), IntegerSynthesis.from_float(network.h_s, torch.zeros(1)), hyper_table)
    chosen = Settings("tcq", "vvc4", STEP, 0.1)
    points = chosen.lattice([0, 1]).astype(np.float32)
    tables = Tables.from_rows(chosen, [np.array(ROWS, np.uint32)] * SIGMA_LEVELS, [points] * SIGMA_LEVELS)
    return ImageCoder(codec, tables)


@cache
def example_file() -> bytes:
    """Of an image of 3 × 2 pixels."""
    hyper_indices = np.ones((1, 1, 1), np.int16)
    means, sigma_index = example_coder().codec.entropy_parameters(torch.from_numpy(hyper_indices)[None])
    indices = np.zeros((2, 16), np.int32)
    for place, k in INDICES.items():
        indices[place] = k
    coded = CodedImage(
        indices.reshape(2, 4, 4), hyper_indices, sigma_index[0].numpy(), means[0].numpy(), 0.0, 0.0, 0.0
    )
    return example_coder().encode_indices(coded, HEIGHT, WIDTH)


def example_text() -> str:
    """The file's fields and the decoder's way through its streams."""
    data = example_file()
    header, hyper, latent = container.parse(data)
    fields = [
        (data[:3], "magic, `RTL`"),
        (data[3:4], "version"),
        (data[4:8], "CRC-32"),
        (header.codec, "codec"),
        (container.varint(HEIGHT), "height"),
        (container.varint(WIDTH), "width"),
        (container.varint(len(hyper)), "hyper_bytes"),
        (container.varint(len(latent)), "latent_bytes"),
        (hyper[:5], "hyper stream: the state of its one coder"),
        (hyper[5:], "  its words"),
        (latent[:5], "latent stream: the state of coder 0"),
        (latent[5:10], "  the state of coder 1"),
        (latent[10:], "  its words"),
    ]
    assert b"".join(bytes_ for bytes_, _ in fields) == data
    lines = [f"{len(data)} bytes", *(f"  {bytes_.hex() or 'none':32}  {name}" for bytes_, name in fields)]
    codec = plain_decoder.CodecFile(example_coder().to_bytes())
    coders = plain_decoder.Coders(hyper, 1)
    coders.indices((1, 1), lambda c, t, state: codec.hyper_row(c), lambda state, k: 0)
    lines += ["", "hyper stream", *table(coders.steps)]
    trellis = plain_decoder.Trellis(codec.settings)
    coders = plain_decoder.Coders(latent, 2)
    coders.indices((2, 16), lambda c, t, state: codec.row(0, trellis.context(state)), trellis.next)
    lines += ["", f"latent stream: the first {SHOWN} of 32", *table(coders.steps[:SHOWN])]
    decoded = plain_decoder.decode(data, example_coder().to_bytes())
    lines += ["", f"σ indices {decoded.sigma_index[:, 0].tolist()}"]
    lines += [f"ŷ of channel {c}: {' '.join(f'{y:g}' for y in decoded.latent[c].ravel())}" for c in (0, 1)]
    return "\n".join([*lines, f"pixels: all {np.unique(decoded.pixels).tolist()}"])


def table(steps: list[plain_decoder.Step]) -> list[str]:
    widths = {
        "channel": 7,
        "position": 8,
        "coder's state": 13,
        "slot": 7,
        "trellis state": 13,
        "symbol": 6,
        "k": 2,
    }
    rows = [(s.channel, s.position, s.state, s.state % 65536, s.trellis, s.symbol, s.index) for s in steps]
    return [
        "".join(f"  {cell:>{width}}" for cell, width in zip(row, widths.values(), strict=True))
        for row in (widths, *rows)
    ]


if __name__ == "__main__":
    print(example_text())
