"""An S3 bucket as a store: how it is opened, and what its failures mean to a person.

Server and credentials come from the environment, where obstore looks for them: AWS_ACCESS_KEY_ID,
AWS_SECRET_ACCESS_KEY, AWS_REGION, AWS_ENDPOINT_URL and their like, else those that a machine or container in the cloud
is given.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

from obstore.exceptions import AlreadyExistsError, BaseError
from obstore.store import S3Store

from storage.errors import StoreError

if TYPE_CHECKING:
    from obstore.store import RetryConfig

# A server that is away for a minute or two ends no work; a person who has mistyped its address hears so at once
PATIENT: RetryConfig = {"max_retries": 20, "retry_timeout": timedelta(minutes=3)}
IMPATIENT: RetryConfig = {"max_retries": 2, "retry_timeout": timedelta(seconds=5)}

_ROOT = re.compile(r"s3://[^/]+(/.*)?")
_KEYS = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (with AWS_SESSION_TOKEN, if the key is a temporary one)"
# What obstore says, what was expected, what to do. The first that is found counts.
_FAILURES = (
    ("NoSuchBucket", "a bucket of that name", "Make it, or name another place by --workspace"),
    (
        "/latest/(api/token|meta-data)|169.254.170|Missing(AccessKey|Secret)",
        "credentials",
        f"Set {_KEYS}, on every node that takes part",
    ),
    (
        "incorrectly configured region|PermanentRedirect|AuthorizationHeaderMalformed",
        "a bucket in the region of AWS_REGION",
        "Set AWS_REGION to the one where the bucket lies",
    ),
    ("code: 40[13]", "access", f"Set {_KEYS} to those of a user who may read, write, list and delete there"),
    (
        "builder error",
        "https://",
        "If AWS_ENDPOINT_URL is meant to be plain http://, set AWS_ALLOW_HTTP=true",
    ),
    (
        "kind: (Connect|Timeout)",
        "a server that answers",
        "Set AWS_ENDPOINT_URL to its address; if it is right, wait until the server is back and give the command again",
    ),
)
_ELSE = ("an answer", "Finished work is kept: see to the server and give the same command again")


def open_bucket(root: str, patient: bool) -> S3Store:
    """The store at `s3://bucket/prefix`; nothing is asked of it yet.

    Args:
        patient: whether a server that does not answer is asked again for minutes, or for seconds.

    Raises:
        StoreError: another kind of URL, or an address of a server that is none.
    """
    if not _ROOT.fullmatch(root):
        raise StoreError(
            f"workspace {root}: expected a folder or s3://bucket/prefix, found another kind of URL"
        )
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT"):
        address = os.environ.get(name, "https://")
        if not address.startswith(("http://", "https://")):  # obstore would panic
            raise StoreError(f"workspace {root}: expected https://… or http://… in {name}, found {address!r}")
    with explained(root, ""):
        return S3Store.from_url(root, retry_config=PATIENT if patient else IMPATIENT)


def is_conflict(error: AlreadyExistsError) -> bool:
    """Whether S3 says that others write the object just now, of whom none may come to an end: one has to try again.

    obstore says of this what it says of an object that is there.
    """
    return "status code: 409" in str(error)


@contextmanager
def explained(root: str, name: str) -> Iterator[None]:
    """Turn what obstore raises in the block into errors that know no obstore.

    Args:
        root: of the store; `name` of the object or folder that is asked for.

    Raises:
        FileNotFoundError: there is no such object.
        OSError: a local disk fails.
        StoreError: a remote store fails, or refuses. It says nothing of the object.
    """
    try:
        yield
    except FileNotFoundError as error:
        if "NoSuchBucket" in str(error):
            raise StoreError(_message(root, str(error))) from None
        raise FileNotFoundError(f"{root}/{name}: no such object") from None
    except BaseError as error:
        if "://" not in root:
            raise OSError(f"{root}/{name}: {str(error).partition(chr(10))[0]}") from None
        raise StoreError(_message(root, str(error))) from None


def _message(root: str, text: str) -> str:
    wanted = (f[1:] for f in _FAILURES if re.search(f[0], text))
    expected, advice = next(wanted, _ELSE)
    asked = re.search(r"https?://[^/\s]+", text)
    where = asked[0] if asked else "its server"
    return f"workspace {root}: expected {expected} at {where}, found {_found(text)}. {advice}."


def _found(text: str) -> str:
    """What the server said, or why it said nothing, out of obstore's message with its debugging."""
    if answer := re.search(r"<Code>(.*?)</Code>(?:\s*<Message>(.*?)</Message>)?", text):
        return f"{answer[1]} ({answer[2].rstrip('.')})" if answer[2] else answer[1]
    if "builder error" in text:
        return "plain http://"
    line, _, details = text.partition("\n")
    cause = re.search(r'message: "(.+?)"|(?<=")(dns error)(?=")', details)
    return cause[0].removeprefix('message: "').rstrip('"') if cause else line.rpartition(" - ")[2].strip(" :")
