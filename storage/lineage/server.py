"""How MLflow is started and spoken to, without importing it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from storage.keys import sha256
from storage.memmap import scratch

ARTIFACTS = "mlflow-artifacts"  # the folder in a workspace, and MLflow's name for what a server maps to it
PATIENCE_S = 4  # seconds to wait for a locked database, or for another process that projects
_ANSWER_S = 8  # seconds to wait for one answer of a server

_CLIENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": str(_ANSWER_S),
    # The default of 7 waits four minutes for a dead server, and may make a run twice whose answer was late.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
}


def prepare_client() -> None:
    """Bound MLflow's waits in this process, and keep its telemetry off; what the user has set stands.

    To be called before MLflow is imported: its telemetry starts then.
    """
    for name, value in _CLIENT.items():
        os.environ.setdefault(name, value)


def home(workspace_root: str) -> Path:
    """The folder of a workspace's database and artifacts: the workspace or, for a remote one, this node's scratch.

    A database cannot live in a bucket, and need not: it says what the records say, and any machine makes it again.
    """
    if "://" in workspace_root:
        return scratch() / f"mlflow-{sha256(workspace_root.rstrip('/').encode())[:16]}"
    return Path(workspace_root).expanduser().resolve()


def default_tracking_uri(workspace_root: str) -> str:
    """The URI of a workspace's database."""
    return f"sqlite:///{home(workspace_root) / 'mlflow.db'}"


def ui_command(workspace_root: str, port: int = 5000) -> tuple[list[str], dict[str, str]]:
    """The MLflow server over a workspace's database (which `sync` makes), on loopback only.

    Returns:
        The command line, and the variables to add to its environment. One worker and no job execution: ready in
        seconds, and nothing outlives it.
    """
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--workers", "1", "--backend-store-uri", default_tracking_uri(workspace_root)]
    command += ["--artifacts-destination", str(home(workspace_root) / ARTIFACTS)]
    return command, {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
