"""Tasks on a real Ray: bounded, streamed, retried when a worker is lost, with their own threads and whole errors."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from laboratory import wait_until

from jobs import head
from jobs.cluster import (
    LOST_WORKER_RETRIES,
    Cluster,
    Interrupted,
    TaskFailed,
)
from jobs.shares import InfeasibleResources, Share

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import this file
HALF = Share(num_cpus=0.5)  # four at once on the 2 CPUs of the tests


@pytest.fixture
def cluster(ray_address: str) -> Iterator[Cluster]:
    cluster = Cluster()
    yield cluster
    cluster.stop()
    assert ray.is_initialized()  # it was there before


def square(number: int) -> int:
    return number * number


def leave_a_mark(folder: str, number: int) -> int:
    """Say that it runs, and wait until it is told to end."""
    Path(folder, f"running-{number}").touch()
    while not Path(folder, f"end-{number}").exists():
        time.sleep(0.01)
    return number


def fail_or_mark(folder: str, number: int) -> None:
    if number == 0:
        raise ValueError(f"image {number} has no pixels")
    time.sleep(0.2)
    Path(folder, f"finished-{number}").touch()


def die_at_first(folder: str, deaths: int) -> int:
    """Killed, as by the kernel when memory runs out, in the first few attempts."""
    attempt = len(list(Path(folder).iterdir()))
    Path(folder, str(attempt)).touch()
    if attempt < deaths:
        os.kill(os.getpid(), signal.SIGKILL)
    return attempt


def count_with_death(folder: str, last: int) -> Iterator[int]:
    """Goes on from where its last attempt was; killed once on the way."""
    position = len(list(Path(folder).iterdir()))
    for number in range(position, last):
        Path(folder, str(number)).touch()
        yield number
        if number == 2:
            time.sleep(0.5)  # what was yielded is on its way
            os.kill(os.getpid(), signal.SIGKILL)


def count_then_fail(last: int) -> Iterator[int]:
    for number in range(last):
        yield number * number
    raise ValueError(f"nothing after {last}")


def threads() -> tuple[int, int, int]:
    import numba
    import torch

    return os.getpid(), torch.get_num_threads(), numba.get_num_threads()


def test_map_gives_each_item_with_its_result(cluster: Cluster) -> None:
    assert dict(cluster.map(square, [(n,) for n in range(10)], Share())) == {(n,): n * n for n in range(10)}
    assert cluster.run(square, (7,), Share()) == 49
    assert list(cluster.map(square, [], Share())) == []


def test_map_keeps_no_more_in_flight_than_it_may(cluster: Cluster, tmp_path: Path) -> None:
    taken = []

    def items() -> Iterator[tuple[str, int]]:
        for number in range(5):
            taken.append(number)
            yield str(tmp_path), number

    results = cluster.map(leave_a_mark, items(), Share(num_cpus=0.5, in_flight=2))
    for number in range(5):
        (tmp_path / f"end-{number}").touch()
        assert next(results)[1] == number
        assert len(taken) <= number + 2
        assert len(list(tmp_path.glob("running-*"))) <= number + 2


def test_an_error_comes_with_its_traceback_after_the_others_finished(
    cluster: Cluster, tmp_path: Path
) -> None:
    done = []
    with pytest.raises(TaskFailed) as failed:
        done += [item for item, _ in cluster.map(fail_or_mark, [(str(tmp_path), n) for n in range(4)], HALF)]
    assert str(failed.value) == "ValueError: image 0 has no pixels"
    (note,) = failed.value.__notes__
    assert "in fail_or_mark" in note
    assert "\x1b" not in note  # no terminal colours
    assert sorted(tmp_path.iterdir()) == [tmp_path / f"finished-{n}" for n in (1, 2, 3)]


def test_a_lost_worker_is_made_up_for(cluster: Cluster, tmp_path: Path) -> None:
    assert cluster.run(die_at_first, (str(tmp_path), 1), Share()) == 1


def test_a_task_that_loses_every_worker_fails(cluster: Cluster, tmp_path: Path) -> None:
    with pytest.raises(TaskFailed, match="WorkerCrashedError"):
        cluster.run(die_at_first, (str(tmp_path), 99), Share())
    assert len(list(tmp_path.iterdir())) == 1 + LOST_WORKER_RETRIES


def test_stream_gives_messages_before_the_task_ends(cluster: Cluster, tmp_path: Path) -> None:
    messages = cluster.stream(wait_between, (str(tmp_path),), Share())
    assert next(messages) == "first"
    (tmp_path / "go").touch()
    assert list(messages) == ["last"]


def wait_between(folder: str) -> Iterator[str]:
    yield "first"
    while not Path(folder, "go").exists():
        time.sleep(0.01)
    yield "last"


def test_stream_goes_on_after_a_lost_worker(cluster: Cluster, tmp_path: Path) -> None:
    assert list(cluster.stream(count_with_death, (str(tmp_path), 6), Share())) == [0, 1, 2, 3, 4, 5]


def test_stream_tells_an_error_after_what_came_before(cluster: Cluster) -> None:
    messages = cluster.stream(count_then_fail, (3,), Share())
    seen = [next(messages) for _ in range(3)]
    with pytest.raises(TaskFailed, match="ValueError: nothing after 3") as failed:
        next(messages)
    assert seen == [0, 1, 4]
    assert "in count_then_fail" in failed.value.__notes__[0]


def test_each_task_has_the_threads_of_its_own_resources(cluster: Cluster) -> None:
    seen = [cluster.run(threads, (), Share(num_cpus=count)) for count in (1, 2, 1, 2)]
    assert [(torch, numba) for _, torch, numba in seen] == [(1, 1), (2, 2), (1, 1), (2, 2)]
    assert len({pid for pid, _, _ in seen}) < 4  # or this shows nothing about workers that are used again


def test_impossible_resources_are_told_at_once(cluster: Cluster) -> None:
    with pytest.raises(InfeasibleResources) as told:
        cluster.require({"train": Share(num_cpus=2), "quantize": Share(num_cpus=99)})
    assert str(told.value) == (
        "resources.quantize.num_cpus: a task wants 99, but no node has more than 2: Ray would wait for ever. "
        "Lower it, as in --set resources.quantize.num_cpus=2, or add a node"
    )
    with pytest.raises(InfeasibleResources) as told:
        cluster.require({"train": Share(num_cpus=1, workers=3)})
    assert str(told.value) == (
        "resources.train.workers: 3 are to work at once, each with num_cpus 1 and num_gpus 0, but all nodes together "
        "have room for 2: Ray would wait for ever. Lower it, as in --set resources.train.workers=2, or what each "
        "occupies, or add a node"
    )
    with pytest.raises(InfeasibleResources, match=r"num_gpus: a task wants 8, but no node has more than \d"):
        cluster.run(square, (1,), Share(num_gpus=8))


def test_an_interruption_ends_tasks_at_once_and_lets_no_more_begin(cluster: Cluster, tmp_path: Path) -> None:
    caught: list[BaseException] = []

    def wait_for(number: int) -> None:
        try:
            cluster.run(leave_a_mark, (str(tmp_path), number), HALF)
        except Interrupted as error:
            caught.append(error)

    waiting = [threading.Thread(target=wait_for, args=(number,)) for number in range(2)]
    for thread in waiting:
        thread.start()
    wait_until(lambda: len(list(tmp_path.glob("running-*"))) == 2, "both tasks")
    cluster.interrupt()
    for thread in waiting:
        thread.join(10)
    assert len(caught) == 2
    with pytest.raises(Interrupted):
        cluster.run(square, (1,), Share())
    assert Cluster().run(square, (3,), Share()) == 9  # Ray itself goes on


def test_a_head_that_does_not_answer_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "ASK_EVERY_S", 0.1)
    monkeypatch.setattr(head, "SILENT_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as server:
        one = head.Head(f"127.0.0.1:{server.getsockname()[1]}")
        one.wait()
        time.sleep(0.6)
        one.look()
    with pytest.raises(head.HeadLost) as told:
        one.wait()
    assert str(told.value) == (
        f"the head of the Ray cluster at {one.address} has not answered for 1 s: its machine, its network or Ray on it "
        "is gone. Start the cluster again and give the same command, with the new --address if that has changed"
    )


def test_the_work_of_workers_is_counted_without_the_waiting(cluster: Cluster) -> None:
    before = cluster.worked_s()
    for _ in cluster.map(time.sleep, [(0.2,), (0.2,)], Share(num_cpus=1)):
        pass
    assert 0.4 <= cluster.worked_s() - before < 2
