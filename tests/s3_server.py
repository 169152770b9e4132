"""An S3 server on loopback for tests: moto's, in a thread of this process, with its faults and its log of requests."""

from __future__ import annotations

import logging
import threading
import urllib.request
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qs

from moto import settings
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

Environ = dict[str, Any]


@dataclass(frozen=True)
class Request:
    """What a client asked for: `kind` is LIST or the HTTP method, `path` begins with the bucket."""

    kind: str
    path: str


class S3Server:
    """A server that speaks S3's protocol and keeps everything in memory.

    Attributes:
        environment: the variables by which a client finds it.
        requests: all that came in.
        knows_conditions: False makes it a server that has never heard of If-None-Match.
    """

    def __init__(self) -> None:
        logging.getLogger("werkzeug").setLevel(logging.ERROR)  # one line a request
        self.requests: list[Request] = []
        self.knows_conditions = True
        self._backend = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self._answer, threaded=True)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self.environment: Mapping[str, str] = {
            "AWS_ACCESS_KEY_ID": "tester",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ALLOW_HTTP": "true",
            "AWS_REGION": "us-east-1",
        }

    def make_bucket(self, name: str) -> None:
        with urllib.request.urlopen(urllib.request.Request(f"{self.url}/{name}", method="PUT")):
            pass

    def check_credentials(self, wanted: bool) -> None:
        """Refuse all keys, none of which it has given out; or let everybody in, as at first."""
        settings.INITIAL_NO_AUTH_ACTION_COUNT = 0 if wanted else float("inf")

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def _answer(self, environ: Environ, start: Callable[..., Any]) -> Iterable[bytes]:
        listing = environ["REQUEST_METHOD"] == "GET" and "list-type" in parse_qs(environ["QUERY_STRING"])
        kind = "LIST" if listing else environ["REQUEST_METHOD"]
        self.requests.append(Request(kind, environ["PATH_INFO"].lstrip("/")))
        if not self.knows_conditions:
            environ.pop("HTTP_IF_NONE_MATCH", None)
        answer: Iterable[bytes] = self._backend(environ, start)
        return answer
