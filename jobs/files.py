"""encode, decode, info: images to files and back, many at once; and the codec files that these need.

A file that fails does not keep the others from being done: each error names its file, and the exit code is 1.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from pipeline import shipped
from storage.durable import write_file
from storage.errors import StorageError
from storage.workspace import Workspace

if TYPE_CHECKING:
    from pipeline.bitstream import ImageCoder
    from pipeline.codec.artifact import Codec
    from pipeline.refinement import Refinement

    CoderOf = Callable[[bytes], ImageCoder]  # the coder of an image file

SUFFIX = ".rtl"
DECODED_SUFFIX = ".png"
SAMPLE_BYTES = 8  # of a pixel, uncompressed: four samples of 16 bits
IMAGE_SLACK = 1 << 26  # bytes of an image file that are no pixels
PIECE = 1 << 20  # bytes read at once


class FileRefused(ValueError):
    """One of several files cannot be read or written."""


def load_coder(codec: str, quantizer: str | None, root: str, max_pixels: int | None = None) -> ImageCoder:
    """The coder of a codec file, or of a codec in the workspace with a quantizer it was evaluated with.

    Args:
        codec: a file's name, the first digits of a codec's digest, or `quality-1` … of those that come along.
        quantizer: the quantizer's name in its experiment, where there are several.
        max_pixels: refuse larger images; None for the default.

    Raises:
        ValueError: no such codec, several, or a file that is none.
        StorageError: no workspace, or something missing there.
    """
    from pipeline.bitstream import ImageCoder
    from pipeline.codec.artifact import Codec
    from pipeline.quantizers import Tables

    limit = _limit(max_pixels)
    file = Path(codec)
    if file.is_file():
        try:
            return ImageCoder.from_bytes(shipped.unpack(file.read_bytes()), limit)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error
    if quality := shipped.named(codec):
        return shipped_coder(quality, max_pixels=max_pixels)
    if not codec or codec.strip("0123456789abcdef"):
        raise ValueError(
            f"{codec}: expected a codec file, a digest's first digits or quality-1 … quality-"
            f"{len(shipped.SHIPPED)}, found " + ("a folder" if file.is_dir() else "no such file")
        )
    workspace = Workspace.open(root, create=False)
    codec_blob, tables_blob = _find(workspace, codec, quantizer)
    blobs = workspace.blobs
    return ImageCoder(
        Codec.from_bytes(blobs.get(codec_blob)), Tables.from_bytes(blobs.get(tables_blob)), limit
    )


def shipped_coder(quality: int, *, finetuned: bool = True, max_pixels: int | None = None) -> ImageCoder:
    """The coder of a codec that comes with the project, with its finetuned decoder or as trained.

    Raises:
        ValueError: no such quality, or its files are damaged or of different releases.
    """
    from pipeline.bitstream import ImageCoder, codec_file

    data = shipped.codec_file(quality)
    if finetuned:
        data = codec_file.with_decoder(data, shipped.decoder_file(quality))
    coder = ImageCoder.from_bytes(data, _limit(max_pixels))
    expected = (shipped.FINETUNED if finetuned else shipped.SHIPPED)[quality].digest
    if coder.digest != expected:  # a decoder beside another codec than the one it was finetuned for
        raise ValueError(
            f"{shipped.FOLDER}: expected a codec of quality {quality} with the digest {expected[:16]}, found "
            f"{coder.digest[:16]}: install it again"
        )
    return coder


def _limit(max_pixels: int | None) -> int:
    from pipeline.bitstream import MAX_PIXELS

    return MAX_PIXELS if max_pixels is None else max_pixels


def asked_effort(effort: int, lmbda: float | None, coder: ImageCoder) -> Refinement | None:
    """The effort of an encoder, for the λ given or that of a codec that comes with the project.

    Raises:
        ValueError: effort for a codec whose λ nobody knows.
    """
    from pipeline.refinement import Refinement

    if not effort:
        return None
    if lmbda is None:
        found = shipped.find(bytes.fromhex(coder.digest))
        if found is None:
            raise ValueError(
                "--effort with --codec: expected --lmbda, the λ that the codec was trained for, found none"
            )
        lmbda = shipped.SHIPPED[found[0]].lmbda
    return Refinement(effort, lmbda)


def coders(codec: str | None, quantizer: str | None, root: str, max_pixels: int | None = None) -> CoderOf:
    """What finds an image file's coder: that of the codec, or without one those that come with the project.

    Each is loaded once. Raises as `load_coder`.
    """
    from pipeline.bitstream import parse

    if codec is not None:
        named = load_coder(codec, quantizer, root, max_pixels)
        return lambda data: named
    load = cache(shipped_coder)

    def choose(data: bytes) -> ImageCoder:
        identity = parse(data)[0].codec
        found = shipped.find(identity)
        if found is None:
            raise FileRefused(
                f"encoded by the codec {identity.hex()}, none that comes with Retrellis: name it by --codec"
            )
        quality, finetuned = found
        return load(quality, finetuned=finetuned, max_pixels=max_pixels)

    return choose


def export_codec_file(root: str, codec: str, file: Path, quantizer: str | None) -> Path:
    """Write the codec file of a codec in the workspace, to take elsewhere. Raises as `load_coder`."""
    from jobs.import_codec import write_named

    write_named(file.resolve(), load_coder(codec, quantizer, root).to_bytes())
    return file


def export_state_dict_file(root: str, codec: str, file: Path) -> Path:
    """Write a codec, named as for `load_coder`, as CompressAI's state dict.

    Raises:
        ValueError: no codec of these digits, or several; no place to write the file.
        StorageFull: the disk is full; nothing is left behind.
    """
    import torch

    from jobs.import_codec import write_named
    from pipeline.codec.compressai import export_state_dict

    data = io.BytesIO()
    torch.save(export_state_dict(_codec(root, codec).network), data)
    write_named(file.resolve(), data.getvalue())
    return file


def _codec(root: str, codec: str) -> Codec:
    """One that comes with the project, or the only one in the workspace whose digest begins so."""
    from pipeline.codec.artifact import Codec

    if quality := shipped.named(codec):
        return shipped_coder(quality).codec
    workspace = Workspace.open(root, create=False)
    outputs = [o for r in workspace.records.load("results").values() for o in r["outputs"].values()]
    blobs = {o["blob"] for o in outputs if o["kind"] == "codec" and o["digest"].startswith(codec)}
    if len(blobs) != 1:
        raise ValueError(
            f"expected one codec whose digest begins with {codec}, found {len(blobs)} in {workspace.root}"
        )
    return Codec.from_bytes(workspace.blobs.get(blobs.pop()))


def encode_files(
    files: Sequence[Path],
    output: Path | None,
    coder: ImageCoder,
    refinement: Refinement | None,
    force: bool,
    console: Console,
) -> int:
    """Encode images; returns how many failed. Raises ValueError where `output` cannot be meant."""
    from pipeline.pixels import canonical_pixels

    most = SAMPLE_BYTES * coder.max_pixels + IMAGE_SLACK

    def encode(file: Path) -> tuple[bytes, str]:
        pixels = canonical_pixels(_read(file, most), max_pixels=coder.max_pixels)
        data = coder.encode(pixels, refinement)
        return data, _rate(pixels.shape[1], pixels.shape[0], len(data))

    return _each(files, _targets(files, output, SUFFIX), encode, force, console)


def decode_files(
    files: Sequence[Path], output: Path | None, coder_of: CoderOf, force: bool, console: Console
) -> int:
    """Decode files to PNG; returns how many failed. Raises ValueError where `output` cannot be meant."""
    from PIL import Image

    from pipeline.bitstream import MAX_BYTES

    def decode(file: Path) -> tuple[bytes, str]:
        data = _read(file, MAX_BYTES)
        pixels = coder_of(data).decode(data)
        png = io.BytesIO()
        Image.fromarray(pixels).save(png, "PNG")
        return png.getvalue(), _rate(pixels.shape[1], pixels.shape[0], len(data))

    return _each(files, _targets(files, output, DECODED_SUFFIX), decode, force, console)


def describe_files(files: Sequence[Path], coder: ImageCoder | None, console: Console) -> int:
    """Print what files say of themselves, with a coder also whether it decodes them; returns how many failed."""
    from pipeline.bitstream import MAX_BYTES, parse

    def describe(file: Path) -> None:
        data = _read(file, MAX_BYTES)
        header, hyper, latent = parse(data)
        lines = [
            f"{file}: {_rate(header.width, header.height, len(data))}",
            f"  format version {header.version}, codec {header.codec.hex()}{_shipped_as(header.codec)}",
            f"  header {header.bytes}, hyper stream {len(hyper):,}, latent stream {len(latent):,} bytes",
        ]
        if coder is not None:
            coder.decode_indices(data)
            lines.append("  whole, and of this codec")
        _say(console, "\n".join(lines))

    return sum(not _done(file, describe, file) for file in files)


def _find(workspace: Workspace, codec: str, quantizer: str | None) -> tuple[str, str]:
    """The blobs of the one pair of codec and tables, among those evaluated, that is meant."""
    records = workspace.records.load("results")
    blobs = {o["digest"]: o["blob"] for r in records.values() for o in r["outputs"].values() if "blob" in o}
    names: dict[tuple[str, str], set[str]] = {}  # of the quantizer, in each experiment its own
    for record in records.values():
        reads = record["reads"]
        if record["stage"] == "evaluate" and reads["codec"].startswith(codec):
            names.setdefault((reads["codec"], reads["tables"]), set()).add(record["axes"]["quantizer"])
    found = [pair for pair, known in names.items() if quantizer is None or quantizer in known]
    if len(found) != 1:
        choices = [f"{pair[0][:12]} with quantizer {' or '.join(sorted(n))}" for pair, n in names.items()]
        raise ValueError(
            f"expected one evaluated codec whose digest begins with {codec}"
            + (f", with quantizer {quantizer}" if quantizer else "")
            + f", found {len(found)} in {workspace.root}; there are: {', '.join(choices) or 'none'}; "
            "give more digits or --quantizer"
        )
    chosen = found[0]
    return blobs[chosen[0]], blobs[chosen[1]]


def _targets(files: Sequence[Path], output: Path | None, suffix: str) -> list[Path]:
    """Where each file's result goes: beside it, into a folder, or for a single file to the name given."""
    if nameless := [str(file) for file in files if not file.name]:
        raise ValueError(f"expected files, found the folder {nameless[0]}; name the files in it")
    if output is None:
        return [file.with_suffix(suffix) for file in files]
    if output.is_dir():
        return [output / file.with_suffix(suffix).name for file in files]
    if len(files) > 1:
        raise ValueError(f"-o {output}: expected a folder that there is, for {len(files)} files")
    if suffix == DECODED_SUFFIX and output.suffix.lower() != suffix:
        raise ValueError(f"-o {output}: expected a name that ends in {suffix}; decoded images are PNG")
    return [output]


def _each(
    files: Sequence[Path],
    targets: Sequence[Path],
    work: Callable[[Path], tuple[bytes, str]],
    force: bool,
    console: Console,
) -> int:
    """Turn each file into its target, one line each; returns how many failed."""
    taken: set[Path] = set()

    def one(file: Path, target: Path) -> None:
        if target.resolve() in taken:
            raise FileRefused(f"another of these files gives {target} too; name the output by -o")
        if target.resolve() == file.resolve():
            raise FileRefused(f"its result would have the same name, {target}; name the output by -o")
        if target.exists() and not force:
            raise FileRefused(_exists(target))
        if not target.parent.is_dir():
            raise FileRefused(f"expected a folder {target.parent} for its result, found none")
        data, text = work(file)
        if not write_file(target, data, replace=force):
            raise FileRefused(_exists(target))
        taken.add(target.resolve())
        _say(console, f"{file} -> {target}: {text}")

    return sum(not _done(file, one, file, target) for file, target in zip(files, targets, strict=True))


def _done(file: Path, work: Callable[..., None], *arguments: Any) -> bool:
    """Whether a file's work was done; if not, its error is on stderr."""
    from pipeline.pixels import UnusableImage

    try:
        work(*arguments)
    except (UnusableImage, StorageError, ValueError, OSError, MemoryError, RuntimeError) as error:
        if (reason := _reason(error, file)) is None:
            raise
        print(f"retrellis: {_printable(f'{file}: {reason}')}", file=sys.stderr)
        return False
    return True


def _reason(error: Exception, file: Path) -> str | None:
    """What went wrong with a file, in words; None where it is no fault of the file or the machine."""
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):  # torch raises a RuntimeError
        return "not enough memory for its pixels"
    if isinstance(error, OSError) and error.strerror:
        other = error.filename is not None and Path(error.filename) != file
        return f"{error.filename}: {error.strerror}" if other else error.strerror
    return None if isinstance(error, RuntimeError) else str(error)


def _read(file: Path, most: int) -> bytes:
    """A file's bytes. No more than it can have are read, so that a device without end is refused."""
    pieces: list[bytes] = []
    room = most
    with file.open("rb") as stream:
        while piece := stream.read(PIECE):
            pieces.append(piece)
            room -= len(piece)
            if room < 0:
                raise FileRefused(f"expected at most {most:,} bytes, found more")
    return b"".join(pieces)


def _exists(target: Path) -> str:
    return f"{target} exists; give --force to replace it, or another name by -o"


def _rate(width: int, height: int, size: int) -> str:
    return f"{width} × {height} pixels, {size:,} bytes, {8 * size / (width * height):.4f} bpp"


def _shipped_as(identity: bytes) -> str:
    found = shipped.find(identity)
    if found is None:
        return ""
    quality, finetuned = found
    return f", quality {quality} of those that come with Retrellis" + ("" if finetuned else ", as trained")


def _say(console: Console, text: str) -> None:
    console.print(_printable(text), markup=False, highlight=False)


def _printable(text: str) -> str:
    """With what stands for bytes of a file's name that are no UTF-8 written out; to print them fails."""
    return text.encode(errors="backslashreplace").decode()
