"""Watch over the heartbeats of ranks on this machine: which rank hangs, and what to say about it. Imports little, for the watchdog.

A rank hangs if its heartbeat is silent for longer than the rank itself allows (`ranks.heartbeat`). Silence is counted in looks of the
watcher, each of which adds little, however late it comes. So neither a suspended machine, nor a stopped watcher, nor a changed clock
looks like a rank that hangs.
"""

import mmap
import os
import time
from contextlib import suppress
from pathlib import Path

from clip_exp.errors import DataError, DistributedError
from clip_exp.ranks.failure import Failure
from clip_exp.ranks.heartbeat import FILE, SIZE, Layout, Phase, read_text, this_host
from clip_exp.secrets import redact

LOOK_S = 0.5  # time between looks
# Time between searches for heartbeats of further ranks, in a folder that may be on a slow file system
SEARCH_S = 2.0
STOPPED, TRACED, DEAD = "T", "t", ("Z", "X")  # states of a process in /proc


class Pulse:
    """Heartbeat of a rank, as a watcher sees it."""

    def __init__(self, rank: int, memory: mmap.mmap) -> None:
        self.rank = rank
        self._fields = Layout(memory)
        self.silent_s = 0.0
        self.state = ""
        self._beats = -1
        self._read()

    def _read(self) -> None:
        words = self._fields.words
        self.pid, self.host = words[Layout.PID], words[Layout.HOST]
        self.phase, self.step = Phase(words[Layout.PHASE]), words[Layout.STEP]
        self.limit_s, self.by_data = self._fields.floats[Layout.LIMIT], bool(words[Layout.BY_DATA])
        self.row = read_text(self._fields.text, words[Layout.LENGTH])

    def look(self, tick_s: float, judge_stopped: bool) -> None:
        """Look at the rank, and count its silence.

        Args:
            tick_s: time since the last look.
            judge_stopped: whether a process that a signal stopped counts as silent.
        """
        self._read()
        beats = self._fields.words[Layout.BEATS]  # after the values, which the rank writes later
        self.state = state_of(self.pid)
        if beats != self._beats:
            self._beats, self.silent_s = beats, 0.0
        elif self.state != TRACED and (judge_stopped or self.state != STOPPED):
            self.silent_s += tick_s

    @property
    def present(self) -> bool:
        return self.phase is not Phase.over and self.state not in DEAD

    @property
    def late(self) -> bool:
        return self.silent_s > self.limit_s

    @property
    def stopped(self) -> bool:
        return self.state == STOPPED

    @property
    def code(self) -> int:
        """Exit code if this rank is the culprit. It is not the fault of its data if a signal stopped it while it read a row."""
        reads = (self.row or self.phase is Phase.data) and not self.stopped
        return (DataError if reads else DistributedError).exit_code

    def condemn(self, code: int) -> None:
        """Ask the rank to end with an exit code."""
        self._fields.words[Layout.VERDICT] = code


class Watch:
    """Watch over the ranks of a folder on this machine.

    Args:
        folder: folder of the work.
        ranks: number of ranks, on all machines.
        judge_stopped: whether a rank that a signal stopped hangs. Others wait for it; alone it may be stopped on purpose (Ctrl-Z).
        nodes: number of machines.
    """

    def __init__(self, folder: Path, ranks: int, *, judge_stopped: bool = True, nodes: int = 1) -> None:
        self.folder, self.ranks, self.judge_stopped, self.nodes = folder, ranks, judge_stopped, nodes
        self.pulses: dict[int, Pulse] = {}
        self._missing = set(range(ranks))
        self._looked_s = self._searched_s = time.monotonic() - SEARCH_S

    def look(self) -> Failure | None:
        """Look at all ranks; return the failure to report if one hangs."""
        now_s = time.monotonic()
        tick_s, self._looked_s = min(now_s - self._looked_s, 2 * LOOK_S), now_s
        if self._missing and now_s - self._searched_s >= SEARCH_S:
            self._searched_s = now_s
            self._search()
        for pulse in self.pulses.values():
            pulse.look(tick_s, self.judge_stopped)
        culprit = self._culprit()
        return None if culprit is None else self._failure(culprit)

    @property
    def over(self) -> bool:
        """True if no rank is left to watch."""
        return not self._missing and not any(pulse.present for pulse in self.pulses.values())

    def _search(self) -> None:
        for rank in sorted(self._missing):
            with suppress(OSError, ValueError), (self.folder / f"{FILE}{rank}").open("r+b") as file:
                pulse = Pulse(rank, mmap.mmap(file.fileno(), SIZE))
                self._missing.remove(rank)
                if pulse.host == this_host():
                    self.pulses[rank] = pulse

    def _culprit(self) -> Pulse | None:
        """Return the rank that hangs, not one that waits for it in a collective; None if none hangs.

        Ranks wait for the one that is behind. While that one makes progress, however slowly, none hangs.
        """
        present = [pulse for pulse in self.pulses.values() if pulse.present]
        behind = min(((pulse.step, pulse.phase) for pulse in present), default=None)
        late = [pulse for pulse in present if pulse.late and (pulse.stopped or (pulse.step, pulse.phase) == behind)]
        return max(late, key=lambda pulse: (pulse.stopped, pulse.silent_s), default=None)

    def _failure(self, culprit: Pulse) -> Failure:
        who = f"rank {culprit.rank} of {self.ranks} (process {culprit.pid})" if self.ranks > 1 else "this run"
        doing = culprit.phase.describe(culprit.step)
        key = "data.timeout_s" if culprit.by_data else "hang_timeout_s"
        # Processes that wait for each other look alike.
        alike = [
            pulse.rank
            for pulse in self.pulses.values()
            if pulse is not culprit and (pulse.step, pulse.phase) == (culprit.step, culprit.phase)
        ]
        also = ""
        if not culprit.stopped and not culprit.row and (alike or self.nodes > 1):
            others = ["the ranks of other machines"] if self.nodes > 1 else []
            others += [f"rank {rank}" for rank in sorted(alike)[:8]]
            also = f" It may be waiting for {' or '.join(others)}."
        state = " It was stopped by a signal (state T)." if culprit.stopped else ""
        reading = f", reading {culprit.row}" if culprit.row else ""
        message = (
            f"error: {who} hangs: no progress for {culprit.silent_s:.0f} s {doing}{reading} (limit {culprit.limit_s:.0f} s, set by {key})."
            f"{state}{also} Repeat the same command to resume. If it was only slow, raise {key}, or set it to null for no limit."
        )
        return Failure(culprit.rank, culprit.code, redact(message), time.time_ns())


def state_of(pid: int) -> str:
    """Return the state of a process as in /proc: T if a signal stopped it, X if it has ended; empty where there is no /proc."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[0].decode()
    except FileNotFoundError:
        with suppress(ProcessLookupError, PermissionError):
            os.kill(pid, 0)
            return ""
        return DEAD[1]
    except (OSError, IndexError):
        return ""
