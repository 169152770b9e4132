"""docs/format.md: a decoder written from it alone reads our files, its tables are ours, its example is true."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import plain_decoder
import pytest
import torch
from format_example import HYPER_ROW, ROWS, example_file, example_text
from hostile_files import M, N, padded, photograph, small_codec, small_coder

from pipeline.bitstream import ImageCoder, container
from pipeline.codec.integer_synthesis import HYPER_LIMIT
from pipeline.coding import CodedImage
from pipeline.quantizers import Settings, settings
from pipeline.quantizers.lloyd import midpoint_tables
from pipeline.quantizers.tables import FORMAT_VERSION, MAX_INDEX
from pipeline.quantizers.trellis import TRELLISES

DOCUMENT = (Path(__file__).parents[1] / "docs" / "format.md").read_text()
CHOSEN = (
    settings("urq"),
    settings("deadzone"),
    settings("tcq", "vvc8"),
    settings("tcq", "vvc8", context="state"),
    settings("tcq", "ungerboeck4"),
    settings("tcq", "ungerboeck32"),
)


def coder_of(chosen: Settings) -> ImageCoder:
    return ImageCoder(small_codec(), midpoint_tables(chosen))


@pytest.mark.parametrize("chosen", CHOSEN, ids=lambda s: f"{s.kind} {s.trellis} {s.context}")
def test_a_decoder_written_from_the_document_reads_our_files(chosen: Settings) -> None:
    coder = coder_of(chosen)
    data = coder.encode(photograph(70, 40))
    found, ours = plain_decoder.decode(data, coder.to_bytes()), coder.decode_indices(data)
    assert np.array_equal(found.hyper_indices, ours.hyper_indices.reshape(N, -1))
    assert np.array_equal(found.indices, ours.indices.reshape(M, -1))
    assert np.array_equal(found.latent, ours.latent)
    assert found.pixels.shape == (70, 40, 3)
    assert np.abs(found.pixels.astype(int) - coder.decode(data)).max() <= 1


def test_a_codec_file_that_others_serialised_keeps_its_own_digest() -> None:
    """The mark in an image file is of the codec file's bytes, whoever wrote them; they are handed on as they are."""
    codec_file = padded(small_coder().to_bytes())
    coder = ImageCoder.from_bytes(codec_file)
    assert coder.to_bytes() == codec_file
    assert coder.digest == hashlib.sha256(codec_file).hexdigest() != small_coder().digest
    data = coder.encode(photograph(70, 40))
    assert container.parse(data)[0].codec.hex() == coder.digest[:16]
    found = plain_decoder.decode(data, codec_file)
    assert np.array_equal(found.latent, ImageCoder.from_bytes(codec_file).decode_indices(data).latent)


@pytest.mark.parametrize("chosen", CHOSEN, ids=lambda s: f"{s.kind} {s.trellis} {s.context}")
def test_it_reads_indices_that_no_image_has(chosen: Settings) -> None:
    """Escapes of every length, the largest indices there are, negative ones, several columns of hyper latents."""
    coder, rng = coder_of(chosen), np.random.default_rng(0)
    indices, hyper = (
        np.rint(rng.choice([-1, 1], shape) * 2 ** rng.uniform(0, np.log2(limit), shape)).astype(int)
        for shape, limit in (((M, 4, 8), MAX_INDEX), ((N, 1, 2), HYPER_LIMIT))
    )
    indices[0, 0, :2], hyper[0, 0] = (MAX_INDEX, -MAX_INDEX), (HYPER_LIMIT, -HYPER_LIMIT)
    hyper = hyper.astype(np.int16)
    means, sigma_index = coder.codec.entropy_parameters(torch.from_numpy(hyper)[None])
    coded = CodedImage(indices.astype(np.int32), hyper, sigma_index[0].numpy(), means[0].numpy(), 0, 0, 0)
    data = coder.encode_indices(coded, 64, 128)
    found = plain_decoder.decode(data, coder.to_bytes())
    assert np.array_equal(found.hyper_indices, hyper.reshape(N, -1))
    assert np.array_equal(found.indices, indices.reshape(M, -1))
    assert np.array_equal(found.latent, coder.decode_indices(data).latent)


def test_the_example_is_true() -> None:
    assert container.parse(example_file())[0].bytes == 20
    assert f"```text\n{example_text()}\n```" in DOCUMENT, "python tests/format_example.py prints it anew"
    for row in (HYPER_ROW, *ROWS):
        assert ", ".join(map(str, row)) in DOCUMENT


def test_versions_and_machines_are_ours() -> None:
    assert f"This is version {container.VERSION} of the format" in DOCUMENT
    assert f"`tables` holds `version` ({FORMAT_VERSION})" in DOCUMENT
    for name in ("vvc4", "vvc8", "ungerboeck4", "ungerboeck8"):
        pairs = ", ".join(" ".join(map(str, pair)) for pair in TRELLISES[name].next_state.tolist())
        assert f"| `{name}` | {pairs} |" in DOCUMENT
    for name, trellis in TRELLISES.items():
        plain = plain_decoder.Trellis({"trellis": name, "context": "state"})
        assert (plain.table, plain.quantizer) == (trellis.next_state.tolist(), trellis.quantizer.tolist())


def test_the_other_decoder_imports_nothing_of_ours() -> None:
    text = Path(plain_decoder.__file__).read_text()
    assert not any(
        f"{word} {package}" in text for word in ("import", "from") for package in ("pipeline", "jobs")
    )
