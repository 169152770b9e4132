"""The command line. Reuse starts neither torch nor Ray nor MLflow: they are imported where they are needed."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from jobs import experiment as experiment_file
from jobs.experiment import Experiment, ExperimentError
from storage.errors import StorageError

app = typer.Typer(
    name="retrellis",
    help="Train a learned image codec, quantize its training latents for real, retrain the decoder on them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
console = Console(soft_wrap=True)

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
        metavar="AXIS=VALUE,…", help="only instances with these values, as in lmbda=0.013,quantizer=tcq8"
    ),
]
WorkspaceOption = Annotated[
    str | None,
    typer.Option(help="folder of all results; else RETRELLIS_WORKSPACE, else ./workspace"),
]
AddressOption = Annotated[
    str | None,
    typer.Option(help="a Ray cluster's address; else RAY_ADDRESS, else Ray inside this process"),
]
TrackingOption = Annotated[
    str | None,
    typer.Option(
        help="MLflow tracking URI; else MLFLOW_TRACKING_URI, else a database in the workspace; 'off' for none"
    ),
]
RetrainOption = Annotated[
    bool, typer.Option("--retrain", help="train again where settings of a trained codec changed")
]
RehashOption = Annotated[
    bool, typer.Option("--rehash", help="read every image file, distrusting size and time")
]


def main() -> None:
    """Entry point: known errors become one clear message and exit code 1, Ctrl-C becomes 130."""
    from jobs.run import RunFailed

    try:
        app(standalone_mode=False)
    except typer.Exit as done:
        sys.exit(done.exit_code)
    except typer.Abort:
        sys.exit(130)
    except KeyboardInterrupt:
        print(
            "\ninterrupted: what finished is kept, and the same command goes on from there", file=sys.stderr
        )
        sys.exit(130)
    except Exception as error:
        if hasattr(error, "format_message"):  # click's usage errors
            print(f"retrellis: {error.format_message()}", file=sys.stderr)
            sys.exit(2)
        if not isinstance(error, (ExperimentError, StorageError, RunFailed, ValueError, OSError)):
            raise
        print(f"retrellis: {error}", file=sys.stderr)
        sys.exit(1)


def _workspace(option: str | None) -> str:
    return option or os.environ.get("RETRELLIS_WORKSPACE") or "workspace"


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


def _load(file: str, overrides: list[str] | None) -> Experiment:
    return experiment_file.load(file, overrides)


def _run(file: str, overrides: list[str] | None, options: Any) -> None:
    from jobs.session import execute

    execute(_load(file, overrides), options, console)


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
    ) -> None:
        from jobs.session import Options

        options = Options(
            _workspace(workspace), stage, _only(only), address, _tracking(tracking_uri), retrain, rehash
        )
        _run(file, overrides, options)

    command.__doc__ = help_text
    return command


REUSE = "What records hold already is reused; what it reads is computed first where it is missing."
STAGE_HELP = {
    "ingest": "Read folders of images into shards of canonical pixels.",
    "train": "Train the base codec, one per λ.",
    "tables": "Design the quantizers' tables.",
    "quantize": "Quantize the latents of the training images with the real quantizers.",
    "finetune": "Retrain the decoder side on quantized latents, and its controls.",
    "evaluate": "Quantize, decode and measure the test images with every arm.",
    "report": "Draw tables, plots and crops.",
}
app.command("run")(_stage_command(None, f"Run a whole experiment. {REUSE}"))
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
    """Show what `run` would reuse or compute, why, and how much. Computes nothing."""
    from jobs.session import Options, show_plan

    show_plan(
        _load(file, overrides), Options(_workspace(workspace), None, _only(only), rehash=rehash), console
    )


@app.command("import")
def import_codec(
    file: Annotated[
        Path, typer.Argument(help="CompressAI's MeanScaleHyperprior (.pth) or a .safetensors of ours")
    ],
    lmbda: Annotated[float, typer.Option(help="the λ it was trained for")],
    workspace: WorkspaceOption = None,
    tracking_uri: TrackingOption = None,
) -> None:
    """Take a trained codec into the workspace and print the line that names it in an experiment file."""
    from jobs.session import Options, import_checkpoint

    options = Options(_workspace(workspace), tracking=_tracking(tracking_uri))
    digest = import_checkpoint(str(file.resolve()), lmbda, options, console)["outputs"]["codec"]["digest"]
    console.print(f"codec: {{digest: {digest}, lmbda: {lmbda:g}}}", markup=False, highlight=False)


@app.command("export")
def export_codec(
    codec: Annotated[str, typer.Argument(help="digest of a codec in the workspace, or its first digits")],
    file: Annotated[Path, typer.Argument(help="the .pth to write, for CompressAI's MeanScaleHyperprior")],
    workspace: WorkspaceOption = None,
) -> None:
    """Write a codec as a state dict that CompressAI loads."""
    from jobs.import_codec import export_file

    console.print(f"wrote {export_file(_workspace(workspace), codec, file)}", markup=False, highlight=False)


@app.command()
def status(
    workspace: WorkspaceOption = None,
    follow: Annotated[bool, typer.Option("--follow", help="look again every 2 seconds until Ctrl-C")] = False,
) -> None:
    """What ran, runs and failed, from the records; also while a run goes on elsewhere."""
    from jobs.status import show

    show(_workspace(workspace), follow, console)


@app.command()
def sync(workspace: WorkspaceOption = None, tracking_uri: TrackingOption = None) -> None:
    """Bring MLflow up to the records, after it was away or into another server."""
    from jobs.lineage import synchronise

    synchronise(_workspace(workspace), _tracking(tracking_uri), console)


@app.command()
def ui(
    workspace: WorkspaceOption = None,
    port: Annotated[int, typer.Option(help="on 127.0.0.1")] = 5000,
) -> None:
    """Open the MLflow UI over the workspace, on loopback only, until Ctrl-C."""
    from jobs.lineage import synchronise
    from storage.lineage import ui_command

    page = synchronise(_workspace(workspace), None, console)  # also makes the database where there is none
    argv, environment = ui_command(_workspace(workspace), port)
    console.print(f"open http://127.0.0.1:{port}/{page}", markup=False, highlight=False)
    os.execvpe(argv[0], argv, {**os.environ, **environment})


if __name__ == "__main__":
    main()
