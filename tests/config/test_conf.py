"""Tests that every file in conf/ can be composed and built."""

import itertools
from pathlib import Path

import pytest
import torch
import yaml
from lightning_utilities.core.imports import RequirementCache
from omegaconf import OmegaConf
from torch import nn

from clip_exp.config.base import broken_rules, parse
from clip_exp.config.compose import compose
from clip_exp.config.files import conf_dir, options
from clip_exp.config.model import ModelConfig
from clip_exp.config.training import StrategyName
from clip_exp.errors import ConfigError
from clip_exp.models.clip import build_model
from clip_exp.training.fit import build_strategy
from clip_exp.training.metrics import build_loggers
from clip_exp.training.optim import build_optimizer, build_scheduler
from clip_exp.training.preflight import check_train
from tests.compose import compose_config, train_config
from tests.conftest import Run
from tests.runs import TINY, Train, run_folders

GROUPS = ("data", "loss", "scheduler", "trainer", "finetune", "callbacks", "debug", "experiment")


def overrides_of(group: str, option: str) -> list[str]:
    needed = {
        "data=csv": ["data.train=pairs.csv"],
        "data=custom": ["data._target_=builtins.list"],
        "loss=custom": ["loss._target_=torch.nn.Identity"],
        "optimizer=custom": ["optimizer._target_=torch.optim.RAdam", "optimizer.lr=1e-3"],
    }
    return [f"{group}={option}", *needed.get(f"{group}={option}", [])]


@pytest.mark.parametrize(("group", "option"), [(g, o) for g in GROUPS for o in options(g)])
def test_every_option_composes_into_the_schema(group: str, option: str) -> None:
    assert train_config(*overrides_of(group, option)).name


@pytest.mark.parametrize("option", options("model"))
def test_every_model_is_built_as_configured(option: str) -> None:
    named = {"open_clip": "ViT-M-32"}  # an option for many architectures
    config = train_config(f"model={option}", *(f"model.name={named[o]}" for o in named if o == option)).model
    with torch.device("meta"):
        model = build_model(config)
    assert config.name == named.get(option, option)
    assert model.logit_scale.shape == (1,)
    if config.text.kind == "huggingface":  # transformers looks at the numbers of a mask, which nothing has here
        assert model.text.projection.weight.shape[0] == config.embed_dim  # type: ignore[union-attr]
    else:
        assert model.encode_text(torch.zeros(2, 5, dtype=torch.long, device="meta")).shape == (2, config.embed_dim)


@pytest.mark.parametrize("command", ["train", "evaluate", "predict", "rank", "search", "export"])
def test_towers_of_other_libraries_replace_those_of_the_model_completely(command: str) -> None:
    overrides = ["model=vit_tiny", "model/image=timm", "model.image.name=resnet18", "model/text=huggingface"]
    model = compose_config(*overrides, "model.text.name=xlm-roberta-base", command=command).model
    assert (model.image.kind, model.image.name, model.image.image_size) == ("timm", "resnet18", 96)
    assert (model.text.kind, model.text.name) == ("huggingface", "xlm-roberta-base")
    for tower in (model.image, model.text):
        assert not {"width", "layers", "heads", "patch_size", "vocab_size"} & set(tower)
    values = OmegaConf.to_container(model, resolve=True)
    assert broken_rules(parse(ModelConfig, values, "model."), "model.") == []


@pytest.mark.parametrize("group", ["model/image", "model/text"])
def test_a_tower_of_another_library_must_be_named(group: str) -> None:
    for option in options(group):
        with pytest.raises(ConfigError, match=r"model\.(image|text)\.(name|_target_) has no value"):
            check_train(train_config("model=vit_tiny", f"{group}={option}"))


@pytest.mark.parametrize("option", options("optimizer"))
def test_every_optimizer_steps_and_clamps_the_logit_scale(option: str) -> None:
    model = nn.Module()
    model.weight, model.logit_scale = nn.Parameter(torch.ones(3, 3)), nn.Parameter(torch.full([1], 9.0))
    config = train_config(*overrides_of("optimizer", option)).optimizer
    optimizer = build_optimizer(model, config)
    scheduler = build_scheduler(optimizer, train_config().scheduler, total_steps=10)
    (model.weight.sum() - model.logit_scale.sum()).backward()
    optimizer.step()
    scheduler.step()
    assert not torch.equal(model.weight, torch.ones(3, 3))
    assert model.logit_scale.item() == pytest.approx(4.60517, abs=1e-4)
    decays = {group["name"]: group["weight_decay"] for group in optimizer.param_groups}
    assert decays == {"decay": config.weight_decay, "logit_scale": 0.0}


@pytest.mark.parametrize("option", options("loss"))
def test_every_loss_is_built(option: str) -> None:
    config = train_config(*overrides_of("loss", option)).loss
    assert config.name == option
    assert (config.logit_bias is not None) == (option == "sigmoid")
    assert isinstance(config.build(), nn.Module)


@pytest.mark.parametrize("option", options("strategy"))
def test_every_strategy_is_built_on_a_cpu(option: str) -> None:
    config = train_config(f"strategy={option}").strategy
    strategy = build_strategy(config, torch.device("cpu"))
    if config.name == StrategyName.deepspeed:
        zero = strategy.config["zero_optimization"]
        assert zero["stage"] == config.stage == int(option.split("_")[2])
        assert ("offload_optimizer" in zero) == config.offload == option.endswith("offload")
    else:
        assert option in ("auto", "ddp")


@pytest.mark.parametrize("option", ["csv", "tensorboard", "wandb"])
def test_every_logger_is_built_in_addition_to_the_metrics_table(
    option: str, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    config = train_config(f"logger={option}", *(["logger.wandb.mode=offline"] if option == "wandb" else [])).logger
    names = [type(logger).__name__ for logger in build_loggers(config, tmp_path, "run")]
    expected = {"csv": [], "tensorboard": ["TensorBoardLogger"], "wandb": ["WandbLogger"]}
    assert names == ["MetricsCSV", *expected[option]]


OPTIONAL = {"mlflow": ("MLFlowLogger", "mlflow>=1.0.0"), "comet": ("CometLogger", "comet-ml>=3.44.4")}


@pytest.mark.parametrize("option", OPTIONAL)
def test_a_logger_whose_package_is_not_installed_is_refused_with_its_install_command(
    option: str, refused: Run, tmp_path: Path
) -> None:
    name, requirement = OPTIONAL[option]
    if RequirementCache(requirement):
        pytest.skip(f"{requirement} is installed")
    done = refused("train.py", f"logger=[tensorboard,{option}]", f"output_dir={tmp_path}", cwd=tmp_path)
    assert done.returncode == 2
    expected = f"logger.extra.{option}: {name} needs a package that is not installed: pip install '{requirement}'."
    assert done.stderr == f"error: {expected}\n"
    assert run_folders(tmp_path) == []


def test_a_logger_of_a_package_that_is_not_there_is_refused_with_its_install_command() -> None:
    target = "pytorch_lightning_of_mine.loggers.Mine"
    with pytest.raises(ConfigError, match=r"there is no module .* pip install pytorch_lightning_of_mine\.$"):
        check_train(train_config(f"logger.extra.mine._target_={target}"))


def test_several_loggers_at_once() -> None:
    config = train_config("logger=[csv,tensorboard,wandb]").logger
    assert config.tensorboard is not None
    assert config.wandb is not None


@pytest.mark.parametrize("option", options("task"))
def test_every_task_composes_and_parses_under_its_name(option: str) -> None:
    values = OmegaConf.load(conf_dir() / "task" / f"{option}.yaml")
    needed = [f"task.{key}=x" for key in OmegaConf.missing_keys(values)]
    config = compose("evaluate", [f"task=[{option}]", *needed])
    assert list(config.task) == [option]
    assert config.task[option].kind == values[option].kind


def test_several_tasks_at_once() -> None:
    config = compose("evaluate", ["task=[retrieval,digits]", "task.retrieval.table=x.csv"])
    assert sorted(config.task) == ["digits", "retrieval"]


@pytest.mark.parametrize("path", sorted(conf_dir().rglob("*.yaml")), ids=lambda p: str(p.relative_to(conf_dir())))
def test_every_file_starts_with_a_comment(path) -> None:
    text = path.read_text()
    assert path.parent.name in ("help", "optimizer", "logger", "trainer", "callbacks") or text.startswith("#"), path
    assert yaml.safe_load(text) is not None


def test_the_debug_modes_pass_the_checks() -> None:
    for option in options("debug"):
        check_train(train_config(f"debug={option}"))


def test_a_limited_run_validates_twice_on_a_part_of_the_data(train: Train) -> None:
    run = train("debug=limit", *TINY, "log_every_n_steps=20")
    assert [row["step"] for row in run.metrics if "val/loss" in row] == [20, 40]
    assert run.record["steps"] == 40


def test_debug_default_logs_every_step_of_one_epoch_on_the_cpu(train: Train) -> None:
    run = train("debug=default", "model=vit_nano", "data=shapes", "data.generate.rows=48", "global_batch_size=16")
    assert [row["step"] for row in run.metrics] == [1, 2, 3]
    assert (run.record["device"], run.record["ranks"]) == ("cpu", 1)
    assert "step 2/3" in run.output
    assert "Trainable params" in run.output


def test_model_size_and_strategy_combine_freely() -> None:
    for model, strategy in itertools.product(["vit_b32", "vit_tiny"], options("strategy")):
        check_train(
            train_config(f"model={model}", f"strategy={strategy}", "trainer.accelerator=cpu", "trainer.devices=2")
        )
