"""The commands about files: codecs in and out of a workspace, images to files and back."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from jobs.options import WorkspaceOption, console, exit_if, workspace_root
from pipeline.shipped import DEFAULT_QUALITY, SHIPPED

file_commands = typer.Typer(rich_markup_mode=None)

CodecOption = Annotated[
    str | None,
    typer.Option(
        metavar="FILE|DIGEST",
        help="a codec file (see `export`), or the first digits of a codec's digest in the workspace; "
        "else one that comes with Retrellis",
    ),
]
QualityOption = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=len(SHIPPED),
        help="which of the finetuned codecs that come with Retrellis; the last is the best and largest",
    ),
]
QuantizerOption = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="which of the quantizers that a workspace's codec was evaluated with"),
]
OutputOption = Annotated[
    Path | None,
    typer.Option(
        "--output", "-o", help="a folder, or the file's name for a single one; else beside each input"
    ),
]
ForceOption = Annotated[bool, typer.Option("--force", help="replace files that exist")]
MaxPixelsOption = Annotated[
    int | None, typer.Option(metavar="N", min=1, help="refuse images of more pixels; 134217728 if not given")
]


def _lmbda(value: float | None) -> float | None:
    if value is not None and not 0 < value < math.inf:  # also refuses NaN
        raise typer.BadParameter(f"expected a finite number above 0, found {value:g}")
    return value


def _needs_codec(codec: str | None, quantizer: str | None, workspace: str | None) -> None:
    """What says which codec of a workspace is meant says nothing without one."""
    for option, value in (("--quantizer", quantizer), ("--workspace", workspace)):
        if codec is None and value is not None:
            raise typer.BadParameter(f"{option} {value}: expected --codec with it, found none")


@file_commands.command("import")
def import_codec(
    file: Annotated[
        Path, typer.Argument(help="CompressAI's MeanScaleHyperprior (.pth) or a .safetensors of ours")
    ],
    lmbda: Annotated[float, typer.Option(help="the λ it was trained for", callback=_lmbda)],
    workspace: WorkspaceOption = None,
) -> None:
    """Take a trained codec into the workspace.

    Prints the line that stands in place of `train:` in an experiment file; name its training images under `latents:`.
    """
    from jobs.session import Options, import_checkpoint

    options = Options(workspace_root(workspace))
    digest = import_checkpoint(str(file.resolve()), lmbda, options, console)["outputs"]["codec"]["digest"]
    console.print(f"codec: {{digest: {digest}, lmbda: {lmbda:g}}}", markup=False, highlight=False)


@file_commands.command("export")
def export_codec(
    codec: Annotated[
        str,
        typer.Argument(
            help="digest of a codec in the workspace, or its first digits; quality-1 … quality-5: what `encode` has"
        ),
    ],
    file: Annotated[
        Path,
        typer.Argument(
            help="a .safetensors: the codec file for `encode` and `decode`; a .pth: for CompressAI"
        ),
    ],
    quantizer: QuantizerOption = None,
    workspace: WorkspaceOption = None,
) -> None:
    """Write a codec to a file.

    A .safetensors holds codec and quantizer tables: what other machines need to encode and decode. Any other name gets
    the state dict of CompressAI's MeanScaleHyperprior, coding tables included.
    """
    from jobs.files import export_codec_file, export_state_dict_file

    if file.suffix == ".safetensors":
        wrote = export_codec_file(workspace_root(workspace), codec, file, quantizer)
    else:
        wrote = export_state_dict_file(workspace_root(workspace), codec, file)
    console.print(f"wrote {wrote}", markup=False, highlight=False)


@file_commands.command()
def encode(
    files: Annotated[list[Path], typer.Argument(metavar="IMAGE…", help="PNG, JPEG, WebP or TIFF files")],
    codec: CodecOption = None,
    quality: QualityOption = None,
    effort: Annotated[
        int,
        typer.Option(
            min=0,
            max=100,
            help="steps to a better trade, each as long as encoding and decoding once or twice",
        ),
    ] = 0,
    lmbda: Annotated[
        float | None, typer.Option(help="λ of the trade, for --effort with --codec", callback=_lmbda)
    ] = None,
    output: OutputOption = None,
    quantizer: QuantizerOption = None,
    workspace: WorkspaceOption = None,
    force: ForceOption = False,
    max_pixels: MaxPixelsOption = None,
) -> None:
    """Compress images to .rtl files.

    By the codec named, or by one that comes with Retrellis (--quality, 3 if not given), finetuned for a trellis of 256
    states. Grey images become RGB. Exit code 1 if some failed; the others are done.
    """
    from jobs.files import asked_effort, encode_files, load_coder, shipped_coder

    _needs_codec(codec, quantizer, workspace)
    if lmbda is not None and not effort:
        raise typer.BadParameter("--lmbda is the trade of --effort: expected both, found no --effort")
    if codec is None:
        coder = shipped_coder(DEFAULT_QUALITY if quality is None else quality, max_pixels=max_pixels)
    elif quality is not None:
        raise typer.BadParameter("expected --codec or --quality, found both")
    else:
        coder = load_coder(codec, quantizer, workspace_root(workspace), max_pixels)
    refinement = asked_effort(effort, lmbda, coder)
    exit_if(encode_files(files, output, coder, refinement, force, console))


@file_commands.command()
def decode(
    files: Annotated[list[Path], typer.Argument(metavar="FILE.rtl…", help="what `encode` wrote")],
    codec: CodecOption = None,
    output: OutputOption = None,
    quantizer: QuantizerOption = None,
    workspace: WorkspaceOption = None,
    force: ForceOption = False,
    max_pixels: MaxPixelsOption = None,
) -> None:
    """Decompress .rtl files to PNG.

    By the codec that encoded them: name it, unless it comes with Retrellis. Exit code 1 if some failed; the others are
    done.
    """
    from jobs.files import coders, decode_files

    _needs_codec(codec, quantizer, workspace)
    coder_of = coders(codec, quantizer, workspace_root(workspace), max_pixels)
    exit_if(decode_files(files, output, coder_of, force, console))


@file_commands.command()
def info(
    files: Annotated[list[Path], typer.Argument(metavar="FILE.rtl…", help="what `encode` wrote")],
    codec: Annotated[
        str | None, typer.Option(metavar="FILE|DIGEST", help="also check that this codec decodes them")
    ] = None,
    quantizer: QuantizerOption = None,
    workspace: WorkspaceOption = None,
) -> None:
    """Show what .rtl files say of themselves.

    Size of the image, rate, codec, lengths of the streams.
    """
    from jobs.files import describe_files, load_coder

    coder = load_coder(codec, quantizer, workspace_root(workspace)) if codec else None
    exit_if(describe_files(files, coder, console))
