"""A workspace on an S3 server: a whole run, damage that is noticed, and failures that a person understands."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
from laboratory import Lab
from s3_server import S3Server
from test_latents import damaged, latents

from jobs import cli
from storage.blobs import BlobError
from storage.errors import StoreError
from storage.latents import LatentError, LatentSet
from storage.lineage import default_tracking_uri
from storage.objects import Objects
from storage.workspace import Workspace

ROOT = Path(__file__).parents[1]
KEY = "ab" * 32
NOBODY = "http://127.0.0.1:9"  # where no server listens
Told = Callable[..., tuple[int, str]]


@pytest.fixture
def told(bucket: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Told:
    """Exit code and all words of a `retrellis` command on the workspace of `bucket`."""

    def call(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["retrellis", *arguments, "--workspace", f"{bucket}/ws"])
        with pytest.raises(SystemExit) as end:
            cli.main()
        output = capsys.readouterr()
        return int(end.value.code or 0), output.out + output.err

    return call


def test_a_whole_run_gives_what_it_gives_in_a_folder(reference: Lab, bucket: str, told: Told) -> None:
    lab = reference.beside(f"{bucket}/ws")
    printed = lab.run(tracking=None)
    assert f"{lab.root}/reports/small/report.md" in printed
    assert lab.content() == reference.content()
    for quantizer, arm in (("urq", "base"), ("tcq4", "scale")):
        assert lab.scores(quantizer, arm) == reference.scores(quantizer, arm)
    assert lab.workspace.list("claims") == lab.checkpoints() == []
    assert "26 to reuse, 0 to compute" in lab.plan()
    code, words = told("status")
    assert (code, words.count(" done ")) == (0, 26)
    code, words = told("latents", "ls")
    assert (code, words.count("4 finetune"), words.count(" small ")) == (0, 2, 2)
    code, words = told("latents", "verify")
    assert (code, words.count("2 of 2 part(s) as recorded")) == (0, 2)
    client = mlflow.MlflowClient(default_tracking_uri(lab.root))  # in this node's scratch
    experiment = client.get_experiment_by_name("small")
    assert experiment is not None
    assert len(client.search_runs([experiment.experiment_id])) == 27


def test_a_flipped_bit_is_named_withdrawn_and_cleared(bucket: str, told: Told, tmp_path: Path) -> None:
    workspace = Workspace.open(f"{bucket}/ws")
    stored = LatentSet(workspace, KEY)
    bad, good = (stored.write_part(bucket, [latents(n)]) for n, bucket in enumerate("01"))
    name = f"{bad['group']}/{max(bad['objects'], key=lambda entry: entry['size'])['name']}"
    workspace.put(name, damaged(workspace.get(name), "bit flip"))
    with pytest.raises(LatentError, match=f"damaged at {bucket}/ws/{name}: expected .* of SHA-256"):
        LatentSet(workspace, KEY).read(latents(0).digest)
    code, words = told("latents", "verify", "--repair")
    assert code == 1
    assert f"bad part {bad['part']}: {bucket}/ws/{name}: expected" in words
    code, words = told("latents", "show", "abab")
    assert (code, words.count(good["part"]), words.count(bad["part"])) == (0, 1, 1)
    code, words = told("latents", "export", "abab", str(tmp_path / "plain"))
    assert (code, "wrote 1 image(s)" in words) == (0, True)
    code, words = told("latents", "gc", "--delete", "--grace-days", "0", "--older-than", "1")
    assert f"deleted retired part abababab {bad['part']}" in words
    assert workspace.list(bad["group"]) == []
    assert len(workspace.list(good["group"])) == len(good["objects"])


def test_a_store_that_fails_is_no_fault_of_a_part(s3_server: S3Server, bucket: str, told: Told) -> None:
    stored = LatentSet(Workspace.open(f"{bucket}/ws"), KEY)
    group = stored.write_part("0", [latents(0)])["group"]
    s3_server.fault = lambda request: "403 Forbidden" if f"{group}/" in request.path else ""
    code, words = told("latents", "verify", "--repair")
    assert (code, "expected access at" in words, "bad part" in words) == (1, True, False)
    s3_server.mend()
    assert len(stored.part_names()) == 1


def test_a_moment_s_outage_is_waited_for(s3_server: S3Server, bucket: str) -> None:
    objects, faults = Objects(f"{bucket}/ws"), ["503 Slow Down"] * 3
    s3_server.fault = lambda request: faults.pop() if faults else ""
    objects.put("a", b"data")
    assert (objects.get("a"), faults) == (b"data", [])


def test_a_record_is_known_again_where_the_answer_was_lost(s3_server: S3Server, bucket: str) -> None:
    records, faults = Workspace.open(f"{bucket}/ws").records, ["500 Internal Server Error"]
    s3_server.fault = lambda request: faults.pop() if faults and request.kind == "PUT" else ""
    s3_server.loses_answers = True
    assert records.create("a", {"attempt": "mine"}) is True
    assert faults == []
    assert records.create("a", {"attempt": "another's"}) is False


def test_of_several_who_create_at_one_moment_s3_may_turn_all_away(
    s3_server: S3Server, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    records, faults = Workspace.open(f"{bucket}/ws").records, ["409 Conflict"] * 2
    s3_server.fault = lambda request: faults.pop() if faults and request.kind == "PUT" else ""
    assert records.create("a", {"attempt": "mine"}) is True
    assert records.get("a") == {"attempt": "mine"}
    s3_server.fault = lambda request: "409 Conflict" if request.kind == "PUT" else ""
    monkeypatch.setattr("storage.objects._CONFLICT_WAITS_S", (0.0, 0.0))
    with pytest.raises(
        StoreError, match=f"{bucket}/ws/records/b.json: expected to create it or to find it there"
    ):
        records.create("b", {"attempt": "mine"})


CREDENTIALS = "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (
            {"AWS_ENDPOINT_URL": NOBODY},
            f"a server that answers at {NOBODY}, found Connection refused. Set AWS_ENDP",
        ),
        (
            {"AWS_ENDPOINT_URL": "localhost:9000"},
            "https://… or http://… in AWS_ENDPOINT_URL, found 'localhost:9000'",
        ),
        (
            {"AWS_ALLOW_HTTP": None},
            "https:// at http://.*, found plain http://. If .*, set AWS_ALLOW_HTTP=true",
        ),
        (
            {"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None, "AWS_METADATA_ENDPOINT": NOBODY},
            f"credentials at {NOBODY}, found Connection refused. {CREDENTIALS} .*, on every node",
        ),
        (
            {"AWS_SECRET_ACCESS_KEY": None},
            f"credentials at its server, found .*Missing SecretAccessKey. {CREDENTIALS}",
        ),
    ],
)
def test_a_server_that_cannot_be_reached(
    environment: dict[str, str | None], message: str, bucket: str, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name)
    assert_one_line(told("status"), f"workspace {bucket}/ws: expected {message}")


def test_wrong_credentials(s3_server: S3Server, bucket: str, told: Told) -> None:
    s3_server.check_credentials()
    message = (
        rf"expected access at {s3_server.url}, found InvalidAccessKeyId \(.*\). {CREDENTIALS} .* read, write"
    )
    assert_one_line(told("status"), f"workspace {bucket}/ws: {message}")
    with pytest.raises(StoreError, match=message):
        Objects(bucket).list("records")


def test_a_bucket_in_another_region(s3_server: S3Server, bucket: str, told: Told) -> None:
    s3_server.fault = lambda request: "301 Moved Permanently"
    message = f"expected a bucket in the region of AWS_REGION at {s3_server.url}, found .*. Set AWS_REGION to the one"
    assert_one_line(told("status"), f"workspace {bucket}/ws: {message}")


def test_no_such_bucket_and_no_such_workspace(s3_server: S3Server, bucket: str, told: Told) -> None:
    assert_one_line(
        told("status"), f"no workspace at {bucket}/ws: expected a file workspace.json there. Name"
    )
    message = rf"expected a bucket of that name at {s3_server.url}, found NoSuchBucket \(.*\). Make it, or name another"
    for act in (Workspace.open, lambda root: Objects(root).list("records")):
        with pytest.raises(StoreError, match=f"^workspace {bucket}-none/ws: {message}"):
            act(f"{bucket}-none/ws")
    for url in ("gs://bucket/ws", "s3://", "s3:///ws"):
        with pytest.raises(StoreError, match=f"^workspace {url}: expected a folder or s3://bucket/prefix"):
            Workspace.open(url)


def test_a_server_that_replaces_what_should_be_created_is_refused(s3_server: S3Server, bucket: str) -> None:
    s3_server.knows_conditions = False
    with pytest.raises(
        StoreError, match=f"workspace {bucket}/ws: expected a store that .* knows If-None-Match"
    ):
        Workspace.open(f"{bucket}/ws")


def test_a_damaged_blob_is_named(bucket: str) -> None:
    workspace = Workspace.open(f"{bucket}/ws")
    digest = workspace.blobs.put(b"weights", ".bin")
    workspace.put(f"blobs/{digest[:2]}/{digest}.bin", b"weightz")
    with pytest.raises(
        BlobError, match=f"blob {bucket}/ws/blobs/.*.bin is damaged: expected SHA-256 {digest}"
    ):
        workspace.blobs.get(digest)


def test_the_lines_of_the_docs_read_an_image(bucket: str) -> None:
    workspace, image = f"{bucket}/ws", latents(0)
    record = LatentSet(Workspace.open(workspace), KEY).write_part("0", [latents(1), image])
    opening, reading = (
        re.findall(r"```python\n(.*?)```", (ROOT / f"docs/{page}.md").read_text(), re.DOTALL)
        for page in ("storage", "latents")
    )
    found: dict[str, Any] = {
        "workspace": workspace,
        "record": json.loads(json.dumps(record)),
        "i": 1,
        "np": np,
    }
    exec(opening[0] + reading[0].partition("\n")[2] + reading[1], found)
    np.testing.assert_array_equal(found["indices"], image.indices)


def assert_one_line(told: tuple[int, str], message: str) -> None:
    """A command ended with one line that says this, and nothing of what a library dumps."""
    code, words = told
    assert code == 1
    assert re.fullmatch(f"retrellis: {message}.*\n", words), words
