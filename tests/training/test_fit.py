"""Lightning's Trainer on GPUs that are pretended: this process's rank and device are the group's, whatever is left over."""

import os
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_only

from clip_exp.ranks import group
from clip_exp.training import strategies
from clip_exp.training.fit import build_trainer
from clip_exp.training.saving import Preemption
from clip_exp.training.strategies import PortableDeepSpeedStrategy
from tests.compose import train_config
from tests.training.test_launchers import LEFT_OVER


def trainer(folder: Path, *overrides: str, gpus: int, index: int, rank: int, ranks: int) -> pl.Trainer:
    """The Trainer of a rank that sees some GPUs and has been given one."""
    datamodule: object = SimpleNamespace(has_validation=False, val_images=None, num_rows=64, images_of_step=list)
    with (
        mock.patch("torch.cuda.is_available", return_value=True),
        mock.patch("torch.cuda.device_count", return_value=gpus),
        mock.patch("torch.cuda.is_bf16_supported", return_value=True),
        mock.patch("lightning_fabric.accelerators.cuda.num_cuda_devices", return_value=gpus),
        mock.patch.object(group, "rank", return_value=rank),
        mock.patch.object(group, "world_size", return_value=ranks),
        mock.patch.object(strategies, "rank", return_value=rank),
        mock.patch.object(strategies, "world_size", return_value=ranks),
        mock.patch.object(rank_zero_only, "rank", 0),
    ):
        built = build_trainer(
            train_config("trainer.accelerator=gpu", *overrides),
            folder,
            device=torch.device("cuda", index),
            steps=2,
            datamodule=datamodule,  # type: ignore[arg-type]
            preemption=Preemption(mock.Mock()),
            tasks=[],
        )
        assert (built.global_rank, built.world_size) == (rank, ranks)
        assert rank_zero_only.rank == rank  # type: ignore[attr-defined]
        return built


@pytest.mark.parametrize("left", LEFT_OVER)
@pytest.mark.parametrize("strategy", ["ddp", "deepspeed_stage_3"])
def test_the_sixth_of_eight_ranks_has_the_sixth_gpu(
    left: str, strategy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in LEFT_OVER[left].items():
        monkeypatch.setenv(name, value)
    built = trainer(tmp_path, f"strategy={strategy}", gpus=8, index=5, rank=5, ranks=8)
    assert built.strategy.root_device == torch.device("cuda:5")


def test_ranks_on_two_machines_need_no_number_of_machines(tmp_path: Path) -> None:
    built = trainer(tmp_path, "strategy=ddp", gpus=8, index=5, rank=13, ranks=16)
    assert built.strategy.root_device == torch.device("cuda:5")


def test_a_rank_may_see_no_gpu_but_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = trainer(tmp_path, "strategy=deepspeed_stage_3", gpus=1, index=0, rank=5, ranks=8)
    assert built.strategy.root_device == torch.device("cuda:0")
    monkeypatch.setenv("LOCAL_RANK", "5")
    assert isinstance(built.strategy, PortableDeepSpeedStrategy)
    built.strategy._set_node_environment_variables()
    assert os.environ["LOCAL_RANK"] == "0"  # which DeepSpeed takes for the number of the GPU


@pytest.mark.parametrize("left", LEFT_OVER)
def test_one_process_has_the_first_gpu(left: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in LEFT_OVER[left].items():
        monkeypatch.setenv(name, value)
    built = trainer(tmp_path, gpus=8, index=0, rank=0, ranks=1)
    assert built.strategy.root_device == torch.device("cuda:0")
