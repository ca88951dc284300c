"""A watcher names the rank that hangs, not those that wait for it, and takes nothing else for a hang."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from clip_exp.ranks import watch
from clip_exp.ranks.failure import Failure
from clip_exp.ranks.heartbeat import FILE, LONG, Heartbeat, Phase, remove_heartbeats
from clip_exp.ranks.watch import LOOK_S, Watch

HANG_S, READ_S = 10.0, 4.0


def heartbeats(folder: Path, ranks: int = 2) -> list[Heartbeat]:
    """Heartbeats of ranks in step 5, which is not the first."""
    made = [Heartbeat(folder, rank, HANG_S, READ_S) for rank in range(ranks)]
    for each in made:
        each.limits.update(dict.fromkeys((Phase.data, Phase.forward, Phase.backward, Phase.update), HANG_S))
        each.enter(Phase.forward, 5)
    return made


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that watchers see."""
    now = [1000.0]
    monkeypatch.setattr(watch.time, "monotonic", lambda: now[0])
    return now


@pytest.fixture
def states(monkeypatch: pytest.MonkeyPatch) -> dict[int, str]:
    """States of processes other than running ones."""
    found: dict[int, str] = {}
    monkeypatch.setattr(watch, "state_of", lambda pid: found.get(pid, "S"))
    return found


def looked(
    watched: Watch, clock: list[float], seconds: float, each_look: Callable[[], None] = lambda: None
) -> Failure | None:
    """The first failure that a watcher finds within a time."""
    for _ in range(int(seconds / LOOK_S)):
        clock[0] += LOOK_S
        each_look()
        if (found := watched.look()) is not None:
            return found
    return None


def as_process(heartbeat: Heartbeat, pid: int) -> None:
    heartbeat._fields.words[heartbeat._fields.PID] = pid


def test_the_rank_that_is_behind_is_named_and_not_those_that_wait_for_it(tmp_path: Path, clock: list[float]) -> None:
    first, _, third = heartbeats(tmp_path, 3)
    for each in (first, third):
        each.enter(Phase.backward)
    found = looked(Watch(tmp_path, 3), clock, HANG_S + 2)
    assert found is not None
    assert (found.rank, found.code) == (1, 6)
    assert (
        f"rank 1 of 3 (process {os.getpid()}) hangs: no progress for 10 s in the forward pass of step 5"
        in found.message
    )
    assert "limit 10 s, set by hang_timeout_s" in found.message
    assert "Repeat the same command to resume" in found.message


def test_ranks_that_look_alike_are_all_named(tmp_path: Path, clock: list[float]) -> None:
    heartbeats(tmp_path, 2)
    found = looked(Watch(tmp_path, 2, nodes=2), clock, HANG_S + 2)
    assert found is not None
    assert "It may be waiting for the ranks of other machines or rank" in found.message


def test_no_rank_hangs_while_the_one_behind_makes_progress(tmp_path: Path, clock: list[float]) -> None:
    """As where one rank reads a slow disk, and the others wait for it in their step."""
    _, second = heartbeats(tmp_path)
    second.enter(Phase.data, 5)
    assert looked(Watch(tmp_path, 2), clock, 50 * HANG_S, second.beat) is None


def test_a_rank_that_reads_a_row_forever_ends_the_run_as_bad_data_and_the_row_is_named(
    tmp_path: Path, clock: list[float]
) -> None:
    _, second = heartbeats(tmp_path)
    second.enter(Phase.data, 5)
    second.reading("images/ä 7.jpg")
    found = looked(Watch(tmp_path, 2), clock, READ_S + 2)
    assert found is not None
    assert (found.rank, found.code) == (1, 3)
    assert "reading images/ä 7.jpg (limit 4 s, set by data.timeout_s)" in found.message


def test_a_row_may_have_any_name(tmp_path: Path, clock: list[float]) -> None:
    """Also one with a lone surrogate, which UTF-8 does not have, and one that is too long."""
    (own,) = heartbeats(tmp_path, 1)
    own.enter(Phase.data, 5)
    own.reading("\ud83d" + "x" * 2000)
    found = looked(Watch(tmp_path, 1), clock, READ_S + 2)
    assert found is not None
    assert r"reading \ud83dxxx" in found.message


def test_a_rank_that_was_stopped_while_it_read_a_row_is_no_bad_data(
    tmp_path: Path, clock: list[float], states: dict[int, str]
) -> None:
    _, second = heartbeats(tmp_path)
    second.enter(Phase.data, 5)
    second.reading("images/7.jpg")
    as_process(second, 4711)
    states[4711] = "T"
    found = looked(Watch(tmp_path, 2), clock, READ_S + 2)
    assert found is not None
    assert found.code == 6


def test_a_row_that_has_been_read_is_not_blamed(tmp_path: Path, clock: list[float]) -> None:
    (own,) = heartbeats(tmp_path, 1)
    own.enter(Phase.validation)
    own.reading("images/7.jpg")
    own.reading("")
    found = looked(Watch(tmp_path, 1), clock, LONG * HANG_S + 2)
    assert found is not None
    assert "images/7.jpg" not in found.message
    assert found.code == 6


@pytest.mark.parametrize("phase", [Phase.scoring, Phase.validation, Phase.saving, Phase.end])
def test_long_phases_have_a_long_limit(phase: Phase, tmp_path: Path, clock: list[float]) -> None:
    for each in heartbeats(tmp_path):
        each.enter(phase)
    watched = Watch(tmp_path, 2)
    assert looked(watched, clock, LONG * HANG_S - 1) is None
    assert looked(watched, clock, 3) is not None


def test_the_start_and_the_first_step_have_a_long_limit(tmp_path: Path, clock: list[float]) -> None:
    own = Heartbeat(tmp_path, 0, HANG_S, None)
    watched = Watch(tmp_path, 1)
    assert looked(watched, clock, LONG * HANG_S - 1) is None
    own.enter(Phase.forward, 1)
    assert looked(watched, clock, LONG * HANG_S - 1) is None


@pytest.mark.parametrize("gap_s", [20.0, 1e9, -1e9])
def test_a_watcher_that_was_suspended_finds_no_hang(gap_s: float, tmp_path: Path, clock: list[float]) -> None:
    heartbeats(tmp_path)
    watched = Watch(tmp_path, 2)
    assert looked(watched, clock, HANG_S / 2) is None
    clock[0] += gap_s
    assert watched.look() is None


def test_a_stopped_rank_is_named_wherever_it_was(tmp_path: Path, clock: list[float], states: dict[int, str]) -> None:
    _, second = heartbeats(tmp_path)
    second.enter(Phase.update)
    as_process(second, 4711)
    states[4711] = "T"
    found = looked(Watch(tmp_path, 2), clock, HANG_S + 2)
    assert found is not None
    assert found.rank == 1
    assert "process 4711" in found.message
    assert "stopped by a signal (state T)" in found.message


def test_a_single_process_that_is_stopped_does_not_hang_until_it_continues(
    tmp_path: Path, clock: list[float], states: dict[int, str]
) -> None:
    heartbeats(tmp_path, 1)
    watched = Watch(tmp_path, 1, judge_stopped=False)
    states[os.getpid()] = "T"
    assert looked(watched, clock, 10 * HANG_S) is None
    states.clear()
    assert looked(watched, clock, HANG_S - 1) is None
    assert looked(watched, clock, 3) is not None


@pytest.mark.parametrize("state", ["t", "Z", "X"])
def test_a_rank_that_is_traced_or_has_ended_does_not_hang(
    state: str, tmp_path: Path, clock: list[float], states: dict[int, str]
) -> None:
    """Another tells that a rank was killed, with its signal."""
    (own,) = heartbeats(tmp_path, 1)
    as_process(own, 4711)
    states[4711] = state
    assert looked(Watch(tmp_path, 1), clock, 10 * HANG_S) is None


def test_a_rank_that_has_left_is_not_waited_for(tmp_path: Path, clock: list[float]) -> None:
    first, second = heartbeats(tmp_path)
    watched = Watch(tmp_path, 2)
    assert looked(watched, clock, 1) is None
    first.close()
    assert looked(watched, clock, 10 * HANG_S, second.beat) is None
    second.close()
    watched.look()
    assert watched.over
    assert not list(tmp_path.iterdir())


def test_ranks_without_a_heartbeat_are_not_judged(tmp_path: Path, clock: list[float]) -> None:
    assert looked(Watch(tmp_path, 2), clock, 100 * HANG_S) is None


def test_what_a_killed_rank_left_behind_is_removed(tmp_path: Path) -> None:
    heartbeats(tmp_path)
    assert len(list(tmp_path.glob(f"{FILE}*"))) == 2
    remove_heartbeats(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("operation", ["write_bytes", "replace"])
def test_a_full_disk_costs_the_watch_and_not_the_run_and_nothing_is_left(
    operation: str, tmp_path: Path, clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(Path, operation, refused)
        own = Heartbeat(tmp_path, 0, HANG_S, READ_S)
    own.enter(Phase.forward, 1)
    own.reading("images/7.jpg")
    assert looked(Watch(tmp_path, 1), clock, 100 * HANG_S) is None
    assert list(tmp_path.iterdir()) == []
