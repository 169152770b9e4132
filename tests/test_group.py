"""Two workers of one training, as two processes connected by gloo: they compute what one computes."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import distributed
from trainings import BASE

from pipeline.training.base import BaseTraining
from pipeline.training.group import ALONE, Group, PeerLost

SETTINGS = replace(BASE, batch=4, transform_rate=0.3)
STEPS = 3


def training(group: Group, seed: int = 3) -> BaseTraining:
    """Of images of several sizes, one smaller than a crop."""
    generator = np.random.default_rng(0)
    images = [
        generator.integers(256, size=(*size, 3), dtype=np.uint8) for size in ((96, 80), (70, 110), (50, 40))
    ]
    return BaseTraining(replace(SETTINGS, seed=seed), images, group=group)


def digest(this: BaseTraining) -> str:
    return hashlib.sha256(this.to_bytes()).hexdigest()


def join(folder: str, rank: int) -> Group:
    distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    return Group.of_process()


def second_worker(folder: str) -> None:
    """In a process of its own: begins with other weights, and takes those of the first; dies before the last step."""
    torch.set_num_threads(1)
    group = join(folder, 1)
    this = training(group, seed=4)
    this.settings = replace(this.settings, seed=3)
    this.resume(group.from_first(b""))
    for _ in range(STEPS):
        this.advance()
    Path(folder, "second").write_text(digest(this))
    os._exit(0)


@pytest.fixture
def group(tmp_path: Path) -> Iterator[Group]:
    """This process, as the first of two."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    second = subprocess.Popen([sys.executable, __file__, str(tmp_path)])
    yield join(str(tmp_path), 0)
    assert second.wait(10) == 0
    distributed.destroy_process_group()
    torch.set_num_threads(before)


def test_two_workers_take_the_steps_of_one(group: Group, tmp_path: Path) -> None:
    assert (group, Group.of_process()) == (Group(0, 2), group)
    ours, alone = training(group), training(ALONE)
    group.from_first(ours.to_bytes())
    for _ in range(STEPS):
        assert ours.advance() == pytest.approx(alone.advance(), rel=1e-5)
    theirs = alone.network.state_dict()
    for name, leaf in ours.network.state_dict().items():
        torch.testing.assert_close(leaf, theirs[name], rtol=1e-3, atol=1e-5)
    with pytest.raises(PeerLost, match="a worker of this training is gone: "):
        ours.advance()
    assert digest(ours) == (tmp_path / "second").read_text()  # no step was taken


def test_a_batch_that_cannot_be_shared_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"a batch that 3 workers can share equally, found 4: name a multiple of 3"
    ):
        training(Group(0, 3))


if __name__ == "__main__":
    second_worker(sys.argv[1])
