"""A run from pretrained weights: they are found once, resolved into its configuration, and not needed to resume."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import clip_exp
from clip_exp.config.base import plain
from clip_exp.config.files import read_run_config
from clip_exp.config.model import Activation
from clip_exp.config.names import named_model
from clip_exp.config.training import TrainConfig
from clip_exp.errors import CheckpointError, ConfigError
from clip_exp.models.clip import build_model
from clip_exp.runs import RunRecord
from clip_exp.training.opening import Opening, fingerprint, open_run
from tests.checkpoints.test_folders import write
from tests.compose import train_config
from tests.conftest import REPOSITORY
from tests.runs import TINY, Finished, Train, run_folders, unfinish
from tests.weights.server import Served, serving
from tests.weights.test_hub import fetched, publish

SETTLED = {"activation": Activation.quick_gelu, "mean": [0.5, 0.4, 0.3]}


def write_weights(path: Path, name: str = "vit_nano") -> Path:
    """Random weights that say that they were trained with quick_gelu and a mean of their own."""
    torch.manual_seed(3)
    model = named_model(name)
    weights = build_model(model).state_dict()
    described = model.model_copy(
        update={"activation": SETTLED["activation"], "image": model.image.model_copy(update={"mean": SETTLED["mean"]})}
    )
    save_file(weights, path, {"clip_exp.model": json.dumps(plain(described))})
    return path


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    return write_weights(tmp_path / "start.safetensors")


def opened(config: TrainConfig) -> Opening:
    opening = open_run(config)
    opening.begin([])
    return opening


def test_the_weights_settle_the_configuration_and_are_noted(tmp_path: Path, weights: Path, capsys) -> None:
    opening = opened(train_config("model=vit_nano", f"pretrained={weights}", f"output_dir={tmp_path}/out"))
    model = read_run_config(opening.folder).model
    assert (model.activation, model.image.mean) == (SETTLED["activation"], SETTLED["mean"])
    assert RunRecord(opening.folder).values["pretrained"] == {
        "description": str(weights),
        "path": str(weights),
        "sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
        "format": "clip_exp's safetensors",
    }
    assert "model.activation=quick_gelu: the activation of the weights" in capsys.readouterr().err


def test_what_does_not_fit_the_towers_is_reported_before_weights_are_downloaded(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("clip_exp.training.opening.find_weights", lambda *_: pytest.fail("the weights were searched"))
    config = train_config(
        "model=vit_b32",
        "pretrained=openai",
        "finetune=lit",
        "finetune.image.unfrozen_blocks=99",
        f"output_dir={tmp_path}",
    )
    with pytest.raises(ConfigError, match="unfrozen_blocks=99 must be at most 12, the number of blocks"):
        open_run(config)


def test_a_resumed_run_does_not_need_its_start_weights(tmp_path: Path, weights: Path) -> None:
    config = train_config("model=vit_nano", f"pretrained={weights}", f"output_dir={tmp_path}/out")
    first = opened(config)
    write(first.folder, 10)
    weights.unlink()
    again = open_run(config)
    assert (again.folder, again.finished) == (first.folder, False)
    assert again.resolved == first.resolved
    again.begin([])
    assert "pretrained" in RunRecord(first.folder).values, "the first beginning is kept"
    named = config.model_copy(update={"resume": str(first.folder), "max_steps": 99, "epochs": None})
    assert open_run(named).resolved.model == first.resolved.model
    other = train_config("model=vit_nano", f"pretrained={weights}", f"output_dir={tmp_path}/out", "seed=1")
    with pytest.raises(ConfigError, match="does not exist"):
        open_run(other)


def test_another_activation_than_that_of_training_is_refused_and_leaves_no_folder(tmp_path, weights, command) -> None:
    arguments = [*TINY, f"pretrained={weights}", "model.activation=gelu", f"output_dir={tmp_path}/out"]
    result = command("train.py", *arguments, cwd=tmp_path)
    assert result.returncode == 2
    assert "model.activation=gelu, but" in result.stderr
    assert "was trained with quick_gelu: leave it out" in result.stderr
    assert not (tmp_path / "out").exists()


def test_weights_that_do_not_fit_are_refused_before_a_run_has_a_folder(tmp_path: Path, command) -> None:
    weights = tmp_path / "tiny.safetensors"
    save_file(build_model(named_model("vit_tiny")).state_dict(), weights)
    for devices in ("trainer.devices=1", "trainer.devices=2"):
        result = command(
            "train.py",
            *TINY,
            f"pretrained={weights}",
            "max_steps=2",
            devices,
            f"output_dir={tmp_path}/out",
            cwd=tmp_path,
        )
        assert result.returncode == CheckpointError.exit_code, result.stdout + result.stderr
        assert "tiny.safetensors does not fit the model" in result.stderr
        assert not (tmp_path / "out").exists()


def test_weights_that_fit_twice_are_chosen_before_a_run_has_a_folder(tmp_path: Path) -> None:
    """The choice counts in what a run is."""
    state = build_model(named_model("vit_nano")).state_dict()
    both = {f"{part}.{name}": tensor for part in ("student", "teacher") for name, tensor in state.items()}
    torch.save({"state_dict": both}, tmp_path / "last.ckpt")
    given = ("model=vit_nano", f"pretrained={tmp_path / 'last.ckpt'}", f"output_dir={tmp_path / 'out'}")
    with pytest.raises(CheckpointError, match=r"Select one: pretrained_prefix=state_dict\.student"):
        open_run(train_config(*given))
    assert not (tmp_path / "out").exists()
    opening = open_run(train_config(*given, "pretrained_prefix=student"))
    assert opening.facts["pretrained"]["prefix"] == "student"
    hashes = {fingerprint(train_config(*given, f"pretrained_prefix={part}")) for part in ("student", "teacher")}
    assert len(hashes) == 2


START = (*TINY, "max_steps=4", "log_every_n_steps=1", "checkpoint_every_n_steps=2", "scheduler.warmup_steps=1")


@pytest.fixture(scope="module")
def started(train: Train, tmp_path_factory: pytest.TempPathFactory) -> tuple[Finished, Finished]:
    """A run that starts from weights, in one process and split over two ranks."""
    weights = write_weights(tmp_path_factory.mktemp("weights") / "start.safetensors")
    split = "+strategy.config.zero_optimization.stage3_param_persistence_threshold=0"
    alone = train(*START, f"pretrained={weights}")
    return alone, train(*START, f"pretrained={weights}", "strategy=deepspeed_stage_3", "trainer.devices=2", split)


def test_a_run_starts_from_exactly_the_weights(weights: Path, train: Train) -> None:
    still = train(*TINY, f"pretrained={weights}", "max_steps=1", "optimizer.lr=1e-60", "scheduler.warmup_steps=0")
    start = load_file(weights)
    assert all(torch.equal(still.weights[name], value) for name, value in start.items() if name != "logit_scale")


def test_a_run_over_ranks_starts_from_the_weights(started: tuple[Finished, Finished]) -> None:
    alone, sharded = started
    assert sharded.losses == pytest.approx(alone.losses, rel=1e-5)


def test_a_run_resumes_wherever_the_weights_lie_that_it_started_from(
    started: tuple[Finished, Finished], tmp_path: Path, train: Train
) -> None:
    one, _ = started
    weights = Path(one.record["pretrained"]["path"])
    folder = tmp_path / "train" / one.folder.parent.name / one.folder.name
    shutil.copytree(one.folder, folder)
    shutil.rmtree(folder / "checkpoints" / "step-000004")
    unfinish(folder)
    moved = weights.rename(tmp_path / "elsewhere.safetensors")
    on = train(*(word for word in START if not word.startswith("resume")), f"pretrained={moved}", output_dir=tmp_path)
    assert on.folder == folder
    assert on.losses == one.losses
    assert all(torch.equal(on.weights[name], value) for name, value in one.weights.items())


@pytest.mark.exhaustive
def test_the_folder_of_a_sharded_run_is_a_start_and_a_model_like_any_other(
    started: tuple[Finished, Finished], train: Train
) -> None:
    one, run = started
    alone, sharded = (clip_exp.load(folder, accelerator="cpu") for folder in (one.folder, run.folder))
    torch.testing.assert_close(
        sharded.encode_text(["a red circle", "x"]), alone.encode_text(["a red circle", "x"]), atol=1e-4, rtol=0
    )
    by_name = clip_exp.load("vit_nano", pretrained=run.folder, accelerator="cpu")
    assert all(torch.equal(value, run.weights[name]) for name, value in by_name.model.state_dict().items())
    still = train(*TINY, f"pretrained={run.folder}", "max_steps=1", "optimizer.lr=1e-60", "scheduler.warmup_steps=0")
    assert all(torch.equal(still.weights[name], value) for name, value in run.weights.items())


@pytest.mark.exhaustive
def test_of_ranks_that_torchrun_starts_one_downloads(tmp_path: Path, weights: Path) -> None:
    with serving() as server:
        server.files["/"] = Served(b"")
        publish(server, {"model.safetensors": weights.read_bytes()}, large=("model.safetensors",))
        environment = {
            **os.environ,
            "HF_ENDPOINT": server.url,
            "HF_HUB_CACHE": str(tmp_path / "hub"),
            "OMP_NUM_THREADS": "1",
        }
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
        arguments = [*TINY, "pretrained=hf-hub:org/clip", "max_steps=2", "log_every_n_steps=1", "strategy=ddp"]
        result = subprocess.run(
            [*torchrun, str(REPOSITORY / "train.py"), *arguments, "trainer.devices=2", f"output_dir={tmp_path}/out"],
            cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert result.returncode == 0, result.stdout + result.stderr
        assert fetched(server) == ["model.safetensors"]
        assert sum(request.path.startswith("/api/models") for request in server.requests) == 1
    (folder,) = run_folders(tmp_path / "out")
    assert Finished(folder, "").record["pretrained"]["description"] == "hf-hub:org/clip"
    assert read_run_config(folder).model.activation is SETTLED["activation"]
