"""`start_at`: a finetuning that begins while its set is being filled computes what it would have computed after."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from laboratory import Lab, wait_until

from jobs import early
from jobs.finetune import early_key, finetune_codec
from jobs.loop import Message, Place, Schedule
from jobs.quantize import quantized
from jobs.shares import Share, fit_together
from jobs.stage import Output
from storage.buckets import binary
from storage.claims import Claims
from storage.digests import Digests
from storage.latents import LatentError, LatentSet
from storage.parts import PartImage

TCQ = {"quantizer": "tcq4"}
ONE = "arms.paper.batch=1"  # image a step: the first half of the set, by digests, has no more
EARLY = ("resources.finetune.start_at=0.1", "resources.finetune.checkpoint_every=1")


pytestmark = pytest.mark.usefixtures("one_thread")


class Filled:
    """A finetuning of the reference, and its set as far as it is filled."""

    def __init__(self, reference: Lab, root: Path, arm: str) -> None:
        self.lab = reference.copy(root, without=["quantize", "finetune"])
        self.record = reference.record("finetune", arm=arm, **TCQ)
        latents = reference.record("quantize", **TCQ)["outputs"]["latents"]
        self.inputs: dict[str, Output] = {
            "codec": reference.record("train")["outputs"]["codec"],
            "tables": reference.record("tables", **TCQ)["outputs"]["tables"],
            "images": reference.record("ingest", images="train")["outputs"]["images"],
            "latents": latents,
        }
        stored = LatentSet(reference.workspace, latents["note"]["set"])
        self.images = list(stored.read_many(sorted(stored.images())))
        self.set = LatentSet(self.lab.workspace, latents["note"]["set"])

    def write(self, *images: PartImage) -> None:
        for image in images:
            self.set.write_part(binary(image.digest, 4), [image])

    def messages(self, *, whole: bool = False, steps: int = 6) -> Iterator[Message]:
        """What the worker tells; its latents have no digest unless the set is `whole`."""
        settings = self.record["ingredients"]["settings"]
        latents = self.inputs["latents"]
        unknown: Output = {**latents, "digest": "", "note": {"set": self.set.key}}
        inputs = self.inputs | {"latents": latents if whole else unknown}
        name = early_key(settings, inputs)
        key = self.record["key"] if whole else name
        place = Place(self.lab.root, "finetune", key, "whole" if whole else "early", name)
        return finetune_codec(place, Schedule(steps, 1, 1), settings, inputs, False)

    def stop_after_two_steps(self) -> None:
        """Of which the first has left a checkpoint."""
        messages = self.messages()
        assert [next(m for m in messages if m.get("step") == step) for step in (1, 2)]
        messages.close()  # type: ignore[attr-defined]


@pytest.fixture(params=["paper", "scale"])
def filled(request: pytest.FixtureRequest, reference: Lab, tmp_path: Path) -> Filled:
    return Filled(reference, tmp_path / "workspace", request.param)


def digest_of(messages: Iterator[Message]) -> str:
    return str(list(messages)[-1]["outputs"]["codec"]["digest"])


def test_a_set_that_fills_meanwhile_gives_the_same_codec(filled: Filled) -> None:
    """Each image is written just before the batch that needs it; the second epoch begins with the fourth step."""
    filled.write(*filled.images[:2])
    last: Message = {}
    for last in filled.messages():
        if last.get("step") in (1, 2):
            filled.write(*filled.images[2 * last["step"] : 2 * last["step"] + 2])
    assert last["outputs"]["codec"]["digest"] == filled.record["outputs"]["codec"]["digest"]


def test_checkpoints_of_the_early_key_are_gone_on_from(filled: Filled) -> None:
    filled.write(*filled.images[:4])
    filled.stop_after_two_steps()
    filled.write(*filled.images[4:])
    again = list(filled.messages(whole=True))
    assert {"say": "resumed at step 1 from a checkpoint", "step": 1} in again
    assert again[-1]["outputs"]["codec"]["digest"] == filled.record["outputs"]["codec"]["digest"]


def test_a_checkpoint_of_other_latents_is_left_out(filled: Filled) -> None:
    """A part is withdrawn and computed again on a machine that rounds differently."""
    first = filled.images[0]
    filled.write(replace(first, indices=first.indices + 1), *filled.images[1:4])
    filled.stop_after_two_steps()
    filled.set.retire(filled.set.images()[first.digest].part, "another machine's")
    filled.write(first, *filled.images[4:])
    again = list(filled.messages(whole=True))
    assert "latents that have been replaced" in again[1]["say"]
    assert again[-1]["outputs"]["codec"]["digest"] == filled.record["outputs"]["codec"]["digest"]


def test_parts_replaced_while_they_are_read_end_it(filled: Filled) -> None:
    first = filled.images[0]
    filled.write(replace(first, indices=first.indices + 1), *filled.images[1:2])
    messages = filled.messages()
    next(m for m in messages if m.get("step") == 1)
    filled.set.retire(filled.set.images()[first.digest].part, "another machine's")
    filled.write(first, *filled.images[2:])
    with pytest.raises(LatentError, match="Run again, and it begins anew"):
        list(messages)


def test_what_was_read_before_a_resume_is_checked_too(filled: Filled) -> None:
    first = filled.images[0]
    filled.write(replace(first, indices=first.indices + 1), *filled.images[1:4])
    filled.stop_after_two_steps()
    resumed = filled.messages()
    assert next(resumed)["say"].startswith("copying")
    assert next(resumed)["say"] == "resumed at step 1 from a checkpoint"
    filled.set.retire(filled.set.images()[first.digest].part, "another machine's")
    filled.write(first, *filled.images[4:])
    with pytest.raises(LatentError, match="Run again, and it begins anew"):
        list(resumed)


def test_an_image_that_comes_late_is_not_slipped_in(filled: Filled) -> None:
    """One run has given it up, another one has it quantized after all."""
    filled.write(filled.images[0], *filled.images[2:4])
    filled.set.give_up(filled.images[1].digest, "a lost worker")
    messages = filled.messages()
    next(m for m in messages if m.get("step") == 1)
    filled.write(filled.images[1], *filled.images[4:])
    with pytest.raises(LatentError, match="an image that was given up is there now"):
        list(messages)


def test_an_image_that_is_given_up_is_left_out_of_both(reference: Lab, tmp_path: Path) -> None:
    filled = Filled(reference, tmp_path / "workspace", "paper")
    filled.write(*filled.images[:2])
    last: Message = {}
    for last in filled.messages():
        if last.get("step") == 1:
            filled.set.give_up(filled.images[2].digest, "it crashes the encoder")
            filled.write(*filled.images[3:])
    given_up = [filled.images[2].digest]
    latents = filled.inputs["latents"]
    latents = {**latents, "note": latents["note"] | {"given_up": given_up}}
    names = quantized(Digests.of(image.digest for image in filled.images), latents)
    filled.inputs["latents"] = {**latents, "digest": filled.set.content_digest(names)}
    filled.lab.workspace.delete("attempts")
    assert last["outputs"]["codec"]["digest"] == digest_of(filled.messages(whole=True))


@pytest.fixture
def held(reference: Lab, tmp_path: Path) -> Iterator[tuple[Lab, threading.Event]]:
    """A copy without latents, and another run's claim on the second half of them, until the event is set."""
    lab = reference.copy(tmp_path / "workspace", without=["quantize", "finetune", "evaluate", "report"])
    key = reference.record("quantize", **TCQ)["outputs"]["latents"]["note"]["set"]
    release = threading.Event()
    taken = threading.Event()

    def hold() -> None:
        with Claims(lab.workspace, f"claims/{key}").hold("1") as mine:
            assert mine
            taken.set()
            release.wait(120)

    with ThreadPoolExecutor(1) as pool:
        claim = pool.submit(hold)
        assert taken.wait(10)
        yield lab, release
        release.set()
        claim.result()


def finetune(lab: Lab, *overrides: str) -> str:
    return lab.run(ONE, *overrides, stage="finetune", only=TCQ | {"arm": "paper"})


def test_what_is_finished_under_its_early_key_is_not_begun_again(held: tuple[Lab, threading.Event]) -> None:
    """As where a part was withdrawn: once the set is whole again, the result is found by its key."""
    lab, release = held
    release.set()
    finetune(lab)
    before = lab.records("results/finetune")
    latents = LatentSet(lab.workspace, lab.record("quantize", **TCQ)["outputs"]["latents"]["note"]["set"])
    latents.retire(latents.part_names()[0], "a test")
    said = finetune(lab, *EARLY)
    assert "done: quantize" in said
    assert "early" not in said
    assert "finetune lmbda=0.013 quantizer=tcq4 arm=paper seed=0: 6/6 steps" not in said
    assert lab.records("results/finetune") == before


def outcome(lab: Lab) -> tuple[str, Any, Any]:
    (record,) = (
        r for r in lab.records("results/finetune").values() if r["ingredients"]["settings"]["batch"] == 1
    )
    return record["key"], record["outputs"]["codec"], record["reads"]


@pytest.fixture(scope="module")
def expected(reference: Lab, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any, Any]:
    """What comes out of a finetuning that begins when its set is whole."""
    lab = reference.copy(tmp_path_factory.mktemp("expected") / "workspace")
    finetune(lab)
    return outcome(lab)


def test_a_run_begins_early_and_records_the_same(
    held: tuple[Lab, threading.Event], expected: tuple[str, Any, Any]
) -> None:
    lab, release = held
    with ThreadPoolExecutor(1) as pool:
        run = pool.submit(finetune, lab, *EARLY)
        wait_until(lab.checkpoints, "early checkpoint", lambda: not run.done())
        assert not lab.records("results/quantize")
        release.set()
        said = run.result()
    assert "early: finetune lmbda=0.013 quantizer=tcq4 arm=paper seed=0" in said
    assert outcome(lab) == expected
    assert not lab.workspace.list("attempts")


def test_one_that_waits_in_vain_is_withdrawn_and_goes_on(
    held: tuple[Lab, threading.Event], expected: tuple[str, Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    lab, release = held
    monkeypatch.setattr(early, "PATIENCE_S", 2.0)
    with ThreadPoolExecutor(1) as pool:
        run = pool.submit(finetune, lab, *EARLY)
        wait_until(lambda: lab.records("failures"), "withdrawal", lambda: not run.done())
        release.set()
        said = run.result()
    assert "withdrawn: finetune" in said
    assert "it goes on when all are there" in said
    assert "from a checkpoint" in said
    assert outcome(lab) == expected


class Nodes:
    """What Ray says of its nodes."""

    def __init__(self, *cpus: float) -> None:
        self._cpus = cpus

    def nodes(self) -> list[dict[str, Any]]:
        return [{"Alive": True, "Resources": {"CPU": cpus}} for cpus in self._cpus]


def test_room_is_looked_for_node_by_node() -> None:
    one, two, four = Share(1), Share(2), Share(4)
    assert fit_together(Nodes(2), [one, one])
    assert not fit_together(Nodes(2), [two, one])
    assert fit_together(Nodes(2, 2), [one, two])
    assert not fit_together(Nodes(2, 2), [four, one])
    assert not fit_together(Nodes(3, 3), [Share(2, workers=3)])
    assert not fit_together(Nodes(8), [Share(1, num_gpus=1)])
