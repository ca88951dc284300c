"""Starting the processes of a run: none for one device, one per device for several; and one exit code for all of them."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

from clip_exp.config.preflight import requested_devices
from clip_exp.config.schema import TrainConfig
from clip_exp.errors import ConfigError, DistributedError
from clip_exp.runs import RunRecord, lock, open_train_folder
from clip_exp.training.distributed import free_port, launched_from_outside, rank_environment

GRACE_S = 20.0  # between asking the other ranks to end and ending them
PACKAGE_PARENT = str(Path(__file__).resolve().parents[2])  # a checkout need not be installed
ERROR_FILE = ".error-rank{rank}"


def launch(config: TrainConfig, arguments: list[str], job: int | None) -> int:
    """Open the run's folder and train in it; return the exit code.

    Args:
        arguments: of the command line, for `run.json`.
        job: number of the job in a sweep, or None.
    """
    if launched_from_outside():
        if job is not None:
            raise ConfigError(
                "a sweep (-m) starts its own processes: run it without torchrun or srun, with trainer.devices."
            )
        return _join(config, arguments)
    run_dir, finished = open_train_folder(config, arguments, "" if job is None else f"-{job}")
    if finished:
        print(f"{run_dir} has finished this run already; resume=never starts another.")
        return 0
    held = lock(run_dir)
    try:
        ranks = _ranks(config)
        print(f"run folder: {run_dir}", flush=True)
        if ranks > 1:
            return _spawn(config, run_dir, ranks)
        from clip_exp.training.worker import work

        return work(run_dir)
    finally:
        held.close()


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
    from clip_exp.training.run import resolve_device
    from clip_exp.training.worker import work

    distributed.start(resolve_device(config), config.strategy.timeout_s)
    answer: list[object] = [None, None]
    if dist.get_rank() == 0:
        try:
            answer = list(open_train_folder(config, arguments))
        except Exception as error:
            answer = [error, None]
    dist.broadcast_object_list(answer, src=0)
    opened, finished = answer
    if isinstance(opened, Exception):
        raise opened
    assert isinstance(opened, Path)
    if finished:
        if dist.get_rank() == 0:
            print(f"{opened} has finished this run already; resume=never starts another.")
        return 0
    return work(opened)


def _spawn(config: TrainConfig, run_dir: Path, ranks: int) -> int:
    """One process per device. When one fails the others are ended, and its exit code is the run's."""
    port = free_port()
    threads = str(max(1, (os.cpu_count() or 1) // ranks))
    for rank in range(ranks):
        (run_dir / ERROR_FILE.format(rank=rank)).unlink(missing_ok=True)
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "clip_exp.training.worker", str(run_dir)],
            env={
                "OMP_NUM_THREADS": threads,
                **os.environ,
                "PYTHONPATH": os.pathsep.join(filter(None, [PACKAGE_PARENT, os.environ.get("PYTHONPATH")])),
                **_visible(config),
                **rank_environment(rank, ranks, port),
            },
        )
        for rank in range(ranks)
    ]

    def forward(number: int, frame: FrameType | None) -> None:
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)

    handlers = {number: signal.signal(number, forward) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    try:
        failed = _wait(processes)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        _end(processes)
    return _outcome(run_dir, processes, failed)


def _visible(config: TrainConfig) -> dict[str, str]:
    devices = config.trainer.devices
    return {"CUDA_VISIBLE_DEVICES": ",".join(map(str, devices))} if isinstance(devices, list) else {}


def _wait(processes: list[subprocess.Popen[bytes]]) -> int | None:
    """Until all have ended well (None) or one has not (its rank)."""
    while True:
        codes = [process.poll() for process in processes]
        for rank, code in enumerate(codes):
            if code not in (None, 0):
                return rank
        if all(code == 0 for code in codes):
            return None
        time.sleep(0.1)


def _end(processes: list[subprocess.Popen[bytes]]) -> None:
    """Give the rest a moment to end by themselves, as after a failure that all share; then end them."""
    for grace_s, action in ((2.0, subprocess.Popen.terminate), (GRACE_S, subprocess.Popen.kill)):
        deadline = time.monotonic() + grace_s
        while time.monotonic() < deadline and any(process.poll() is None for process in processes):
            time.sleep(0.05)
        for process in processes:
            if process.poll() is None:
                action(process)
    for process in processes:
        process.wait()


def _outcome(run_dir: Path, processes: list[subprocess.Popen[bytes]], failed: int | None) -> int:
    if failed is None:
        return 0
    messages = [run_dir / ERROR_FILE.format(rank=rank) for rank in range(len(processes))]
    told = [rank for rank, path in enumerate(messages) if path.is_file()]
    code = processes[failed].returncode
    if told:
        first = failed if failed in told else told[0]
        text = messages[first].read_text(encoding="utf-8")
        for path in messages:
            path.unlink(missing_ok=True)
        print(text, file=sys.stderr, flush=True)
        return processes[first].returncode
    if code < 0:
        RunRecord(run_dir).finish("failed", error=[f"rank {failed} was ended by signal {-code}"])
        raise DistributedError(
            f"rank {failed} of {len(processes)} was ended by signal {-code} ({signal.Signals(-code).name}); the others were stopped. "
            "The same command goes on from the last checkpoint."
        )
    return code
