"""A script in a process of its own that has imported torch and Lightning already: importing is most of a small run's time.

The processes are forked from one that does nothing but import. What a script does from there on is what `python <script>` does.
The ranks that it starts are forked likewise, before the script begins.
"""

import atexit
import json
import multiprocessing
import os
import re
import runpy
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, ClassVar

import pytest
from matplotlib.figure import Figure
from PIL import Image

THREADS = {"OMP_NUM_THREADS": "1"}  # of every script; torch and BLAS read it when they are imported
_IMPORTED = multiprocessing.get_context("forkserver")
_IMPORTED.set_forkserver_preload(
    [
        "clip_exp.training.fit",
        "clip_exp.evaluation.evaluated_model",
        "hydra.main",
        "torch._dynamo",
    ]  # the last for DeepSpeed
)


def run_forked(
    script: Path, arguments: tuple[str, ...], *, cwd: Path, environment: dict[str, str], timeout_s: float, draw: bool
) -> subprocess.CompletedProcess[str]:
    """Like `subprocess.run` of the script with its output captured as text.

    Args:
        environment: what is read where a library is imported must be that of this process.
        draw: whether figures are drawn, which takes as long as a small run itself, or left blank.
    """
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder) / name for name in ("stdout", "stderr")]
        process = start_forked(script, arguments, cwd=cwd, environment=environment, outputs=outputs, draw=draw)
        process.join(timeout_s)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired([str(script), *arguments], timeout_s)
        captured = [path.read_text(encoding="utf-8") for path in outputs]
        return subprocess.CompletedProcess([str(script), *arguments], process.exitcode, *captured)


def start_forked(
    script: Path,
    arguments: tuple[str, ...],
    *,
    cwd: Path,
    environment: dict[str, str],
    outputs: list[Path],
    draw: bool = False,
    before: Callable[[], None] | None = None,
) -> BaseProcess:
    """Start the script as `run_forked` does, and return its process.

    Args:
        outputs: files to which standard output and standard error are appended.
        before: called in the new process before the script; what it changes holds in the ranks and workers too.
    """
    _start_server()
    process = _IMPORTED.Process(target=_run, args=(script, arguments, cwd, environment, outputs, draw, before))
    process.start()
    return process


def start_apart(function: Callable[..., Any], *arguments: Any) -> "Future[Any]":
    """Call a function of a module in a process of its own, which holds nothing of what other tests have left in this one."""
    _start_server()
    pool = ProcessPoolExecutor(1, mp_context=_IMPORTED)
    result = pool.submit(_call, function, *arguments)
    pool.shutdown(wait=False)
    return result


def _call(function: Callable[..., Any], *arguments: Any) -> Any:
    multiprocessing.set_start_method(None, force=True)  # a fork server of its own would import everything again
    return function(*arguments)


def run_on_ranks(function: Callable[..., Any], ranks: int, *arguments: Any) -> list[Any]:
    """Call `function(rank, *arguments)` of a module in a process for each rank; return what each returned."""
    return [rank.result() for rank in [start_apart(function, rank, *arguments) for rank in range(ranks)]]


def _start_server() -> None:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in THREADS.items():
            patch.setenv(name, value)
        forkserver.ensure_running()


def _run(
    script: Path,
    arguments: tuple[str, ...],
    cwd: Path,
    environment: dict[str, str],
    outputs: list[Path],
    draw: bool,
    before: Callable[[], None] | None,
) -> None:
    for descriptor, path in enumerate(outputs, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    multiprocessing.set_start_method(None, force=True)  # its own processes are started as any script's are
    os.chdir(cwd)
    _replace_environment(environment)
    if not draw:
        Figure.savefig = lambda _, path, **__: Image.new("RGB", (1, 1)).save(path)  # type: ignore[method-assign]
    if before is not None:
        before()
    _PopenWithRanks.waiting = _WaitingRank.fork(_requested_ranks(arguments))
    subprocess.Popen = _PopenWithRanks  # type: ignore[misc]
    sys.argv = [str(script), *arguments]
    try:
        runpy.run_path(str(script), run_name="__main__")
    finally:
        atexit._run_exitfuncs()


def _replace_environment(environment: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)


def _requested_ranks(arguments: Sequence[str]) -> int:
    """Processes that a command starts: as many as devices, for each job of a sweep of two."""
    devices = [int(found[1]) for word in arguments if (found := re.fullmatch(r"(?:trainer\.)?devices=(\d)", word))]
    return max(devices, default=0) * (2 if "-m" in arguments else 1)


class _WaitingRank:
    """A process that waits for the module that it shall run as a rank, and ends where none comes."""

    def __init__(self, pid: int, line: int) -> None:
        self.pid, self._line = pid, line

    @classmethod
    def fork(cls, count: int) -> "list[_WaitingRank]":
        ranks: list[_WaitingRank] = []
        for _ in range(count):
            read, write = os.pipe()
            pid = os.fork()
            if pid == 0:
                for line in (write, *(rank._line for rank in ranks)):
                    os.close(line)
                _serve_as_rank(read)
            os.close(read)
            ranks.append(cls(pid, write))
        return ranks

    def begin(self, module: str, arguments: Sequence[str], environment: dict[str, str]) -> int:
        with os.fdopen(self._line, "w", encoding="utf-8") as line:
            json.dump([module, *arguments, environment], line)
        return self.pid


def _serve_as_rank(line: int) -> None:
    """Run the module that the line names as `python -m` would, in a session of its own; never return."""
    request = os.fdopen(line, encoding="utf-8").read()
    if not request:
        os._exit(0)
    module, *arguments, environment = json.loads(request)
    os.setsid()
    _replace_environment(environment)
    sys.argv = [module, *arguments]
    warnings.filterwarnings("ignore", message=".* found in sys.modules", category=RuntimeWarning)  # imported before
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)  # a rank's door ends the process itself
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


class _PopenWithRanks(subprocess.Popen):  # type: ignore[type-arg]
    """Popen that takes a waiting rank for each rank that a launcher starts."""

    waiting: ClassVar[list[_WaitingRank]] = []

    def _execute_child(self, args: Any, *settings: Any) -> None:
        """Settings: of Popen's private method; the environment is the sixth."""
        is_rank = list(args[:2]) == [sys.executable, "-m"] and args[2] == "clip_exp.ranks.worker"
        if is_rank and self.waiting:
            _executable, _preexec_fn, _close_fds, _pass_fds, _cwd, environment, *_ = settings
            self.pid = self.waiting.pop().begin(args[2], args[3:], environment)
            self._child_created = True
        else:
            super()._execute_child(args, *settings)  # type: ignore[misc]
