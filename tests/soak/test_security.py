"""What takes Ray half a minute: a driver with another token than the cluster's."""

from __future__ import annotations

from pathlib import Path

import pytest
from laboratory import Lab


def test_a_driver_that_the_cluster_does_not_know_is_told_so_and_keeps_its_token_private(
    ray_address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab, token = Lab.new(tmp_path / "lab"), tmp_path / ".ray/auth_token"
    token.parent.mkdir()
    token.write_text("0" * 64)
    token.chmod(0o644)
    monkeypatch.setenv("HOME", str(tmp_path))
    running = lab.start("ingest", lab.file, address=ray_address)
    assert running.finish() == 1
    assert (
        f"Failed to connect to Ray cluster at {ray_address}. Expected a Ray of this version" in running.text
    )
    assert token.stat().st_mode & 0o777 == 0o600
