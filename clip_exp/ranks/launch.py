"""Starting the processes of a piece of work, one per device; watching them; and one message and exit code for all of them."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

from clip_exp.errors import (
    PREEMPTED_EXIT_CODE,
    CheckpointError,
    ConfigError,
    DataError,
    DistributedError,
    NumericError,
    printable,
)
from clip_exp.ranks.environment import ERROR_FILE, STOP_SIGNALS, free_port, rank_environment
from clip_exp.runs import RunRecord

SETTLE_S = 8.0  # for the ranks that a failure reaches to end by themselves
GRACE_S = 20.0  # between asking the other ranks to end and ending them
EXPECTED_CODES = {error.exit_code for error in (ConfigError, DataError, CheckpointError, NumericError)}
PACKAGE_PARENT = str(Path(__file__).resolve().parents[2])  # a checkout need not be installed


def run_ranks(module: str, run_dir: Path, ranks: int, devices: Any) -> int:
    """Run `python -m <module> <run_dir>` once per device. When one fails the others are ended, and its exit code is the work's.

    Args:
        module: a door made with `ranks.worker.serve`.
        devices: a list chooses GPUs by their index; anything else all of them.
    """
    for rank in range(ranks):
        (run_dir / ERROR_FILE.format(rank=rank)).unlink(missing_ok=True)
    processes = _start(module, run_dir, ranks, devices)
    asked: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)

    handlers = {number: signal.signal(number, forward) for number in STOP_SIGNALS}
    try:
        _wait(processes)
        codes = _settle(processes)
        _end(processes)
        return _outcome(run_dir, codes, asked)
    finally:
        _end(processes)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _start(module: str, run_dir: Path, ranks: int, devices: Any) -> list[subprocess.Popen[bytes]]:
    """The ranks, in a session of their own: a terminal's Ctrl-C reaches them through the launcher, once."""
    port = free_port()
    environment = {
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // ranks)),
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [PACKAGE_PARENT, os.environ.get("PYTHONPATH")])),
        **_visible(devices),
    }
    command = [sys.executable, "-m", module, str(run_dir)]
    return [
        subprocess.Popen(command, env={**environment, **rank_environment(rank, ranks, port)}, start_new_session=True)
        for rank in range(ranks)
    ]


def _visible(devices: Any) -> dict[str, str]:
    """The GPUs that a list of devices names, among those that this process may see."""
    if not isinstance(devices, list):
        return {}
    seen = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return {"CUDA_VISIBLE_DEVICES": ",".join(seen[index] if seen else str(index) for index in devices)}


def _wait(processes: list[subprocess.Popen[bytes]]) -> None:
    """Until all have ended well, or one has not."""
    while True:
        codes = [process.poll() for process in processes]
        if any(code not in (None, 0) for code in codes) or all(code == 0 for code in codes):
            return
        time.sleep(0.1)


def _settle(processes: list[subprocess.Popen[bytes]]) -> list[int | None]:
    """The exit codes, after a moment in which the ranks that a failure reaches end by themselves; None: still running."""
    deadline = time.monotonic() + SETTLE_S
    while time.monotonic() < deadline and any(process.poll() is None for process in processes):
        time.sleep(0.05)
    return [process.poll() for process in processes]


def _end(processes: list[subprocess.Popen[bytes]]) -> None:
    """End what is still running: first politely."""
    for action in (subprocess.Popen.terminate, subprocess.Popen.kill):
        for process in processes:
            if process.poll() is None:
                action(process)
        deadline = time.monotonic() + GRACE_S
        while time.monotonic() < deadline and any(process.poll() is None for process in processes):
            time.sleep(0.05)


def _outcome(run_dir: Path, codes: list[int | None], asked: list[int]) -> int:
    """The exit code of all: of the rank that failed first in cause, with its message; the others only lost touch with it.

    Args:
        codes: of the ranks; None: had to be ended.
        asked: signals that the launcher passed on.
    """
    messages = _collect_messages(run_dir, len(codes))
    if all(code == 0 for code in codes):
        return 0
    harmless = (0, None, PREEMPTED_EXIT_CODE, DistributedError.exit_code, *(-number for number in asked))
    if (asked or PREEMPTED_EXIT_CODE in codes) and all(code in harmless for code in codes):
        RunRecord(run_dir).finish("preempted")
        if PREEMPTED_EXIT_CODE not in codes:  # no rank got as far as to tell
            print("stopped by a signal; the same command goes on from what was saved.", file=sys.stderr, flush=True)
        return PREEMPTED_EXIT_CODE
    expected = [rank for rank in messages if codes[rank] in EXPECTED_CODES]
    killed = [rank for rank, code in enumerate(codes) if code is not None and code < 0 and -code not in asked]
    if not expected and (killed or not messages):
        message = _end_of_rank(killed[0], codes) if killed else _end_without_message(codes)
        RunRecord(run_dir).finish("failed", error=[message], exit_code=DistributedError.exit_code)
        raise DistributedError(message)
    causes = [rank for rank in messages if codes[rank] != DistributedError.exit_code]
    told = (*expected, *causes, *messages)[0]
    RunRecord(run_dir).finish("failed", error=messages[told].splitlines()[-20:], exit_code=codes[told] or 1)
    print(printable(messages[told]), file=sys.stderr, flush=True)
    return codes[told] or 1


def _collect_messages(run_dir: Path, ranks: int) -> dict[int, str]:
    """What the ranks that failed left for the launcher, by rank."""
    messages = {}
    for rank in range(ranks):
        path = run_dir / ERROR_FILE.format(rank=rank)
        if path.is_file():
            messages[rank] = path.read_text(encoding="utf-8")
            path.unlink()
    return messages


def _end_of_rank(rank: int, codes: list[int | None]) -> str:
    number = signal.Signals(-int(codes[rank] or 0))
    memory = (
        " The system does that where memory runs out: use fewer devices or workers, or smaller batches."
        if number == signal.SIGKILL
        else ""
    )
    return (
        f"rank {rank} of {len(codes)} was ended by signal {number.value} ({number.name}); the others were stopped.{memory} "
        "The same command goes on from what was saved."
    )


def _end_without_message(codes: list[int | None]) -> str:
    rank, code = next((rank, code) for rank, code in enumerate(codes) if code)
    return f"rank {rank} of {len(codes)} ended with code {code} and no message; the others were stopped."
