"""Keys of `trainer` under Lightning's names do what Lightning documents, and a run that is resumed with them is exact."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from clip_exp.checkpoints.folders import checkpoints
from clip_exp.config.compose import compose
from clip_exp.data import datamodule
from clip_exp.errors import ConfigError
from clip_exp.models.clip import build_model
from clip_exp.training.launch import train_here
from clip_exp.training.module import CLIPModule
from clip_exp.training.opening import fingerprint
from clip_exp.training.preflight import check_train
from tests.compose import train_config
from tests.conftest import Run
from tests.runs import TINY, Finished, Train, run_folders
from tests.training.test_fit import trainer as pretended_trainer

DROPOUT = (*TINY[:-1], "model.dropout=0.1", "log_every_n_steps=1")
TIMING = ("train/samples_per_s", "train/data_wait_s", "train/compute_s")


def rows(run: Finished) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name not in TIMING} for row in run.metrics]


def assert_equal(run: Finished, other: Finished) -> None:
    assert rows(run) == rows(other)
    assert run.weights.keys() == other.weights.keys()
    assert all(torch.equal(run.weights[name], weight) for name, weight in other.weights.items())


# ------------------------------------------------------------------------------------------------------------ max_time


def test_max_time_saves_and_ends_and_the_same_command_resumes_to_the_same_end(train: Train, tmp_path: Path) -> None:
    words = (*DROPOUT, "max_steps=4", "val_every_n_steps=2", "trainer.devices=2", "monitor=val/loss", "patience=3")
    whole = train(*words)
    for step in (1, 2, 3):
        stopped = train(*words, "trainer.max_time={seconds: 0.001}", output_dir=tmp_path)
        assert stopped.record["status"] == "preempted"
        assert stopped.metrics[-1]["step"] == stopped.record["last_checkpoint_step"] == step
        assert "stopped after trainer.max_time; the same command resumes from" in stopped.output
    resumed = train(*words, "trainer.max_time=00:12:00:00", output_dir=tmp_path)
    assert resumed.folder == stopped.folder
    assert resumed.record["status"] == "finished"
    assert_equal(resumed, whole)


@pytest.mark.parametrize(
    ("typed", "seconds"),
    [("01:02:03:04", 93784), ("10:00:00:00", 864000), ("{hours: 1, minutes: 30}", 5400), ("null", float("inf"))],
)
def test_max_time_is_read_as_lightning_reads_it(typed: str, seconds: float) -> None:
    assert train_config(f"trainer.max_time={typed}").trainer.max_time_s == seconds


@pytest.mark.parametrize("typed", ["3600", "12:00", "{ours: 3}", "00:00:00:00", "{hours: -1}"])
def test_a_max_time_that_is_none_is_refused(typed: str) -> None:
    with pytest.raises(ConfigError, match=r"trainer\.max_time.* must be a time above 0 as DD:HH:MM:SS, in quotes"):
        train_config(f"trainer.max_time={typed}")


# ------------------------------------------------------------------------------------------------- what does not change


def test_arguments_that_only_look_on_leave_the_run_bitwise_as_it_is(train: Train) -> None:
    words = (*DROPOUT, "max_steps=3", "val_every_n_steps=2")
    watched = train(
        *words, "trainer.detect_anomaly=true", "trainer.benchmark=false", "trainer.num_sanity_val_steps=-1",
        "trainer.enable_model_summary=true", "trainer.sync_batchnorm=true",
    )  # fmt: skip
    assert_equal(watched, train(*words))
    for text in (watched.output, (watched.folder / "train.log").read_text()):
        assert "model.image" in text
        assert "Trainable params" in text
    assert [path.name for path in checkpoints(watched.folder)] == ["step-000003"]


def test_detect_anomaly_names_the_step_and_the_operation(command: Run, tmp_path: Path) -> None:
    loss = ("loss=custom", "loss._target_=tests.training.nan_gradient.Loss")
    words = (*TINY, *loss, "max_steps=3", "log_every_n_steps=1", f"output_dir={tmp_path}")
    plain = command("train.py", *words, "max_skipped_steps=0", cwd=tmp_path)
    assert (plain.returncode, "Step 1 had a gradient that is not finite" in plain.stderr) == (5, True)
    found = command("train.py", *words, "trainer.detect_anomaly=true", cwd=tmp_path)
    assert found.returncode == 5
    assert "step 1 has a gradient that is not a number" in found.stderr
    assert "Function 'PowBackward0' returned nan values" in found.stderr
    assert "Traceback" not in found.stderr
    log = (run_folders(tmp_path)[-1] / "train.log").read_text()
    assert "distance = (image_features - image_features.detach()).square().sum()" in log, "where it was computed"


# ---------------------------------------------------------------------------------------------------------- validation


class Seen:
    """Indices of the images of each validation, and the step after which it ran."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.validations: list[tuple[int, list[int]]] = []
        start, step = CLIPModule.on_validation_epoch_start, CLIPModule.validation_step

        def started(module: CLIPModule) -> None:
            self.validations.append((module.trainer.global_step, []))
            start(module)

        def stepped(module: CLIPModule, batch: Any, batch_idx: int) -> None:
            self.validations[-1][1].extend(batch.index.tolist())
            step(module, batch, batch_idx)

        monkeypatch.setattr(CLIPModule, "on_validation_epoch_start", started)
        monkeypatch.setattr(CLIPModule, "validation_step", stepped)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    monkeypatch.setattr(datamodule, "EVAL_BATCH_SIZE", 10)  # 24 images are 3 batches
    return Seen(monkeypatch)


@pytest.mark.parametrize(
    ("limit", "images"), [("2", 20), ("0.7", 20), ("0.01", 10), ("1", 10), ("1.0", 24), ("9", 24), ("null", 24), ("0", 0)]
)  # fmt: skip
def test_limit_val_batches_is_a_number_of_batches_or_a_fraction(
    limit: str, images: int, seen: Seen, tmp_path: Path
) -> None:
    words = [*TINY, "max_steps=1", f"trainer.limit_val_batches={limit}", f"output_dir={tmp_path}"]
    folder, code = train_here(compose("train", words), words)
    assert code == 0
    assert seen.validations == ([(1, list(range(images)))] if images else [])
    assert ("val/loss" in Finished(folder, "").metrics[-1]) == bool(images)


@pytest.mark.parametrize(("steps", "images"), [(0, None), (1, 10), (-1, 24)])
def test_num_sanity_val_steps_validates_before_the_first_step_and_records_nothing(
    steps: int, images: int | None, seen: Seen, tmp_path: Path
) -> None:
    words = [*TINY[:-1], "max_steps=2", "monitor=val/loss", "log_every_n_steps=1", f"output_dir={tmp_path}"]
    words += [
        "checkpoint_every_n_steps=1",
        f"trainer.num_sanity_val_steps={steps}",
        "trainer.max_time={seconds: 0.001}",
    ]
    first = [] if images is None else [(0, list(range(images)))]
    folder, _ = train_here(compose("train", words), words)
    assert seen.validations == first
    assert "val/loss" not in str(Finished(folder, "").metrics)
    assert train_here(compose("train", words), words) == (folder, 0)
    assert seen.validations == [*first, (2, list(range(24)))], "a resumed run needs no check"
    assert [path.name for path in checkpoints(folder)] == ["step-000001", "step-000002"]


def test_nothing_can_be_monitored_without_validation() -> None:
    with pytest.raises(
        ConfigError, match=r"^monitor=val/loss is not measured with trainer\.limit_val_batches=0: leave"
    ):
        check_train(train_config("trainer.limit_val_batches=0", "monitor=val/loss"))


# ------------------------------------------------------------------------------------------------------ other arguments


def test_clipping_by_value_limits_each_element_and_reports_the_norm_before_it() -> None:
    config = train_config("model=vit_nano", "trainer.gradient_clip_val=0.25", "trainer.gradient_clip_algorithm=value")
    module = CLIPModule(build_model(config.model, init_logit_scale=0.0), config.loss.build(), config, total_steps=10)
    module._trainer = type("Trainer", (), {"strategy": object()})()  # type: ignore[assignment]
    gradients = {name: torch.randn_like(parameter) for name, parameter in module.named_parameters()}
    for name, parameter in module.named_parameters():
        parameter.grad = gradients[name].clone()
    module.on_before_optimizer_step(None)
    norm = torch.nn.utils.get_total_norm(gradients.values())
    assert module.step_metrics["train/grad_norm"].item() == norm.item() > 1
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, gradients[name].clamp(-0.25, 0.25)), name


def test_sync_batchnorm_replaces_the_batch_norms_of_the_model_on_several_gpus(tmp_path: Path) -> None:
    for given, expected in (("true", nn.SyncBatchNorm), ("false", nn.BatchNorm2d)):
        network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
        words = ("strategy=ddp", f"trainer.sync_batchnorm={given}")
        built = pretended_trainer(tmp_path, *words, gpus=2, index=1, rank=1, ranks=2)
        sync = built.strategy._layer_sync  # type: ignore[attr-defined]
        assert type((sync.apply(network) if sync else network)[1]) is expected


@pytest.mark.parametrize("given", [None, True, False])
def test_benchmark_sets_the_flag_of_cudnn_and_null_leaves_it(
    given: bool | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for before in (True, False):
        monkeypatch.setattr(torch.backends.cudnn, "benchmark", before)
        words = () if given is None else (f"trainer.benchmark={str(given).lower()}",)
        pretended_trainer(tmp_path, *words, gpus=1, index=0, rank=0, ranks=1)
        assert torch.backends.cudnn.benchmark is (before if given is None else given)


def test_deterministic_warn_warns_where_there_is_no_such_algorithm(tmp_path: Path) -> None:
    try:
        pretended_trainer(tmp_path, "trainer.deterministic=warn", gpus=1, index=0, rank=0, ranks=1)
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("trainer.sync_batchnorm=true", "trainer.accelerator=cpu", "trainer.devices=2"), "PyTorch's SyncBatchNorm needs GPUs"),
        (("trainer.sync_batchnorm=true", "strategy=deepspeed_stage_2"), "trainer.sync_batchnorm is not supported with DeepSpeed"),
        (("trainer.gradient_clip_algorithm=value", "strategy=deepspeed_stage_2"), "is not supported by DeepSpeed: use norm"),
        (("trainer.benchmark=true", "trainer.deterministic=true"), "exclude each other"),
    ],
)  # fmt: skip
def test_what_is_not_possible_is_refused(overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_train(train_config(*overrides), overrides)
    assert message in str(caught.value)


def test_arguments_that_change_the_result_are_part_of_a_runs_identity_and_the_others_are_not() -> None:
    before = fingerprint(train_config())
    for word in (
        "max_time={hours: 1}", "detect_anomaly=true", "benchmark=true", "num_sanity_val_steps=2",
        "enable_model_summary=true", "deterministic=warn",
    ):  # fmt: skip
        assert fingerprint(train_config(f"trainer.{word}")) == before, word
    for word in (
        "gradient_clip_algorithm=value",
        "sync_batchnorm=true",
        "limit_val_batches=1",
        "limit_val_batches=0.5",
    ):
        assert fingerprint(train_config(f"trainer.{word}")) != before, word
    assert (
        fingerprint(train_config("keep_checkpoints=all")) == fingerprint(train_config("keep_every_n_steps=5")) == before
    )
