"""The command line. Reuse starts neither torch nor Ray nor MLflow: they are imported where they are needed."""

from __future__ import annotations

import math
import os
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from jobs import experiment as experiment_file
from jobs.experiment import ExperimentError
from jobs.latents_cli import latents
from jobs.options import WorkspaceOption, console, exit_if, workspace_root
from pipeline.shipped import DEFAULT_QUALITY, SHIPPED
from storage.errors import StorageError

app = typer.Typer(
    name="retrellis",
    help="Train a learned image codec, quantize its training latents for real, retrain the decoder on them.\n\n"
    "One file describes an experiment (docs/experiment.md, experiments/kodak.yaml); `plan` says what it would do, "
    "`run` does it, and a second `run` reuses what the first one made. All results lie in one workspace.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(latents, name="latents")

FileArgument = Annotated[str, typer.Argument(metavar="EXPERIMENT.yaml", help="the experiment file")]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="override a value of the file, as in train.steps=2000; repeatable"
    ),
]
OnlyOption = Annotated[
    str | None,
    typer.Option(
        metavar="AXIS=VALUE,…",
        help="only instances with these values, as in lmbda=0.013,quantizer=tcq8; axes: lmbda, quantizer, arm, seed",
    ),
]
AddressOption = Annotated[
    str | None,
    typer.Option(
        help="a Ray cluster's address, 'auto' on its nodes; else RAY_ADDRESS, else Ray inside this process"
    ),
]
InsecureOption = Annotated[
    bool, typer.Option("--insecure", help="use a cluster that asks for no token: whoever reaches it rules it")
]
TrackingOption = Annotated[
    str | None,
    typer.Option(
        help="MLflow tracking URI; else MLFLOW_TRACKING_URI, else a database in the workspace (for s3://, in "
        "RETRELLIS_SCRATCH); 'off' for none"
    ),
]
RetrainOption = Annotated[
    bool,
    typer.Option(
        "--retrain",
        help="train again where a codec of this experiment was trained with other settings or images",
    ),
]
RehashOption = Annotated[
    bool, typer.Option("--rehash", help="read every image file, distrusting size and time")
]
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
        help="which of the codecs that come with Retrellis; the last is the best and largest",
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
INTERRUPTED = 130  # what Typer gives back after Ctrl-C
TERMINATED = 128 + signal.SIGTERM


def main() -> None:
    """Entry point: known errors become one clear message and exit code 1, Ctrl-C becomes 130, SIGTERM 143."""
    from jobs.run import RunFailed

    interrupted = INTERRUPTED

    def terminate(*_: object) -> None:
        nonlocal interrupted
        interrupted = TERMINATED
        raise KeyboardInterrupt  # from here on like Ctrl-C

    signal.signal(signal.SIGTERM, terminate)
    try:
        code = app(prog_name="retrellis", standalone_mode=False)
    except Exception as error:
        if hasattr(error, "format_message"):  # click's usage errors
            text = error.format_message()
            print(text if text.startswith("Usage:") else f"retrellis: {text}", file=sys.stderr)
            sys.exit(2)
        if not isinstance(error, (ExperimentError, StorageError, RunFailed, ValueError, OSError)):
            raise
        print(f"retrellis: {error}", file=sys.stderr)
        sys.exit(1)
    if code == INTERRUPTED:
        print("interrupted: what finished is kept, and the same command goes on from there", file=sys.stderr)
        code = interrupted
    sys.exit(code)


def _tracking(option: str | None) -> str | None:
    return option or os.environ.get("MLFLOW_TRACKING_URI")


def _only(text: str | None) -> dict[str, str]:
    pairs = [pair.partition("=") for pair in text.split(",")] if text else []
    for name, equals, value in pairs:
        if not (name and equals and value):
            raise ExperimentError(
                f"--only {text}: expected AXIS=VALUE pairs, as in lmbda=0.013,quantizer=tcq8"
            )
    return {name.strip(): value.strip() for name, _, value in pairs}


def _lmbda(value: float | None) -> float | None:
    if value is not None and not 0 < value < math.inf:  # also refuses NaN
        raise typer.BadParameter(f"expected a finite number above 0, found {value:g}")
    return value


def _needs_codec(codec: str | None, quantizer: str | None, workspace: str | None) -> None:
    """What says which codec of a workspace is meant says nothing without one."""
    for option, value in (("--quantizer", quantizer), ("--workspace", workspace)):
        if codec is None and value is not None:
            raise typer.BadParameter(f"{option} {value}: expected --codec with it, found none")


def _run(file: str, overrides: list[str] | None, options: Any) -> None:
    from jobs.session import execute

    execute(experiment_file.load(file, overrides), options, console)


def _stage_command(stage: str | None, help_text: str) -> Any:
    """A command that brings one stage's instances (and what they read) to results."""

    def command(
        file: FileArgument,
        overrides: SetOption = None,
        only: OnlyOption = None,
        workspace: WorkspaceOption = None,
        address: AddressOption = None,
        tracking_uri: TrackingOption = None,
        retrain: RetrainOption = False,
        rehash: RehashOption = False,
        insecure: InsecureOption = False,
    ) -> None:
        from jobs.session import Options

        options = Options(
            workspace_root(workspace),
            stage,
            _only(only),
            address,
            _tracking(tracking_uri),
            retrain,
            rehash,
            insecure,
        )
        _run(file, overrides, options)

    command.__doc__ = help_text
    return command


REUSE = "Reuses what the workspace has; what is read is computed first where it is missing."
STAGE_HELP = {
    "ingest": "Read images into the workspace.\n\nFolders become shards of canonical pixels.",
    "train": "Train the base codec, one per λ.\n\nA training that was stopped goes on from its last checkpoint.",
    "tables": "Design the quantizers' tables.\n\nThey drive search, rate and reconstruction alike.",
    "tune": "Tune quantizers to a codec.\n\nThose with `tune: true`: step, weight of rate and tables, by pictures.",
    "quantize": "Quantize training latents for real.\n\nOnly images that the set lacks; one Ray task per some images.",
    "finetune": "Retrain the decoder side on the latents.\n\nAnd the controls, on noise and on rounding.",
    "evaluate": "Measure every arm on the test images.\n\nQuantizes, decodes, and gives bpp, PSNR and MS-SSIM.",
    "report": "Draw tables, plots and crops.\n\nThe files lie in reports/ in the workspace.",
}
app.command("run")(_stage_command(None, f"Run a whole experiment.\n\n{REUSE}"))
for _stage, _text in STAGE_HELP.items():
    app.command(_stage)(_stage_command(_stage, f"{_text} {REUSE}"))


@app.command()
def plan(
    file: FileArgument,
    overrides: SetOption = None,
    only: OnlyOption = None,
    workspace: WorkspaceOption = None,
    rehash: RehashOption = False,
) -> None:
    """Show what `run` would do, and why.

    For each stage instance: reuse or compute, how much, and which ingredient differs from the nearest record.
    Computes nothing.
    """
    from jobs.session import Options, show_plan

    show_plan(
        experiment_file.load(file, overrides),
        Options(workspace_root(workspace), None, _only(only), rehash=rehash),
        console,
    )


@app.command("import")
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


@app.command("export")
def export_codec(
    codec: Annotated[str, typer.Argument(help="digest of a codec in the workspace, or its first digits")],
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
    from jobs.files import export_codec_file
    from jobs.import_codec import export_file

    if file.suffix == ".safetensors":
        wrote = export_codec_file(workspace_root(workspace), codec, file, quantizer)
    else:
        wrote = export_file(workspace_root(workspace), codec, file)
    console.print(f"wrote {wrote}", markup=False, highlight=False)


@app.command()
def encode(
    files: Annotated[list[Path], typer.Argument(metavar="IMAGE…", help="PNG, JPEG, WebP or TIFF files")],
    codec: CodecOption = None,
    quality: QualityOption = None,
    effort: Annotated[
        int,
        typer.Option(min=0, max=100, help="steps to a better trade, each as long as some four encodings"),
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

    By the codec named, or by one that comes with Retrellis (--quality, 3 if not given). Grey images become RGB. Exit
    code 1 if some failed; the others are done.
    """
    from jobs.files import asked_effort, encode_files, load_coder, shipped_coder

    _needs_codec(codec, quantizer, workspace)
    if lmbda is not None and not effort:
        raise typer.BadParameter("--lmbda is the trade of --effort: expected both, found no --effort")
    if codec is None:
        quality = DEFAULT_QUALITY if quality is None else quality
        coder = shipped_coder(quality, max_pixels)
    elif quality is not None:
        raise typer.BadParameter("expected --codec or --quality, found both")
    else:
        coder = load_coder(codec, quantizer, workspace_root(workspace), max_pixels)
    refinement = asked_effort(effort, lmbda, quality)
    exit_if(encode_files(files, output, coder, refinement, force, console))


@app.command()
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


@app.command()
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


@app.command()
def status(
    workspace: WorkspaceOption = None,
    follow: Annotated[bool, typer.Option("--follow", help="look again every 2 seconds until Ctrl-C")] = False,
) -> None:
    """Show what ran, runs and failed.

    From the workspace alone, so also from another terminal while a run goes on.
    """
    from jobs.status import show

    show(workspace_root(workspace), follow, console)


@app.command()
def cancel(
    experiment: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="of the experiment; needed where several run")
    ] = None,
    workspace: WorkspaceOption = None,
) -> None:
    """End a run from elsewhere.

    Through the workspace alone, within seconds. What finished is kept, and the same command goes on from there.
    """
    from jobs.cancel import cancel

    cancel(workspace_root(workspace), experiment, console)


@app.command()
def sync(workspace: WorkspaceOption = None, tracking_uri: TrackingOption = None) -> None:
    """Bring MLflow up to the workspace.

    After MLflow was away, or to show everything in another server (--tracking-uri).
    """
    from jobs.lineage import synchronise

    synchronise(workspace_root(workspace), _tracking(tracking_uri), console)


@app.command()
def ui(
    workspace: WorkspaceOption = None,
    port: Annotated[int, typer.Option(help="of the page on 127.0.0.1")] = 5000,
) -> None:
    """Open the MLflow UI over the workspace.

    On 127.0.0.1 only, until Ctrl-C. Runs are under "Training runs"; their descriptions link inputs and uses.
    """
    from jobs.lineage import synchronise
    from storage.lineage import ui_command

    page = synchronise(
        workspace_root(workspace), None, console
    )  # also makes the database where there is none
    argv, environment = ui_command(workspace_root(workspace), port)
    console.print(f"open http://127.0.0.1:{port}/{page}", markup=False, highlight=False)
    os.execvpe(argv[0], argv, {**os.environ, **environment})


if __name__ == "__main__":
    main()
