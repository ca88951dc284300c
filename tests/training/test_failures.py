"""A rank that fails is heard: its own message is on the terminal and in `run.json`, and all ranks are gone at once."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from clip_exp.errors import DeviceMemoryError, DistributedError
from clip_exp.training.callbacks import SameRanks, explain
from tests.compose import train_config
from tests.conftest import REPOSITORY, Run
from tests.exhaustive import repeat_beyond
from tests.runs import TINY, run_folders
from tests.training.faults import ALLOWED, overrides

SAID = {
    "raise": (1, "ValueError: a bug of this rank"),
    "memory": (7, "out of memory on cpu in step 3, rank {rank} of 2: set micro_batch_size=4 (now 8)"),
    "exit": (6, "rank {rank} of 2 ended with exit code 9 and no message"),
}
CASES = [(kind, rank, blocks) for kind in SAID for rank in (0, 1) for blocks in (False, True)]
KEPT = [("raise", 0, False), ("memory", 1, True), ("exit", 1, False)]


def left_behind(folder: Path) -> list[str]:
    """Command lines of processes that still work in a folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            text = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        found += [text] if str(folder) in text and path.parent.name != str(os.getpid()) else []
    return found


@pytest.mark.parametrize("case", repeat_beyond(KEPT, CASES), ids=str)
def test_the_message_of_the_failing_rank_is_printed_and_recorded(
    case: tuple[str, int, bool], command: Run, tmp_path: Path
) -> None:
    kind, rank, blocks = case
    fault = overrides(kind, rank, blocks=blocks)
    done = command(
        "train.py", *TINY, "max_steps=5", "trainer.devices=2", *fault, f"output_dir={tmp_path}", cwd=tmp_path, **ALLOWED
    )
    code, message = SAID[kind]
    assert done.returncode == code, done.stderr
    assert message.format(rank=rank) in done.stderr
    assert done.stderr.count("Traceback (most recent call last)") == (1 if kind == "raise" else 0)
    (folder,) = run_folders(tmp_path)
    record = json.loads((folder / "run.json").read_text())
    assert (record["status"], record["exit_code"]) == ("failed", code)
    assert message.format(rank=rank) in "\n".join(record["error"])
    assert left_behind(folder) == []
    assert not list(folder.glob(".error*"))


def train_under_torchrun(folder: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    """Train five steps on two ranks of torchrun, in an output folder."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    return subprocess.run(
        [*torchrun, str(REPOSITORY / "train.py"), *TINY, "max_steps=5", *overrides, f"output_dir={folder}"], cwd=folder,
        capture_output=True, text=True, timeout=200, env={**os.environ, **ALLOWED, "PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip


@pytest.mark.exhaustive
@pytest.mark.parametrize("case", CASES, ids=str)
def test_under_torchrun_too(case: tuple[str, int, bool], tmp_path: Path) -> None:
    kind, rank, blocks = case
    done = train_under_torchrun(tmp_path, *overrides(kind, rank, blocks=blocks))
    assert done.returncode != 0
    (folder,) = run_folders(tmp_path)
    record = json.loads((folder / "run.json").read_text())
    assert record["status"] == "failed"
    # Of a rank that ends without a word nobody but torchrun knows more than that it has gone.
    message = "lost the connection to another rank, which ended" if kind == "exit" else SAID[kind][1].format(rank=rank)
    assert message in done.stderr
    assert message in "\n".join(record["error"])
    assert left_behind(folder) == []


def trainer(step: int) -> Any:
    return SimpleNamespace(global_step=step, strategy=SimpleNamespace(root_device=torch.device("cpu")))


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), DeviceMemoryError),
        (MemoryError(), DeviceMemoryError),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate"), DeviceMemoryError),
        (torch.distributed.DistBackendError("NCCL error: unhandled cuda error: out of memory"), DeviceMemoryError),
        (torch.distributed.DistBackendError("NCCL communicator was aborted on rank 1."), DistributedError),
        (RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1"), DistributedError),
        (RuntimeError("Timed out waiting 1800000ms for recv operation to complete"), DistributedError),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), RuntimeError),
    ],
)  # fmt: skip
def test_errors_are_distinguished_by_their_cause(error: Exception, expected: type[Exception]) -> None:
    config = train_config("global_batch_size=64", "trainer.accelerator=cpu")
    assert type(explain(error, trainer(6), config)) is expected


@pytest.mark.parametrize(
    ("arguments", "advice"),
    [
        (("micro_batch_size=16",), "set micro_batch_size=8 (now 16)"),
        ((), "set micro_batch_size=32 (now 64)"),
        (("strategy=deepspeed_stage_2",), "strategy=deepspeed_stage_2_offload"),
        (("micro_batch_size=1",), "lower global_batch_size=64"),
    ],
)
def test_out_of_memory_names_the_step_and_what_to_change(arguments: tuple[str, ...], advice: str) -> None:
    config = train_config("global_batch_size=64", "trainer.accelerator=cpu", *arguments)
    output = str(explain(MemoryError(), trainer(6), config))
    assert "in step 7" in output
    assert advice in output


def test_a_library_with_another_rank_or_device_ends_the_run() -> None:
    engine = SimpleNamespace(global_rank=0, world_size=1, device="cpu")
    strategy = SimpleNamespace(root_device=torch.device("cpu"), deepspeed_engine=engine)
    trainer: Any = SimpleNamespace(global_rank=0, world_size=1, strategy=strategy)
    SameRanks().on_train_start(trainer, None)
    engine.global_rank, engine.world_size, engine.device = 5, 8, "cuda:5"
    with pytest.raises(DistributedError, match="rank 0 of 1 on cpu, but rank 5 of 8 on cuda:5 for DeepSpeed"):
        SameRanks().on_train_start(trainer, None)
