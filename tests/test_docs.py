"""Documents against the code: keys of the experiment file, commands, links, experiments."""

import re
from pathlib import Path
from typing import Any, get_args

import pytest
import typer
from pydantic.fields import FieldInfo
from ruamel.yaml import YAML

from jobs import arms, experiment, resources
from jobs.cli import app
from jobs.fields import Section
from jobs.quantizer_section import QuantizerSection

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
DOCUMENTS += sorted((ROOT / "docs").rglob("*.md"))
SECTIONS: dict[str, type[Section]] = {
    "The file": experiment.Experiment,
    "Images": experiment.Images,
    "`train`": experiment.Train,
    "`codec`": experiment.ForeignCodec,
    "`latents`": experiment.Latents,
    "`tune`": experiment.Tune,
    "`quantizers`": QuantizerSection,
    "`arms`": arms.Arm,
    "`evaluate`": experiment.Evaluate,
    "`report`": experiment.Report,
    "`resources`": resources.TrainResources,
}


def _documented() -> dict[str, dict[str, str]]:
    """Section title -> key -> what the default column says."""
    parts = re.split(r"^## (.*)$", (ROOT / "docs/experiment.md").read_text(), flags=re.MULTILINE)
    rows = re.compile(r"^\| `(\w+)` \| ([^|]*) \|", re.MULTILINE)
    return {title: dict(rows.findall(text)) for title, text in zip(parts[1::2], parts[2::2], strict=True)}


def _default(field: FieldInfo) -> Any:
    """A field's default as a plain value; a section with only defaults is `{}`."""
    return {} if isinstance(field.default, Section) else field.default


def _cell(text: str) -> Any:
    return None if text == "none" else YAML(typ="safe", pure=True).load(text.strip("`"))


def test_every_section_is_documented() -> None:
    assert list(_documented()) == list(SECTIONS)


@pytest.mark.parametrize("title", SECTIONS)
def test_keys_and_defaults_are_those_of_the_models(title: str) -> None:
    fields, documented = dict(SECTIONS[title].model_fields), _documented()[title]
    if SECTIONS[title] is resources.TrainResources:  # one table for all stages
        for others in (resources.QuantizeResources, resources.FinetuneResources):
            fields |= {name: f for name, f in others.model_fields.items() if name not in fields}
    assert list(documented) == list(fields)
    for name, field in fields.items():
        if field.is_required():
            assert documented[name] == "required", name
        else:
            assert _cell(documented[name]) == _default(field), name


def test_every_choice_is_documented() -> None:
    text = (ROOT / "docs/experiment.md").read_text()
    for section in SECTIONS.values():
        for name, field in section.model_fields.items():
            for choice in _choices(field.annotation):
                assert choice.removeprefix("ungerboeck") in text, f"{name}: {choice}"


def _choices(annotation: Any) -> list[str]:
    """The strings of the literals in a type."""
    inner = get_args(annotation)
    return [c for a in inner for c in _choices(a)] + [a for a in inner if isinstance(a, str)]


@pytest.mark.parametrize("file", sorted((ROOT / "experiments").glob("*.yaml")), ids=lambda path: path.name)
def test_experiments_load(file: Path) -> None:
    assert experiment.load(str(file)).name


@pytest.mark.parametrize(
    "document",
    [*DOCUMENTS, ROOT / "ray_cluster.yaml", *sorted(ROOT.glob("deploy/*.yaml"))],
    ids=lambda path: path.name,
)
def test_commands_and_options_exist(document: Path) -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    text = document.read_text().replace("\\\n", " ")
    for name, rest in re.findall(r"\bretrellis ([a-z]+)\b([^\n`#;]*)", text):
        assert name in commands, f"retrellis {name}"
        command, words = commands[name], rest.split()
        if hasattr(command, "commands") and words and words[0].isalpha():  # a group
            assert words[0] in command.commands, f"retrellis {name} {words[0]}"
            command = command.commands[words[0]]
        known = {option for parameter in command.params for option in parameter.opts}
        for option in re.findall(r"(?<=\s)--[a-z-]+", rest):
            assert option in known, f"retrellis {name} {option}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    text = document.read_text()
    links = re.findall(r"\]\(([^)#]+)", text) + re.findall(r'(?:src|srcset)="([^"]+)"', text)
    for link in links:
        assert "://" in link or (document.parent / link).exists(), link


def test_structure_names_every_module() -> None:
    text = (ROOT / "docs/design/structure.md").read_text()
    for package in ("pipeline", "storage", "jobs"):
        for module in (ROOT / package).rglob("*.py"):
            named = module.stem if module.parent.name == "lineage" else module.name
            assert module.stem == "__init__" or re.search(rf"\b{re.escape(named)}\b", text), module
