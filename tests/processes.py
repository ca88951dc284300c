"""A script in a process of its own that has imported torch and Lightning already: importing is most of a small run's time.

The processes are forked from one that does nothing but import. What a script does from there on is what `python <script>` does.
"""

import atexit
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest

THREADS = {"OMP_NUM_THREADS": "1"}  # of every script; torch and BLAS read it when they are imported
_IMPORTED = multiprocessing.get_context("forkserver")
_IMPORTED.set_forkserver_preload(["clip_exp.training.fit", "clip_exp.evaluation.launch", "hydra.main"])


def run_forked(
    script: Path, arguments: tuple[str, ...], *, cwd: Path, environment: dict[str, str], timeout_s: float
) -> subprocess.CompletedProcess[str]:
    """Like `subprocess.run` of the script with its output captured as text.

    Args:
        environment: what is read where a library is imported must be that of this process.
    """
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder) / name for name in ("stdout", "stderr")]
        _start_server()
        process = _IMPORTED.Process(target=_run, args=(script, arguments, cwd, environment, outputs))
        process.start()
        process.join(timeout_s)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired([str(script), *arguments], timeout_s)
        told = [path.read_text(encoding="utf-8") for path in outputs]
        return subprocess.CompletedProcess([str(script), *arguments], process.exitcode, *told)


def start_apart(function: Callable[..., Any], *arguments: Any) -> "Future[Any]":
    """Call a function of a module in a process of its own, which holds nothing of what other tests have left in this one."""
    _start_server()
    pool = ProcessPoolExecutor(1, mp_context=_IMPORTED)
    result = pool.submit(function, *arguments)
    pool.shutdown(wait=False)
    return result


def _start_server() -> None:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in THREADS.items():
            patch.setenv(name, value)
        forkserver.ensure_running()


def _run(script: Path, arguments: tuple[str, ...], cwd: Path, environment: dict[str, str], outputs: list[Path]) -> None:
    for descriptor, path in enumerate(outputs, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    multiprocessing.set_start_method(None, force=True)  # its own processes are started as any script's are
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = [str(script), *arguments]
    try:
        runpy.run_path(str(script), run_name="__main__")
    finally:
        atexit._run_exitfuncs()
