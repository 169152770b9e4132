"""Who may talk to Ray: a token file that only its user can read, and no cluster that asks nobody for a token.

Whoever may talk to a Ray cluster may run any code as its user, and Ray's ports listen on all interfaces.
"""

from __future__ import annotations

import os
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

MODE = "RAY_AUTH_MODE"
ANSWER_S = 10.0


class NoAccess(ValueError):
    """The cluster does not let this driver in."""


class OpenCluster(ValueError):
    """The cluster lets everybody in."""


class NotStarted(OSError):
    """Ray did not start on this machine in the time that it gives itself."""


def prepare(address: str, insecure: bool) -> None:
    """Keep the token private; a driver of a cluster shows it. To be called before ray is imported."""
    if address != "local" and not insecure:
        os.environ.setdefault(MODE, "token")
    if os.environ.get(MODE, "token").lower() == "token" and "RAY_AUTH_TOKEN" not in os.environ:
        with suppress(OSError):  # not ours, or not to be changed, such as a mounted secret
            _keep_private(may_create=address == "local")


def _keep_private(may_create: bool) -> None:
    """Mode 0600 for the token file. Ray would make one that all users of the machine can read."""
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    path = Path(named).expanduser() if named else Path.home() / ".ray/auth_token"
    if path.exists():
        if path.stat().st_mode & 0o077:
            path.chmod(0o600)
    elif may_create and not named:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent)  # nobody else may read it
        try:
            with os.fdopen(descriptor, "w") as file:
                file.write(secrets.token_hex(32))
            with suppress(FileExistsError):  # another process was first
                os.link(temporary, path)
        finally:
            Path(temporary).unlink()


@contextmanager
def explained(address: str) -> Iterator[None]:
    """Say of a connection that fails what may be wrong."""
    from ray.exceptions import AuthenticationError

    try:
        yield
    except AuthenticationError:
        raise NoAccess(
            f"Ray at {address}: expected the cluster's token in ~/.ray/auth_token, found none on this machine: copy it "
            "from the cluster, with mode 0600 (docs/cluster.md). A cluster that asks for no token wants --insecure"
        ) from None
    except ConnectionError as error:
        raise NoAccess(
            f"{error}. Expected a Ray of this version there that knows this machine's token (~/.ray/auth_token): "
            "`ray status --address …` on one of its nodes says whether it runs"
        ) from error
    except Exception as error:
        if "timed out during startup" not in str(error):  # Ray has no type of its own for it
            raise
        logs = Path(os.environ.get("RAY_TMPDIR", tempfile.gettempdir())) / "ray/session_latest/logs"
        raise NotStarted(
            f"expected that Ray starts on this machine, found: {error} The machine's load is "
            f"{os.getloadavg()[0]:.1f} on {os.cpu_count()} cores: where other work is the cause, give the same command "
            f"again after it; nothing is lost. Otherwise look at Ray's logs in {logs}"
        ) from error


def require_token(gcs_address: str) -> None:
    """Make sure that the cluster turns a stranger away.

    Raises:
        OpenCluster: a call without token was not refused.
    """
    answer = _strangers_call(gcs_address)
    if answer != "UNAUTHENTICATED":
        raise OpenCluster(
            f"Ray at {gcs_address}: expected that it refuses a call without token, found {answer}. Whoever reaches its "
            "ports can run any code as its user. Start it with a token (docs/cluster.md), or, in a network whose every "
            "user you trust, add --insecure"
        )


def _strangers_call(gcs_address: str) -> str:
    """What a call that carries no token gets: the name of gRPC's status."""
    import grpc
    from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc

    with grpc.insecure_channel(gcs_address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        stub: Any = gcs_service_pb2_grpc.NodeInfoGcsServiceStub(channel)
        messages: Any = gcs_service_pb2
        try:
            stub.CheckAlive(messages.CheckAliveRequest(), timeout=ANSWER_S)
        except grpc.RpcError as error:
            return str(error.code().name)
    return "OK"
