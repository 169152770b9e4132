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
    """What a client asked for: `kind` is LIST, DELETE (of one or many) or the method; `path` begins with the bucket."""

    kind: str
    path: str


class S3Server:
    """A server that speaks S3's protocol and keeps everything in memory.

    Attributes:
        environment: the variables by which a client finds it.
        requests: all that came in.
        knows_conditions: False makes it a server that has never heard of If-None-Match.
        fault: a status to answer a request with, such as "503 Slow Down", or "" for none.
        loses_answers: whether what has a fault is done all the same.
    """

    def __init__(self) -> None:
        logging.getLogger("werkzeug").setLevel(logging.ERROR)  # one line a request
        self.requests: list[Request] = []
        self.mend()
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

    def mend(self) -> None:
        """Have no fault, and let everybody in, as at first."""
        self.knows_conditions, self.loses_answers = True, False
        self.fault: Callable[[Request], str] = lambda request: ""
        settings.INITIAL_NO_AUTH_ACTION_COUNT = float("inf")

    def check_credentials(self) -> None:
        """Refuse all keys: it has given out none."""
        settings.INITIAL_NO_AUTH_ACTION_COUNT = 0

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def _answer(self, environ: Environ, start: Callable[..., Any]) -> Iterable[bytes]:
        query = parse_qs(environ["QUERY_STRING"], keep_blank_values=True)
        kind = (
            "LIST" if "list-type" in query else "DELETE" if "delete" in query else environ["REQUEST_METHOD"]
        )
        request = Request(kind, environ["PATH_INFO"].lstrip("/"))
        self.requests.append(request)
        if not self.knows_conditions:
            environ.pop("HTTP_IF_NONE_MATCH", None)
        fault = self.fault(request)
        answer: Iterable[bytes] = () if fault and not self.loses_answers else self._backend(environ, start)
        if fault:
            start(fault, [("Content-Length", "0")])
            return []
        return answer
