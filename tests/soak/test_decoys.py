"""Where a command is started decides nothing: its workers find our packages all the same."""

from __future__ import annotations

from pathlib import Path

from laboratory import Lab


def test_folders_of_our_names_where_it_is_started_are_not_ours(reference: Lab, tmp_path: Path) -> None:
    decoys = tmp_path / "decoys"
    for name in ("jobs", "storage", "pipeline"):
        (decoys / name).mkdir(parents=True)
        (decoys / name / "__init__.py").write_text(f"raise ImportError('the wrong {name}')\n")
    lab = reference.beside(tmp_path / "workspace")
    run = lab.start("quantize", lab.file, "--only", "quantizer=tcq4", cwd=decoys)  # with a Ray of its own
    assert run.finish() == 0, run.text
    assert lab.content().items() <= reference.content().items()
    assert len(lab.parts()) > 0
