"""Claims: one holder at a time, and a dead one's bucket passes on."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

import pytest

from storage.claims import Claims
from storage.objects import Objects

FOLDER = "claims/set"


@pytest.fixture
def lifetime_s(objects: Objects) -> float:
    """As short as the store's clock allows: S3's counts whole seconds."""
    return 2.0 if "://" in objects.root else 0.3


def test_one_holds_and_the_next_one_may_after_it(objects: Objects) -> None:
    first, second = Claims(objects, FOLDER), Claims(objects, FOLDER)
    with first.hold("101") as held:
        assert held
        with second.hold("101") as also:
            assert not also
    with second.hold("101") as held:
        assert held
    assert objects.list(FOLDER) == []


@pytest.mark.parametrize(
    ("mine", "theirs"),
    [("10", "101"), ("101", "10"), ("", "0"), ("1" * 13, "1" * 14), ("1" * 14, "1"), ("1", "1" * 14)],
)
def test_buckets_of_other_sizes_meet(objects: Objects, mine: str, theirs: str) -> None:
    claims = Claims(objects, FOLDER)
    with claims.hold(mine), claims.hold(theirs) as held:
        assert not held


def test_other_buckets_are_free(objects: Objects) -> None:
    claims = Claims(objects, FOLDER)
    with claims.hold("10"), claims.hold("11") as held, claims.hold("0") as another:
        assert held
        assert another
    with claims.hold("0" * 12), claims.hold("0" * 11 + "1") as held:
        assert held


def test_a_claim_without_a_sign_of_life_passes_on(objects: Objects, lifetime_s: float) -> None:
    objects.put(f"{FOLDER}/wide/2-10.4", b"somebody who was killed")
    claims = Claims(objects, FOLDER, lifetime_s)
    with claims.hold("10") as held:
        assert not held
    time.sleep(lifetime_s + 0.1)
    with claims.hold("10") as held:
        assert held
        assert objects.list(FOLDER) == [f"{FOLDER}/wide/2-10.5"]
    assert objects.list(FOLDER) == []


def test_a_claim_of_a_process_that_is_gone_passes_on_at_once(objects: Objects) -> None:
    script = (
        "import sys, time; from storage.claims import Claims; from storage.objects import Objects\n"
        f"with Claims(Objects(sys.argv[1]), {FOLDER!r}).hold('10'): print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", script, objects.root], stdout=subprocess.PIPE)
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"held\n"
    claims = Claims(objects, FOLDER)
    with claims.hold("10") as held:
        assert not held
    holder.kill()
    holder.wait()
    with claims.hold("10") as held:
        assert held
    assert objects.list(FOLDER) == []


def test_a_holder_that_lives_keeps_its_claim(objects: Objects, lifetime_s: float) -> None:
    claims = Claims(objects, FOLDER, lifetime_s, beat_every_s=0.05)
    with claims.hold("10") as held:
        assert held
        time.sleep(lifetime_s + 0.5)
        with claims.hold("10") as also:
            assert not also


def test_a_claim_is_let_go_by_a_block_that_fails(objects: Objects) -> None:
    with pytest.raises(ZeroDivisionError), Claims(objects, FOLDER).hold("10"):
        1 / 0  # noqa: B018
    assert objects.list(FOLDER) == []


@pytest.mark.parametrize("prefixes", [["1"] * 6, ["1", "10", "101", "1", "10", "101"]])
def test_of_many_who_come_at_once_one_works_at_a_time(objects: Objects, prefixes: list[str]) -> None:
    """Each tries until it was at work once; nobody ever meets another in the block."""
    at_work, most, start = [0], [0], threading.Barrier(len(prefixes))

    def work(prefix: str) -> None:
        claims = Claims(objects, FOLDER)
        start.wait()
        while True:
            with claims.hold(prefix) as held:
                if held:
                    at_work[0] += 1
                    most[0] = max(most[0], at_work[0])
                    time.sleep(0.01)
                    at_work[0] -= 1
                    return
            time.sleep(0.001 * (1 + hash((threading.get_ident(), time.monotonic_ns())) % 10))

    threads = [threading.Thread(target=work, args=(prefix,)) for prefix in prefixes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert most == [1]
    assert objects.list(FOLDER) == []
