"""Watchdog process of ranks that clip_exp's launcher does not watch: those of torchrun and srun, and a single process.

    python -m clip_exp.ranks.watchdog <folder> <ranks> <nodes> <module>:<function>

The process that starts it (`guarded`) ends with the exit code that the watchdog writes to its heartbeat. If it cannot, since it is
stopped or a library holds Python's lock, the watchdog kills it.
"""

import ctypes
import importlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from clip_exp.errors import DistributedError, printable
from clip_exp.ranks import failure
from clip_exp.ranks.environment import Placement
from clip_exp.ranks.failure import STOP_SIGNALS, Failure
from clip_exp.ranks.heartbeat import FILE, Heartbeat
from clip_exp.ranks.watch import LOOK_S, Watch

PACKAGE_PARENT = str(Path(__file__).resolve().parents[2])  # for a checkout that is not installed
ANSWER_S = 3.0  # time for a process to end by itself
START_AFTER_S = 10.0  # a single process that ends earlier needs no watchdog
DEBUGGERS = ("bdb", "pdb", "pydevd", "debugpy")  # modules on the stack of a thread that waits for a programmer
Note = Callable[..., None]  # called as note(folder, "failed", **facts)


@contextmanager
def guarded(heartbeat: Heartbeat, folder: Path, placement: Placement | None, note: Note) -> Iterator[None]:
    """Let a watchdog end this process if it hangs inside the context.

    Args:
        heartbeat: heartbeat of this process, which the calling thread beats.
        folder: folder of the work.
        placement: placement of this rank; None: a single process.
        note: module-level function that records a failure, which the watchdog imports by name.
    """
    left = threading.Event()
    delay_s = min(START_AFTER_S, heartbeat.hang_timeout_s / 4) if placement is None else 0.0
    thread = threading.Thread(
        target=_guard, args=(heartbeat, folder, placement, note, left, delay_s, threading.get_ident()), daemon=True
    )
    thread.start()
    try:
        yield
    finally:
        left.set()
        thread.join(2 * ANSWER_S)


def _guard(
    heartbeat: Heartbeat,
    folder: Path,
    placement: Placement | None,
    note: Note,
    left: threading.Event,
    delay_s: float,
    watched: int,
) -> None:
    """Start the watchdog of this machine, and end this process when it says so; run in a thread."""
    if left.wait(delay_s):
        return
    watchdog = None
    if placement is None or placement.local_rank == 0:
        with suppress(OSError):  # for example too many processes: then nothing watches
            watchdog = _start(folder, placement, note)
    try:
        while not left.wait(LOOK_S):
            if _in_debugger(watched):
                heartbeat.beat()
            elif heartbeat.verdict:
                if placement is None:  # otherwise it has other ranks to end
                    _stop(watchdog)
                    heartbeat.path.unlink(missing_ok=True)
                os._exit(heartbeat.verdict)
    finally:
        _stop(watchdog)


def _start(folder: Path, placement: Placement | None, note: Note) -> "subprocess.Popen[bytes]":
    ranks, nodes = (1, 1) if placement is None else (placement.world_size, placement.nodes)
    command = [sys.executable, "-m", __name__, str(folder), str(ranks), str(nodes)]
    path = os.pathsep.join(filter(None, [PACKAGE_PARENT, os.environ.get("PYTHONPATH")]))
    return subprocess.Popen(
        [*command, f"{note.__module__}:{note.__qualname__}"],
        stdin=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": path},
    )


def _stop(watchdog: "subprocess.Popen[bytes] | None") -> None:
    if watchdog is not None:
        watchdog.kill()
        watchdog.wait()


def _in_debugger(thread: int) -> bool:
    """Return True if a thread of this process waits for input to a debugger."""
    frame = sys._current_frames().get(thread)
    while frame is not None:
        if str(frame.f_globals.get("__name__")).partition(".")[0] in DEBUGGERS:
            return True
        frame = frame.f_back
    return False


def signal_at_end_of_parent(number: int) -> None:
    """Let the kernel send a signal to this process when the thread that started it ends (0: none); only on Linux."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, number)


def main() -> None:
    """Watch the ranks of a folder until this process's parent, or the last of them, ends."""
    folder, (ranks, nodes), function = Path(sys.argv[1]), map(int, sys.argv[2:4]), sys.argv[4]
    parent = os.getppid()
    signal_at_end_of_parent(signal.SIGKILL)
    for number in STOP_SIGNALS:  # sent to the process group: the ranks handle them
        signal.signal(number, signal.SIG_IGN)
    watch = Watch(folder, ranks, judge_stopped=ranks > 1, nodes=nodes)
    while os.getppid() == parent and not watch.over:
        if (hang := watch.look()) is not None and not failure.read_failures(folder):
            _end(watch, hang, folder, function)
            return
        time.sleep(LOOK_S)


def _end(watch: Watch, hang: Failure, folder: Path, function: str) -> None:
    """Report that a rank hangs, and end all ranks of this machine; those of others end as they find the report."""
    signal_at_end_of_parent(0)  # it is about to end
    # Print first: everything else may fail.
    print(printable(hang.message), file=sys.stderr, flush=True)
    with suppress(Exception):
        if watch.ranks > 1:
            failure.write_report(folder, hang)
        module, name = function.split(":")
        note: Any = getattr(importlib.import_module(module), name)
        note(folder, "failed", **failure.facts(hang.message, hang.code))
    present = [pulse for pulse in watch.pulses.values() if pulse.present]
    for pulse in present:
        pulse.condemn(hang.code if pulse.rank == hang.rank else DistributedError.exit_code)
    deadline = time.monotonic() + ANSWER_S
    while time.monotonic() < deadline and any(pulse.present for pulse in present):
        time.sleep(0.1)
        for pulse in present:
            pulse.look(0.0, judge_stopped=True)
    for pulse in present:
        if pulse.present:
            with suppress(ProcessLookupError):
                os.kill(pulse.pid, signal.SIGKILL)
        with suppress(OSError):
            (folder / f"{FILE}{pulse.rank}").unlink(missing_ok=True)


if __name__ == "__main__":
    main()
