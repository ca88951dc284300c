"""Starting the processes of a run: none for one device, one per device for several; and one exit code for all of them."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

from clip_exp.config.preflight import requested_devices
from clip_exp.config.schema import TrainConfig
from clip_exp.errors import (
    PREEMPTED_EXIT_CODE,
    CheckpointError,
    ClipExpError,
    ConfigError,
    DataError,
    DistributedError,
    NumericError,
)
from clip_exp.runs import RunRecord, begin, choose_train_folder, lock
from clip_exp.training.environment import ERROR_FILE, STOP_SIGNALS, free_port, outer_ranks, rank_environment

SETTLE_S = 8.0  # for the ranks that a failure reaches to end by themselves
GRACE_S = 20.0  # between asking the other ranks to end and ending them
EXPECTED_CODES = {error.exit_code for error in (ConfigError, DataError, CheckpointError, NumericError)}
PACKAGE_PARENT = str(Path(__file__).resolve().parents[2])  # a checkout need not be installed


def launch(config: TrainConfig, arguments: list[str], job: int | None) -> int:
    """Open the run's folder and train in it; return the exit code.

    Args:
        arguments: of the command line, for `run.json`.
        job: number of the job in a sweep, or None.
    """
    if outer_ranks():
        if job is not None:
            raise ConfigError(
                "a sweep (-m) starts its own processes: run it without torchrun or srun, with trainer.devices."
            )
        return _join(config, arguments)
    run_dir, finished = choose_train_folder(config, "" if job is None else f"-{job}")
    if finished:
        return _already(run_dir)
    with lock(run_dir):
        begin(run_dir, config, arguments)
        ranks = _ranks(config)
        print(f"run folder: {run_dir}", flush=True)
        if ranks > 1 or isinstance(config.trainer.devices, list):
            return _spawn(config, run_dir, ranks)
        from clip_exp.training.worker import work

        return work(run_dir)


def _already(run_dir: Path) -> int:
    print(f"{run_dir} has finished this run already; resume=never starts another.")
    return 0


def _ranks(config: TrainConfig) -> int:
    asked = requested_devices(config)
    if config.trainer.num_nodes > 1:
        raise ConfigError(
            f"trainer.num_nodes={config.trainer.num_nodes}: start the command on every node, for example "
            f"torchrun --nnodes={config.trainer.num_nodes} --nproc-per-node={asked or 'gpu'} --rdzv-endpoint=<first node>:29500 train.py …"
        )
    if asked is not None:
        return asked
    if config.trainer.accelerator == "cpu":
        return 1
    import torch

    return max(1, torch.cuda.device_count())


def _join(config: TrainConfig, arguments: list[str]) -> int:
    """As one rank that torchrun or srun started: agree on the folder that rank 0 opens."""
    import torch.distributed as dist

    from clip_exp.training import distributed
    from clip_exp.training.trainer import resolve_device
    from clip_exp.training.worker import work

    distributed.start(resolve_device(config), config.strategy.timeout_s)
    this_rank = dist.get_rank()
    with contextlib.ExitStack() as held:

        def open_folder() -> tuple[Path, bool]:
            run_dir, finished = choose_train_folder(config)
            if not finished:
                held.enter_context(lock(run_dir))
                begin(run_dir, config, arguments)
            return run_dir, finished

        run_dir, finished = distributed.from_main(open_folder)
        if finished:
            return _already(run_dir) if distributed.is_main() else 0
        try:
            return work(run_dir)
        except ClipExpError as error:
            raise type(error)(f"rank {this_rank}: {error}") from error


def _spawn(config: TrainConfig, run_dir: Path, ranks: int) -> int:
    """One process per device. When one fails the others are ended, and its exit code is the run's."""
    for rank in range(ranks):
        (run_dir / ERROR_FILE.format(rank=rank)).unlink(missing_ok=True)
    processes = _start(config, run_dir, ranks)
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
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        _end(processes)
    stopped = (0, PREEMPTED_EXIT_CODE, *(-number for number in asked))
    if asked and all(code in stopped for code in codes):
        if any(codes):
            RunRecord(run_dir).finish("preempted")
            return PREEMPTED_EXIT_CODE
        return 0
    return _outcome(run_dir, codes)


def _start(config: TrainConfig, run_dir: Path, ranks: int) -> list[subprocess.Popen[bytes]]:
    """The ranks, in a session of their own: a terminal's Ctrl-C reaches them through the launcher, once."""
    port = free_port()
    environment = {
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // ranks)),
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [PACKAGE_PARENT, os.environ.get("PYTHONPATH")])),
        **_visible(config),
    }
    command = [sys.executable, "-m", "clip_exp.training.worker", str(run_dir)]
    return [
        subprocess.Popen(command, env={**environment, **rank_environment(rank, ranks, port)}, start_new_session=True)
        for rank in range(ranks)
    ]


def _visible(config: TrainConfig) -> dict[str, str]:
    """The GPUs that `trainer.devices` lists, among those that this process may see."""
    devices = config.trainer.devices
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


def _outcome(run_dir: Path, codes: list[int | None]) -> int:
    """The exit code of the rank that failed first in cause, with its message; the others only lost touch with it."""
    messages = {}
    for rank in range(len(codes)):
        path = run_dir / ERROR_FILE.format(rank=rank)
        if path.is_file():
            messages[rank] = path.read_text(encoding="utf-8")
            path.unlink()
    if all(code == 0 for code in codes):
        return 0
    expected = [rank for rank in messages if codes[rank] in EXPECTED_CODES]
    killed = [rank for rank, code in enumerate(codes) if code is not None and code < 0]
    if killed and not expected:
        number = -int(codes[killed[0]] or 0)
        message = (
            f"rank {killed[0]} of {len(codes)} was ended by signal {number} ({signal.Signals(number).name}); the others were stopped. "
            "The same command goes on from the last checkpoint."
        )
        RunRecord(run_dir).finish("failed", error=[message], exit_code=DistributedError.exit_code)
        raise DistributedError(message)
    told = next(iter((*expected, *messages)), None)
    if told is None:
        return next((code for code in codes if code), 1)
    RunRecord(run_dir).finish("failed", error=messages[told].splitlines()[-20:], exit_code=codes[told])
    print(messages[told], file=sys.stderr, flush=True)
    return codes[told] or 1
