"""The command line. Reuse starts neither torch nor Ray nor MLflow: they are imported where they are needed."""

from __future__ import annotations

import os
import signal
import sys
from typing import Annotated, Any

import typer

from jobs import experiment as experiment_file
from jobs.experiment import ExperimentError
from jobs.files_cli import file_commands
from jobs.latents_cli import latents
from jobs.options import WorkspaceOption, console, workspace_root
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
app.add_typer(file_commands)
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
