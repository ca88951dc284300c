"""The LightningModule's steps on a GPU: the process launches one after the other, and never waits for what they compute."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pytorch_lightning.callbacks import EarlyStopping

from clip_exp.config.training import TrainConfig
from clip_exp.data.loader import Batch, EvalBatch
from clip_exp.evaluation.validation import ValidationFeatures
from clip_exp.training import module as training_module
from clip_exp.training.module import CLIPModule
from clip_exp.training.optim import build_optimizer
from tests.compose import train_config
from tests.fake_cuda import autocast, fake_model, fake_tensors
from tests.synchronization import SynchronizationWatch

PAIRS, CAPTIONS, LENGTH = 6, 9, 16


def build_module(config: TrainConfig) -> CLIPModule:
    """A module of fake tensors on a GPU, with as much of a Trainer as its steps ask for."""
    bias = config.loss.logit_bias
    module = CLIPModule(
        fake_model(config.model, "cuda", init_logit_bias=bias), config.loss.build(), config, total_steps=100
    )
    module._device = torch.device("cuda:0")
    module._trainer = SimpleNamespace(strategy=object())  # type: ignore[assignment]
    return module


def images(config: TrainConfig) -> torch.Tensor:
    size = config.model.image.image_size
    return torch.zeros(PAIRS, size, size, 3, dtype=torch.uint8, device="cuda").permute(0, 3, 1, 2)


def ids(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.int64, device="cuda")


@pytest.mark.parametrize(
    "overrides",
    [
        ["model=vit_nano", "loss.same_caption=positive", "loss.same_image=positive"],
        ["model=vit_nano", "loss=sigmoid", "loss.same_caption=positive", "loss.chunk_size=4"],
        ["model=vit_nano", "model.image.patch_dropout=0.5", "micro_batch_size=4"],
        ["model=rn50", "model.image.stages=[1,1,1,1]", "model.text.layers=2", "micro_batch_size=4"],
    ],
    ids=lambda overrides: " ".join(overrides),
)
def test_a_training_step_does_not_wait_for_the_gpu(overrides: list[str]) -> None:
    config = train_config(*overrides)
    assert config.optimizer.fused
    with fake_tensors():
        module = build_module(config)
        optimizer = build_optimizer(module.model, config.optimizer, config.finetune)
        batch = Batch(images(config), ids(PAIRS, LENGTH), ids(PAIRS), ids(PAIRS))
        for watch in (SynchronizationWatch(), SynchronizationWatch()):  # the first step of a run may wait
            with watch:
                with autocast("cuda", torch.bfloat16):
                    module.training_step(batch, 0)
                for parameter in module.model.parameters():  # a backward pass needs a driver
                    parameter.grad = torch.zeros_like(parameter)
                module.on_before_optimizer_step(optimizer)
                optimizer.step()
                optimizer.zero_grad()
    assert watch.found == []
    assert module.step_metrics.keys() == {"train/loss", "train/logit_scale", "train/grad_norm"}


def test_a_validation_step_does_not_wait_for_the_gpu() -> None:
    config = train_config("model=vit_nano")
    with fake_tensors():
        module = build_module(config)
        batch = EvalBatch(
            ids(PAIRS), images(config), ids(CAPTIONS, LENGTH), ids(CAPTIONS), ids(CAPTIONS), ids(CAPTIONS), ids(PAIRS)
        )
        for watch in (SynchronizationWatch(), SynchronizationWatch()):
            with watch, torch.no_grad(), autocast("cuda", torch.bfloat16):
                module.validation_step(batch, 0)
    assert watch.found == []


def test_validation_is_scored_on_the_device_with_exact_float32_products(monkeypatch: pytest.MonkeyPatch) -> None:
    columns: list[torch.Tensor] = []
    switches = []
    monkeypatch.setattr(training_module, "deduplicate", lambda *given: columns.extend(given))
    monkeypatch.setattr(CLIPModule, "_validation_loss", lambda self, features: {})
    monkeypatch.setattr(CLIPModule, "log_dict", lambda self, values, **options: None)

    def validation_metrics(features: ValidationFeatures, class_embeddings_CD: torch.Tensor | None) -> dict[str, float]:
        switches.append((torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32))
        return {}

    monkeypatch.setattr(training_module, "validation_metrics", validation_metrics)
    with fake_tensors():
        module = build_module(train_config("model=vit_nano"))
        module._validation = [[ids(2), ids(2, 8).float()], [ids(3), ids(3, 8).float()]]
        module.on_validation_epoch_end()
    assert [(column.device.type, len(column)) for column in columns] == [("cuda", 5), ("cuda", 5)]
    assert switches == [("highest", False)]


def test_patience_is_restored_from_a_checkpoint_of_an_older_version() -> None:
    state = {"wait_count": 3}
    older = EarlyStopping("val/zeroshot_top1", mode="max")
    checkpoint = {"optimizer_states": [], "random_states": [], "state_dict": {}, "callbacks": {older.state_key: state}}
    of_loss = {"loss": torch.nn.Identity(), "frozen_loss": set(), "frozen_loss_sha256": None}
    module: Any = SimpleNamespace(config=train_config(), parameter_names=[], **of_loss)
    CLIPModule.on_load_checkpoint(module, checkpoint)
    assert checkpoint["callbacks"] == {EarlyStopping("val/top1", mode="max").state_key: state}
