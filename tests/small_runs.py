"""A run folder with random weights, and images of noise: what evaluation and the Python API start from."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from clip_exp.checkpoints.folders import atomic_checkpoint
from clip_exp.config.data import DataConfig
from clip_exp.config.files import to_yaml
from clip_exp.config.names import named_model
from clip_exp.config.optimization import AdamWConfig
from clip_exp.config.training import AutoConfig, TrainConfig
from clip_exp.losses.softmax import SoftmaxLossConfig
from clip_exp.models.clip import CLIP, build_model
from tests.checkpoints.test_folders import write_state


@pytest.fixture(scope="session")
def nano() -> CLIP:
    torch.manual_seed(0)
    return build_model(named_model("vit_nano")).eval()


@pytest.fixture
def run_dir(tmp_path: Path, nano: CLIP) -> Path:
    """A finished run: `config.yaml` and one checkpoint, without validation data."""
    return write_run(tmp_path / "run", nano)


def write_run(folder: Path, model: CLIP, data: DataConfig | None = None, monitor: str | None = None) -> Path:
    folder.mkdir(parents=True)
    config = TrainConfig(
        model=named_model("vit_nano"),
        data=data or DataConfig(name="csv", train="pairs.csv"),
        loss=SoftmaxLossConfig(),
        optimizer=AdamWConfig(lr=1e-3),
        strategy=AutoConfig(),
        name="vit_nano_csv",
        max_steps=1,
        monitor=monitor,
    )
    (folder / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    write_checkpoint(folder, model, 1)
    return folder


def write_checkpoint(
    run_dir: Path,
    model: torch.nn.Module,
    step: int,
    averaged: dict[str, torch.Tensor] | None = None,
    **metadata: object,
) -> Path:
    target = run_dir / "checkpoints" / f"step-{step:06d}"
    with atomic_checkpoint(target, {"step": step, **metadata}) as folder:
        save_file(model.state_dict(), folder / "model.safetensors")
        if averaged is not None:
            save_file(averaged, folder / "ema.safetensors")
        write_state(folder, step)
    return target


def write_image(path: Path, seed: int, size: tuple[int, int] = (40, 36)) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return str(path)
