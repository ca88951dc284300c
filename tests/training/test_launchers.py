"""Two ranks compute the same under every launcher, whatever variables a scheduler has left in the environment."""

import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from clip_exp.ranks.environment import free_port
from tests.conftest import REPOSITORY, Run, train_once
from tests.exhaustive import repeat_beyond
from tests.runs import TINY, Finished, Train, run_folders

STEPS = ("max_steps=8", "log_every_n_steps=1", "val_every_n_steps=8")
STRATEGIES = ("ddp", "deepspeed_stage_2")

BATCH_SCRIPT = {  # of a job with one task, in which the command starts its own ranks
    "SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "clip", "SLURM_NTASKS": "1", "SLURM_NPROCS": "1", "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_NNODES": "1", "SLURM_NODELIST": "elsewhere",
}  # fmt: skip
LSF = {
    "LSB_JOBID": "7", "LSB_DJOB_RANKFILE": "/dev/null", "LSB_DJOB_NUMPROC": "4", "JSM_NAMESPACE_SIZE": "4",
    "JSM_NAMESPACE_RANK": "3", "JSM_NAMESPACE_LOCAL_RANK": "3",
}  # fmt: skip
MPI = {
    "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_LOCAL_RANK": "3", "PMI_RANK": "3",
    "PMI_SIZE": "4",
}  # fmt: skip
LEFT_OVER = {
    "batch script": BATCH_SCRIPT,
    "batch script with tasks per node": {**BATCH_SCRIPT, "SLURM_NTASKS_PER_NODE": "1"},
    "LSF": LSF,
    "MPI": MPI,
    "everything": {**BATCH_SCRIPT, "SLURM_NTASKS_PER_NODE": "1", **LSF, **MPI},
}


@pytest.fixture(scope="module")
def plain(train: Train, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Finished]:
    """Two ranks that the command starts itself, with nothing left over."""

    def run(strategy: str) -> Finished:
        overrides = (*TINY, *STEPS, "trainer.devices=2", f"strategy={strategy}")
        return train_once(f"plain_{strategy}", train, tmp_path_factory, *overrides)

    return run


def assert_same(output_dir: Path, plain: Finished, rel: float = 1e-6) -> None:
    (folder,) = run_folders(output_dir)
    run = Finished(folder, "")
    assert run.losses == pytest.approx(plain.losses, rel=rel)
    assert [row["step"] for row in run.metrics] == [row["step"] for row in plain.metrics]
    assert run.record["ranks"] == 2
    assert run.record["status"] == "finished"


@pytest.mark.parametrize("strategy", repeat_beyond(("ddp",), STRATEGIES))  # under ZeRO-2 see `test_tasks_of_srun`
@pytest.mark.parametrize("left", repeat_beyond(("everything",), LEFT_OVER))
def test_ranks_that_the_command_starts(
    left: str, strategy: str, plain: Callable[[str], Finished], train: Train, tmp_path: Path
) -> None:
    train(*TINY, *STEPS, "trainer.devices=2", f"strategy={strategy}", output_dir=tmp_path, **LEFT_OVER[left])
    assert_same(tmp_path, plain(strategy))


@pytest.mark.parametrize("left", repeat_beyond(("everything",), LEFT_OVER))
def test_one_process_is_alone_in_any_environment(left: str, single: Finished, train: Train, tmp_path: Path) -> None:
    run = train(*TINY, "max_steps=3", "log_every_n_steps=1", output_dir=tmp_path, **LEFT_OVER[left])
    assert len(run.losses) == 3
    assert run.losses[:1] == pytest.approx(single.losses[:1], rel=1e-6)
    assert run.record["ranks"] == 1


@pytest.mark.parametrize("strategy", repeat_beyond(("ddp",), STRATEGIES))
@pytest.mark.parametrize("nodes", repeat_beyond((2,), (1, 2)))
def test_ranks_of_torchrun(nodes: int, strategy: str, plain: Callable[[str], Finished], tmp_path: Path) -> None:
    """Nobody says trainer.num_nodes: the launcher knows."""
    rendezvous = [f"--rdzv-endpoint=127.0.0.1:{free_port()}", "--rdzv-backend=c10d", "--rdzv-id=1"]
    torchrun = [
        sys.executable, "-m", "torch.distributed.run", f"--nnodes={nodes}", f"--nproc-per-node={2 // nodes}", *rendezvous,
        str(REPOSITORY / "train.py"), *TINY, *STEPS, f"strategy={strategy}", f"output_dir={tmp_path}",
    ]  # fmt: skip
    agents = [
        subprocess.Popen(
            torchrun, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env={**os.environ, **LEFT_OVER["everything"]},
        )
        for _ in range(nodes)
    ]  # fmt: skip
    output = [agent.communicate(timeout=300)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0] * nodes, "\n".join(output)
    assert_same(tmp_path, plain(strategy))


def srun(
    command: Run, arguments: tuple[str, ...], folder: Path, **variables: str
) -> list[subprocess.CompletedProcess[str]]:
    """Two processes with the variables that srun gives its tasks."""
    shared = {
        **BATCH_SCRIPT, "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_NTASKS": "2", "SLURM_STEP_NUM_NODES": "1",
        "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_STEP_NODELIST": "127.0.0.1", "MASTER_PORT": str(free_port()), **variables,
    }  # fmt: skip

    def task(rank: int) -> subprocess.CompletedProcess[str]:
        own = {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)}
        return command("train.py", *arguments, f"output_dir={folder}", cwd=folder, **{**shared, **own})

    with ThreadPoolExecutor(2) as tasks:
        return list(tasks.map(task, range(2)))


@pytest.mark.parametrize(
    ("strategy", "plain_strategy", "rel"),
    [
        ("deepspeed_stage_2", "ddp", 1e-5),  # every strategy computes the same losses
        pytest.param("deepspeed_stage_2", "deepspeed_stage_2", 1e-6, marks=pytest.mark.exhaustive),
        pytest.param("ddp", "ddp", 1e-6, marks=pytest.mark.exhaustive),
    ],
)
def test_tasks_of_srun(
    strategy: str, plain_strategy: str, rel: float, plain: Callable[[str], Finished], command: Run, tmp_path: Path
) -> None:
    done = srun(command, (*TINY, *STEPS, f"strategy={strategy}"), tmp_path, **LSF, **MPI)
    assert [task.returncode for task in done] == [0, 0], "\n".join(task.stderr for task in done)
    assert_same(tmp_path, plain(plain_strategy), rel)


def test_a_configuration_that_contradicts_the_launcher_is_refused_once_before_there_is_a_folder(
    command: Run, tmp_path: Path
) -> None:
    done = srun(command, (*TINY, *STEPS, "trainer.devices=4", "trainer.num_nodes=3"), tmp_path)
    assert [task.returncode for task in done] == [2, 2]
    assert "trainer.devices=4, but srun has started 2 processes on this machine: start 4, or remove" in done[0].stderr
    assert "trainer.num_nodes=3, but srun has started 2 processes on 1 machines: remove" in done[0].stderr
    assert done[1].stderr == ""
    assert not list(tmp_path.iterdir())
