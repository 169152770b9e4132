"""A finished codec: float network, integer hyper synthesis, integer hyper table; and its checkpoint.

A checkpoint is one safetensors file: the network's leaves (`network.…`), the integers that coding uses (`integer.…`,
`hyper_table.…`), and one JSON value of metadata, so its bytes are a function of the codec alone. A network whose every
weight is a bfloat16 number is stored as such, in half the space; others as float32.
Suffixes: as in `pipeline.codec.contract`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from pipeline.codec import contract, inference, integer_synthesis
from pipeline.codec.contract import Analysis, CodecContract, Digests, EntropyParameters
from pipeline.codec.decoder_side import DecoderSide
from pipeline.codec.hyper_table import HyperTable
from pipeline.codec.hyperprior import MeanScaleHyperprior
from pipeline.codec.integer_synthesis import HYPER_LIMIT, IntegerSynthesis

ARCHITECTURE = "mean-scale-hyperprior"
FORMAT_VERSION = 1
METADATA_KEY = "retrellis"
STRIDE = 64
CHANNELS_MAX = 4096
FIXED_POINT = {
    "fraction_bits": integer_synthesis.FRACTION_BITS,
    "integer_bits": integer_synthesis.INTEGER_BITS,
    "means_fraction_bits": integer_synthesis.MEANS_FRACTION_BITS,
    "scales_fraction_bits": integer_synthesis.SCALES_FRACTION_BITS,
}
GRID_LEAVES = ("network.g_a.", "network.h_a.", "medians", "integer.medians", "integer.trunk", "integer.means")
RATE_LEAVES = ("integer.scales", "integer.thresholds", "hyper_table.")


@dataclass(frozen=True, eq=False)
class Codec:
    """A mean-scale hyperprior ready for quantization and evaluation; fulfils `CodecContract`.

    Attributes:
        network: float32, evaluation mode, contiguous; not to be changed (finetune a `decoder_side()`).
        synthesis: hyper synthesis in integers; what coding uses in place of the network's h_s.
        hyper_table: integer frequencies of the hyper indices.
    """

    network: MeanScaleHyperprior
    synthesis: IntegerSynthesis
    hyper_table: HyperTable

    @classmethod
    def from_network(cls, network: MeanScaleHyperprior, *, rounded: bool = False) -> Self:
        """Finalise a trained network: copy it, round its hyper synthesis and its prior to integers.

        Args:
            rounded: first round every weight to bfloat16, which halves the checkpoint.

        Raises:
            ValueError: a parameter that is not finite, or too large for exact integers; names it.
        """
        state = network.state_dict()
        if rounded:
            state = {name: leaf.bfloat16() for name, leaf in state.items()}
        copy = _network_from(network.N, network.M, state)
        synthesis = IntegerSynthesis.from_float(copy.h_s, copy.entropy_bottleneck.medians)
        return cls(copy, synthesis, HyperTable.from_prior(copy.entropy_bottleneck))

    @property
    def stride(self) -> int:
        """Images are padded to multiples of 64."""
        return STRIDE

    @property
    def latent_channels(self) -> int:
        """M."""
        return self.network.M

    def pad(self, image_BCHW: Tensor) -> Tensor:
        """Repeat the last row and column until height and width are multiples of 64."""
        return contract.pad(image_BCHW, STRIDE)

    @torch.no_grad()
    def analyse(self, image_BCHW: Tensor) -> Analysis:
        """Latents and hyper indices n = round(z − median), |n| ≤ 4095, of padded images.

        Args:
            image_BCHW: float32 (B, 3, H, W) in [0, 1], H and W multiples of 64 (`contract.pad`).

        Raises:
            ValueError: another shape or type, or latents that are not finite.
        """
        _check_image(image_BCHW)
        with strict_float32(image_BCHW.device):
            y = inference.analyse(self.network.g_a, image_BCHW)
            z = inference.hyper_analyse(self.network.h_a, y)
        if not (torch.isfinite(y).all() and torch.isfinite(z).all()):
            raise ValueError(
                "expected finite latents, found NaN or infinity: check the image and the codec's training"
            )
        n = torch.round(z - self.network.entropy_bottleneck.medians[:, None, None])
        return Analysis(y, n.clamp(-HYPER_LIMIT, HYPER_LIMIT).to(torch.int16))

    @torch.no_grad()
    def entropy_parameters(self, hyper_indices_BNUV: Tensor) -> EntropyParameters:
        """Means, float32, and σ indices, uint8, both (B, M, 4u, 4v), in exact integers: equal everywhere."""
        return self.synthesis(hyper_indices_BNUV)

    def hyper_bits(self, hyper_indices_BNUV: Tensor) -> Tensor:
        """Bits of the hyper indices of each image from the integer table, escapes included; float64 (B,)."""
        return self.hyper_table.bits(hyper_indices_BNUV)

    @torch.no_grad()
    def hyper_features(self, hyper_indices_BNUV: Tensor) -> Tensor:
        """Input of h_s's last layer as the integer synthesis sees it; float32 (B, 3M/2, 4u, 4v)."""
        return self.synthesis.features(hyper_indices_BNUV)

    @torch.no_grad()
    def synthesise(self, y_hat_BCHW: Tensor) -> Tensor:
        """x̂ = g_s(ŷ), unclipped: float32 (B, M, h, w) -> float32 (B, 3, 16h, 16w)."""
        with strict_float32(y_hat_BCHW.device):
            return inference.synthesise(self.network.g_s, y_hat_BCHW.float())

    def decoder_side(self) -> DecoderSide:
        """A copy of g_s and the scale rows, to train."""
        return DecoderSide(self.network)

    def refined(self, side: DecoderSide) -> Self:
        """This codec with a finetuned g_s and scale rows; grid, hyper table and thresholds stay bit-identical.

        Raises:
            ValueError: a finetuned parameter that is not finite, or too large for exact integers.
        """
        M = self.network.M
        state = {name: leaf.detach().cpu().clone() for name, leaf in self.network.state_dict().items()}
        state |= {f"g_s.{name}": leaf for name, leaf in side.g_s.state_dict().items()}
        last = f"h_s.{len(self.network.h_s) - 1}"
        for name, rows in side.scale_rows.state_dict().items():
            state[f"{last}.{name}"][:M] = rows.cpu()
        network = _network_from(self.network.N, M, state)
        synthesis = self.synthesis.to("cpu").with_scale_rows(network.h_s)
        return replace(self, network=network, synthesis=synthesis).to(self.synthesis.medians.device)

    def to(self, device: torch.device | str) -> Self:
        """The same codec on `device`; this one stays where it is."""
        state = {name: leaf.to(device) for name, leaf in self.network.state_dict().items()}
        network = _empty_network(self.network.N, self.network.M)
        network.load_state_dict(state, assign=True)
        return replace(self, network=network, synthesis=self.synthesis.to(device))

    def to_bytes(self) -> bytes:
        """The checkpoint as safetensors; equal codecs give equal bytes."""
        tensors = self._tensors()
        narrow = {name: leaf.bfloat16() for name, leaf in tensors.items() if name.startswith("network.")}
        if all(torch.equal(leaf.float(), tensors[name]) for name, leaf in narrow.items()):
            tensors |= narrow
        data: bytes = safetensors.torch.save(tensors, {METADATA_KEY: self._metadata()})
        return data

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Read a checkpoint; nothing is unpickled, and every name, shape, type and integer bound is checked.

        Without any of its integer leaves it is complete too: they follow from the weights, by exact arithmetic.

        Raises:
            ValueError: not such a checkpoint, another format version, or a leaf that is missing, unknown,
                misshapen or damaged; names the leaf, what was expected and what was found.
        """
        metadata = _read_metadata(data)
        try:
            tensors = safetensors.torch.load(data)
        except SafetensorError as error:
            raise ValueError(f"damaged codec checkpoint: {error}; copy or train it again") from error
        N, M = metadata["N"], metadata["M"]
        has_integers = any(name.startswith("integer.") for name in tensors)
        _check_leaves(tensors, N, M, has_integers)
        state = {
            name.removeprefix("network."): leaf
            for name, leaf in tensors.items()
            if name.startswith("network.")
        }
        network = _network_from(N, M, state)
        if has_integers:
            synthesis = IntegerSynthesis.from_tensors(tensors)
        else:
            synthesis = IntegerSynthesis.from_float(network.h_s, network.entropy_bottleneck.medians)
        return cls(network, synthesis, HyperTable.from_tensors(tensors))

    def digests(self) -> Digests:
        """Digests of the checkpoint, of what indices mean (grid), and of how they were chosen (rate).

        The grid holds the floats of analysis (g_a, h_a, medians) and the *integers* of hyper synthesis: the float h_s
        takes no part in coding. A finetuned g_s changes `codec` alone, changed scale rows `codec` and `rate`.
        """
        leaves = self._tensors() | {"medians": self.network.entropy_bottleneck.medians.cpu()}
        return Digests(
            codec=hashlib.sha256(self.to_bytes()).hexdigest(),
            grid=_digest(leaves, GRID_LEAVES, self._metadata()),
            rate=_digest(leaves, RATE_LEAVES, self._metadata()),
        )

    def _tensors(self) -> dict[str, Tensor]:
        leaves = (
            {f"network.{name}": leaf for name, leaf in self.network.state_dict().items()}
            | self.synthesis.tensors()
            | self.hyper_table.tensors()
        )
        return {name: leaf.cpu().contiguous() for name, leaf in leaves.items()}

    def _metadata(self) -> str:
        fields = {
            "version": FORMAT_VERSION,
            "architecture": ARCHITECTURE,
            "N": self.network.N,
            "M": self.network.M,
            "fixed_point": FIXED_POINT,
        }
        return json.dumps(fields, sort_keys=True, separators=(",", ":"))


@contextmanager
def strict_float32(device: torch.device) -> Iterator[None]:
    """Run convolutions in full float32: no autocast, no TF32, no algorithm chosen by timing."""
    with (
        torch.autocast(device.type, enabled=False),
        torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False),
    ):
        yield


def _check_image(image: Tensor) -> None:
    shape = tuple(image.shape)
    if image.dtype != torch.float32 or len(shape) != 4 or shape[1] != 3:
        raise ValueError(f"expected images as float32 (B, 3, H, W), found {image.dtype} {shape}")
    if shape[2] % STRIDE or shape[3] % STRIDE or 0 in shape:
        raise ValueError(
            f"expected height and width in multiples of {STRIDE}, found {shape}: pad the images first"
        )


def _empty_network(N: int, M: int) -> MeanScaleHyperprior:
    """A network without memory: names, shapes and types only."""
    with torch.device("meta"):
        return MeanScaleHyperprior(N, M).eval()


def _network_from(N: int, M: int, state: Mapping[str, Tensor]) -> MeanScaleHyperprior:
    """A network of contiguous float32 copies on the CPU, in evaluation mode, no gradients.

    Raises:
        ValueError: names the first leaf that is not finite.
    """
    copies = {}
    for name, leaf in state.items():
        if not torch.isfinite(leaf).all():
            raise ValueError(
                f"{name}: expected finite parameters, found NaN or infinity; the training diverged"
            )
        copies[name] = leaf.detach().to("cpu", torch.float32).clone(memory_format=torch.contiguous_format)
    network = _empty_network(N, M)
    network.load_state_dict(copies, assign=True)
    return network.requires_grad_(False)


def _read_metadata(data: bytes) -> dict[str, Any]:
    """The checked metadata of a checkpoint's header."""
    try:
        length = int.from_bytes(data[:8], "little")
        metadata = json.loads(json.loads(data[8 : 8 + length])["__metadata__"][METADATA_KEY])
        version = metadata["version"]
        found = {key: metadata[key] for key in ("architecture", "fixed_point")}
        channels = metadata["N"], metadata["M"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(
            "not a codec checkpoint: expected safetensors with `retrellis` metadata; import foreign ones"
        ) from error
    if type(version) is not int or version != FORMAT_VERSION:  # JSON's true equals 1
        raise ValueError(
            f"expected a codec of format version {FORMAT_VERSION}, found {version!r}: use a matching release"
        )
    if found != (expected := {"architecture": ARCHITECTURE, "fixed_point": FIXED_POINT}):
        raise ValueError(f"expected a codec with {expected}, found {found}")
    if not all(type(count) is int and 1 <= count <= CHANNELS_MAX for count in channels):
        raise ValueError(f"expected N and M between 1 and {CHANNELS_MAX}, found {channels}")
    checked: dict[str, Any] = metadata
    return checked


def _check_leaves(tensors: Mapping[str, Tensor], N: int, M: int, has_integers: bool) -> None:
    """Compare names, shapes and types with those of a codec of N and M channels."""
    expected = integer_synthesis.expected_leaves(N, M) if has_integers else {}
    expected |= {
        f"network.{name}": (leaf.dtype, tuple(leaf.shape))
        for name, leaf in _empty_network(N, M).state_dict().items()
    }
    expected["hyper_table.limits"] = (torch.int32, (N,))
    frequencies = tensors.get("hyper_table.frequencies")
    # Their number depends on the limits and is checked with them.
    expected["hyper_table.frequencies"] = (
        torch.int32,
        (0,) if frequencies is None else (frequencies.numel(),),
    )
    for name, (dtype, shape) in expected.items():
        if name not in tensors:
            raise ValueError(f"{name}: expected {dtype} {shape}, found nothing; the checkpoint is incomplete")
        found = tensors[name]
        stored = {dtype, torch.bfloat16} if name.startswith("network.") else {dtype}
        if found.dtype not in stored or tuple(found.shape) != shape:
            raise ValueError(f"{name}: expected {dtype} {shape}, found {found.dtype} {tuple(found.shape)}")
    if unknown := sorted(tensors.keys() - expected.keys()):
        raise ValueError(f"{unknown[0]}: unknown leaf in a {ARCHITECTURE} checkpoint of N = {N}, M = {M}")


def _digest(leaves: Mapping[str, Tensor], prefixes: tuple[str, ...], metadata: str) -> str:
    """SHA-256 over the metadata and (name, type, shape, bytes) of the leaves whose names start so."""
    digest = hashlib.sha256(metadata.encode())
    for name in sorted(name for name in leaves if name.startswith(prefixes)):
        leaf = leaves[name].contiguous()
        digest.update(json.dumps([name, str(leaf.dtype), list(leaf.shape)]).encode())
        digest.update(leaf.numpy().tobytes())
    return digest.hexdigest()


if TYPE_CHECKING:
    _fulfilled: type[CodecContract[DecoderSide]] = Codec
