"""Tests of composing configurations: every key of the schema can be set, interpolated, shown and completed, and all problems are reported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from clip_exp.config import registry
from clip_exp.config.base import (
    GLOBAL_GROUPS,
    MISSING,
    Config,
    broken_rules,
    chosen,
    complete,
    default_of,
    key_of,
    members,
    plain,
)
from clip_exp.config.commands import SCHEMAS
from clip_exp.config.compose import compose, config_name
from clip_exp.config.files import conf_dir, options, read_run_config, to_yaml
from clip_exp.config.loader import GLOBAL_HEADER
from clip_exp.config.training import TrainConfig
from clip_exp.errors import ConfigError
from tests.compose import compose_config, train_config
from tests.conftest import REPOSITORY
from tests.keys import nested_models

# ---------------------------------------------------------------------------------------------- keys of the schema


@pytest.mark.parametrize("prefix", ["", "+", "++"])
def test_a_key_that_only_the_schema_has_is_set(prefix: str) -> None:
    assert "momentum:" not in (conf_dir() / "optimizer" / "sgd.yaml").read_text()
    assert train_config("optimizer=sgd", f"{prefix}optimizer.momentum=0.8").optimizer.arguments["momentum"] == 0.8


def test_a_key_that_is_deleted_has_its_default() -> None:
    assert train_config("logger=wandb", "~logger.wandb").logger.wandb is None
    assert train_config("~logger.wandb").logger.wandb is None
    assert train_config("optimizer.lr=1", "~optimizer.weight_decay").optimizer.weight_decay == 0.2
    with pytest.raises(ConfigError, match=r"~logger\.wandbb does not exist"):
        train_config("~logger.wandbb")


def test_a_key_of_a_selected_option_is_set_and_one_of_a_null_node_is_refused() -> None:
    assert train_config("logger=wandb", "logger.wandb.project=x").logger.wandb.project == "x"
    with pytest.raises(
        ConfigError, match=r"logger\.wandb\.project cannot be set, since logger\.wandb is null: select logger=wandb"
    ):
        train_config("logger.wandb.project=x")


@pytest.mark.parametrize(
    "overrides", [["data.augmentation.scale.low=1"], ["data.train=[{path: a.csv}]", "data.train.filter=x"]]
)
def test_a_key_in_a_list_is_refused(overrides: list[str]) -> None:
    with pytest.raises(
        ConfigError, match=r"^data\.\S+ cannot be set, since data\.\S+ is a list: set all of it \(data\.\S+=\[…\]\)\.$"
    ):
        train_config("data=csv", *overrides)


def test_a_mapping_is_given_to_a_node_that_is_null() -> None:
    config = train_config("data=csv", "data.train=x.csv", "++data.generate={kind: shapes}")
    assert config.data.generate is not None
    assert broken_rules(config) == [
        "data.generate and data.train exclude each other: use data=csv for your own tables."
    ]


def test_an_interpolation_finds_a_key_that_only_the_schema_has() -> None:
    assert train_config("optimizer=sgd", "name=momentum-${optimizer.momentum}").name == "momentum-0.9"


def test_another_class_has_its_own_defaults_and_typed_values_are_retained() -> None:
    config = train_config("optimizer._target_=torch.optim.SGD", "optimizer.weight_decay=0.5").optimizer
    assert plain(config) == {
        "_target_": "torch.optim.SGD", "lr": 0.1, "weight_decay": 0.5, "momentum": 0.9, "nesterov": False,
    }  # fmt: skip
    mapping = train_config("optimizer={_target_: torch.optim.SGD, momentum: 0.5}").optimizer
    assert plain(mapping) == plain(train_config("optimizer=sgd", "optimizer.momentum=0.5").optimizer)
    with pytest.raises(
        ConfigError, match=r"optimizer\.betas is a key of optimizer\._target_=torch\.optim\.AdamW and of"
    ):
        train_config("optimizer._target_=torch.optim.SGD", "optimizer.betas=[0.9,0.95]")


# --------------------------------------------------------------------------------------------- what is wrong with it


def test_every_mistake_is_reported_with_its_full_key(refused, tmp_path: Path) -> None:
    done = refused("train.py", "optimizer.lrr=1", "data.on_bad_image=skip", "max_step=5", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "error:",
        "  - data.on_bad_image=skip must be one of error, replace.",
        "  - optimizer.lrr does not exist: did you mean 'optimizer.lr'?",
        "  - max_step does not exist: did you mean 'max_steps'?",
    ]
    assert list(tmp_path.iterdir()) == []


def test_broken_rules_are_reported_with_invalid_values() -> None:
    with pytest.raises(ConfigError) as caught:
        train_config(
            "max_steps=5", "epochs=3", "seed=-1", "model.image.heads=3", "data.train=[{path: a.csv, weigth: 2}]"
        )
    lines = str(caught.value).splitlines()
    assert [line.split(" ")[0] for line in lines] == [
        "data.train[0].weigth",
        "seed=-1",
        "max_steps=5",
        "model.image.width=64",
    ]


def test_the_nearest_key_of_the_whole_tree_is_named() -> None:
    with pytest.raises(ConfigError, match=r"max_pixels does not exist: did you mean 'data\.max_image_pixels'"):
        train_config("max_pixels=5")
    with pytest.raises(ConfigError, match=r"betas does not exist: did you mean 'optimizer\.betas'"):
        train_config("betas=[0.9,0.95]")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("max_steps=true", "max_steps=true must be a number."),
        ("max_steps=1.5", "max_steps=1.5 must be an integer."),
        ("optimizer.lr=fast", "optimizer.lr=fast must be a number."),
        ("compile=maybe", "compile=maybe must be true or false."),
        ("trainer=default", "trainer=default must be a mapping: set its keys (trainer.<key>=…)."),
        ("++strategy.name=dpp", "strategy.name=dpp must be one of auto, ddp, deepspeed. Did you mean 'ddp'?"),
        ("data.augmentation.scale=[1.0,0.5]", "data.augmentation.scale=[1.0, 0.5] must have the smaller number first."),
        ("data.templates=[]", "data.templates=[] must not be empty."),
        ("task.imagenet.root=x", "task.imagenet is not selected: add it to task=[…,imagenet]."),
        ("task.objectnett.root=x", "task.objectnett is not selected: did you mean 'objectnet'?"),
        (
            "loss.chunk_size=5",
            "loss.chunk_size is a key of loss.name=sigmoid, which is not selected: select it, or leave this out.",
        ),
    ],
)
def test_an_invalid_value_is_reported_in_one_sentence(override: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        train_config(override)
    assert str(caught.value).startswith(expected)
    assert "\n" not in str(caught.value)


def test_a_number_may_name_a_run() -> None:
    assert train_config("name=2026").name == "2026"


# ------------------------------------------------------------------------------------------------ what Hydra offers


def shown(command, tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return command("train.py", *arguments, cwd=tmp_path)


def test_the_shown_configuration_has_every_key_and_no_wrong_one(command, tmp_path: Path) -> None:
    done = shown(command, tmp_path, "optimizer=sgd", "--cfg", "job")
    assert done.returncode == 0, done.stderr
    values = yaml.safe_load(done.stdout)
    assert values["optimizer"].keys() == {"_target_", "lr", "weight_decay", "momentum", "nesterov"}
    assert values.keys() == {key_of(name, field) for name, field in TrainConfig.model_fields.items()}
    wrong = shown(command, tmp_path, "optimizer.lrr=1", "--cfg", "job")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert "did you mean 'optimizer.lr'" in wrong.stderr
    assert shown(command, tmp_path, "data=csv", "--cfg", "job").returncode == 0  # data.train is still missing


def completions(line: str) -> list[str]:
    environment = {
        **os.environ,
        "COMP_LINE": f"python train.py {line}",
        "COMP_POINT": str(len(f"python train.py {line}")),
    }
    query = [sys.executable, str(REPOSITORY / "train.py"), "-sc", "query=bash"]
    return subprocess.run(query, env=environment, capture_output=True, text=True, check=True).stdout.split()


def test_the_shell_completes_keys_of_the_schema_and_options() -> None:
    assert "optimizer.momentum=" in completions("optimizer=sgd optimizer.")
    assert {"model=vit_b32", "model=rn50"} <= set(completions("model="))


def test_a_runs_configuration_is_given_as_a_file(command, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(to_yaml(train_config("optimizer=lion", "seed=7", "max_steps=3")))
    done = shown(command, tmp_path, "--config-dir", str(tmp_path), "--config-name", "config", "seed=8", "--cfg", "job")
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load(done.stdout) == {**plain(train_config("optimizer=lion", "max_steps=3")), "seed": 8}
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


# --------------------------------------------------------------------------------------------- the user's own folder


def write(folder: Path, **files: str) -> Path:
    """Write options, by `group__option`, into a folder."""
    for name, text in files.items():
        path = folder / f"{name.replace('__', '/')}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that CLIP_EXP_CONFIG_DIR names."""
    (tmp_path / "mine").mkdir()
    monkeypatch.setenv(registry.FOLDERS, str(tmp_path / "mine"))
    return tmp_path / "mine"


def test_the_groups_of_recipes_are_those_whose_options_in_conf_begin_with_the_header() -> None:
    with_header = {path.parent for path in conf_dir().rglob("*.yaml") if path.read_text().startswith(GLOBAL_HEADER)}
    assert {path.name for path in with_header} == set(GLOBAL_GROUPS)
    for group in GLOBAL_GROUPS:
        assert all(path.read_text().startswith(f"{GLOBAL_HEADER}\n") for path in (conf_dir() / group).glob("*.yaml"))


@pytest.mark.parametrize("group", GLOBAL_GROUPS)
@pytest.mark.parametrize(
    "text",
    [
        "name: mine\noptimizer:\n  lr: 3.0e-4\n",
        "defaults:\n  - override /optimizer: sgd\n",
        "# My recipe\n# @package _global_\nname: mine\n",
        "# @package _group_\nname: mine\n",
        "",
    ],
)
def test_a_recipe_without_its_first_line_is_refused_in_one_sentence_with_its_file(
    own: Path, group: str, text: str
) -> None:
    write(own, **{f"{group}__mine": text})
    with pytest.raises(ConfigError) as caught:
        train_config(f"{group}=mine", "max_steps=2")
    assert str(caught.value) == (
        f'{own}/{group}/mine.yaml needs "# @package _global_" as its first line: without it, all of its keys are placed under '
        f"{group}."
    )


def test_a_recipe_sets_keys_of_all_groups_or_those_of_the_package_that_it_names(own: Path) -> None:
    write(own, experiment__mine="# @package _global_\ndefaults:\n  - override /optimizer: sgd\nname: mine\n")
    write(own, experiment__lr="# @package optimizer\nlr: 0.25\n")
    assert (config := train_config("experiment=mine")).name == "mine"
    assert config.optimizer.target == "torch.optim.SGD"
    assert train_config("experiment=lr").optimizer.arguments["lr"] == 0.25


def test_a_recipe_that_selects_an_option_without_a_slash_is_told_how_to_write_it(own: Path) -> None:
    write(own, experiment__mine="# @package _global_\ndefaults:\n  - optimizer: sgd\n")
    with pytest.raises(
        ConfigError, match=r"without a leading slash\. Write '- override /optimizer: sgd' in its defaults\."
    ):
        train_config("experiment=mine")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("lr: [", "cannot be read: while parsing"),
        ("# @package optimizer mine\nlr: 1\n", "cannot be read: Too many components"),
        ("defaults:\n  - {a: b, c: d}\n", "cannot be read: In optimizer/mine: Too many keys"),
        ("- lr\n", "is not a mapping: write a line key: value for every key"),
    ],
)
def test_a_malformed_option_is_refused_with_its_file(own: Path, text: str, problem: str) -> None:
    write(own, optimizer__mine=text)
    with pytest.raises(ConfigError) as caught:
        train_config("optimizer=mine")
    assert str(caught.value).startswith(f"{own}/optimizer/mine.yaml {problem}")
    assert "\n" not in str(caught.value)


def test_an_option_of_conf_takes_precedence_over_the_users(own: Path) -> None:
    write(own, optimizer__sgd="_target_: torch.optim.SGD\nlr: 0.7\n")
    assert train_config("optimizer=sgd").optimizer == train_config("optimizer._target_=torch.optim.SGD").optimizer


def test_a_folder_of_the_environment_that_does_not_exist_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(registry.FOLDERS, "/absent")
    with pytest.raises(
        ConfigError, match=r"^CLIP_EXP_CONFIG_DIR: /absent is not a folder\. Give an existing folder\.$"
    ):
        train_config()


OWN_OPTIONS = {
    "model__mine": "defaults:\n  - vit_nano\nname: mine\n",
    "model__image__mine": "kind: vit\nwidth: 128\n",
    "data__mine": "defaults:\n  - shapes\n",
    "data__augmentation__mine": "scale: [0.5, 1.0]\n",
    "loss__mine": "name: sigmoid\n",
    "optimizer__mine": "_target_: torch.optim.SGD\nlr: 0.7\n",
    "scheduler__mine": "warmup_steps: 3\n",
    "strategy__mine": "name: ddp\n",
    "trainer__mine": "gradient_clip_val: 0.5\n",
    "finetune__mine": "freeze_towers_steps: 2\n",
    "callbacks__mine": "ema_decay: 0.5\n",
    "logger__mine": "tensorboard: true\n",
    "task__mine": "mine:\n  kind: retrieval\n  table: x.csv\n",
    "debug__mine": "# @package _global_\nseed: 5\n",
    "experiment__mine": "# @package _global_\ndefaults:\n  - override /optimizer: mine\nname: recipe\n",
}


@pytest.mark.parametrize("form", ["file://{}", "{}", "pkg://own_package.conf"])
def test_options_of_every_group_are_found_in_the_search_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    monkeypatch.setenv(registry.FOLDERS, "")
    monkeypatch.syspath_prepend(tmp_path)
    folder = write(tmp_path / "own_package" / "conf", **OWN_OPTIONS)
    for package in (folder, folder.parent):
        (package / "__init__.py").touch()
    groups = [name.rpartition("__")[0].replace("__", "/") for name in OWN_OPTIONS]
    assert {*groups} >= {path.name for path in conf_dir().iterdir() if path.is_dir() and path.name != "export"}
    searched = f"hydra.searchpath=[{form.format(folder)}]"
    every = [f"{group}=mine" for group in groups if group not in ("experiment", "model/image")]
    config = compose_config(searched, *every)
    assert (config.model.name, config.data.name) == ("mine", "shapes")
    assert (config.optimizer.lr, config.trainer.gradient_clip_val, config.seed) == (0.7, 0.5, 5)
    assert (config.callbacks.ema_decay, config.task.mine.kind, config.strategy.name) == (0.5, "retrieval", "ddp")
    assert train_config(searched, "experiment=mine").optimizer.arguments["lr"] == 0.7
    assert compose_config(searched, "model/image=mine").model.image.width == 128


def test_every_entry_of_the_search_path_that_cannot_be_used_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_package").mkdir()
    (tmp_path / "broken_package" / "__init__.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(tmp_path)
    given = "file:///absent,missing,pkg://absent.conf,pkg://broken_package,s3://bucket"
    with pytest.raises(ConfigError) as caught:
        train_config(f"hydra.searchpath=[{given}]")
    assert [line.partition(". ")[0] for line in str(caught.value).splitlines()] == [
        "hydra.searchpath: file:///absent is not a folder",
        "hydra.searchpath: missing is not a folder",
        "hydra.searchpath: pkg://absent.conf is not found",
        "hydra.searchpath: pkg://broken_package cannot be imported (ZeroDivisionError: division by zero)",
        "hydra.searchpath: s3://bucket is not supported",
    ]
    with pytest.raises(ConfigError, match=r"must be a list: write hydra\.searchpath=\[mine\]\."):
        train_config("hydra.searchpath=mine")


def test_a_primary_file_names_a_search_path_but_a_run_folder_imports_no_package(command, tmp_path: Path) -> None:
    write(tmp_path / "more", optimizer__mine="_target_: torch.optim.SGD\nlr: 0.7\n")
    (tmp_path / "evil").mkdir()
    (tmp_path / "evil" / "__init__.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    text = "defaults: [train, override optimizer: mine, _self_]\nhydra:\n  searchpath: [{}]\n"

    def shows(folder: str, searched: str) -> subprocess.CompletedProcess[str]:
        write(tmp_path / folder, primary=text.format(searched))
        arguments = ("--config-dir", folder, "--config-name", "primary", "--cfg", "job")
        return command("train.py", *arguments, cwd=tmp_path, PYTHONPATH=str(tmp_path))

    found = shows("mine", "file://more")
    assert found.returncode == 0, found.stderr
    assert yaml.safe_load(found.stdout)["optimizer"]["lr"] == 0.7
    absent = shows("mine", "file://absent")
    assert (absent.returncode, absent.stderr) == (
        2,
        "error: hydra.searchpath: file://absent is not a folder. Give an existing folder.\n",
    )
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    refused = shows("run", "pkg://evil")
    assert refused.returncode == 2
    assert "run/primary.yaml: hydra.searchpath has pkg://evil, which is not imported, since" in refused.stderr
    assert not (tmp_path / "ran").exists()


def test_help_lists_the_options_of_own_folders_and_how_to_name_them(command, tmp_path: Path) -> None:
    write(tmp_path / "one", optimizer__first="lr: 1\n")
    write(tmp_path / "two", optimizer__second="lr: 1\n")
    done = shown(command, tmp_path, "--config-dir", "one", "hydra.searchpath=[two]", "--help")
    assert done.returncode == 0, done.stderr
    assert "optimizer: adam, adamw, custom, first, lion, second, sgd\n" in done.stdout
    end = done.stdout.splitlines()[-5:]
    line = next(line for line in end if line.startswith("--config-dir DIR adds options"))
    assert "hydra.searchpath=[" in line
    assert any("_target_=module.Class" in line for line in end)


# -------------------------------------------------------------------------------------------------- files and types


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        (
            "optimizer=sgd",
            "scheduler=constant",
            "loss=sigmoid",
            "strategy=deepspeed_stage_2",
            "logger=[wandb,tensorboard]",
        ),
        (
            "data=csv",
            "data.train=[{path: a.csv, weight: 2}, {path: [b.tar,c.tar], weight: 1, image_root: null}]",
            "finetune=lora",
        ),
        ("task=[imagenet,knn]", "task.imagenet.root=x", "task.knn.root=a", "task.knn.train.root=b", "callbacks=ema"),
        ("+callbacks.extra.early={_target_: pytorch_lightning.callbacks.Timer, duration: {hours: 3}}",),
    ],
)
def test_a_configuration_is_the_same_after_its_yaml(overrides: tuple[str, ...], tmp_path: Path) -> None:
    config = train_config(*overrides)
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    again = read_run_config(tmp_path)
    assert again == config
    assert to_yaml(again) == to_yaml(config)


def test_a_run_of_another_version_is_refused_with_what_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(to_yaml(train_config()) + "accumulate: 2\n")
    with pytest.raises(ConfigError, match="was written by another version, or edited") as caught:
        read_run_config(tmp_path)
    assert "accumulate does not exist" in str(caught.value)


@pytest.mark.parametrize("command", SCHEMAS)
def test_a_command_has_the_defaults_of_its_schema(command: str) -> None:
    needed = {"check-data": ["data.train=x.csv"], "make-shards": ["data.train=x.csv"]}.get(command, [])
    composed = plain(compose(command, needed))
    for name, field in SCHEMAS[command].model_fields.items():
        if not members(field.annotation) and not field.is_required() and name not in ("task", "epochs"):
            assert composed[key_of(name, field)] == plain(default_of(field)), name


# Groups whose options replace what other options have set, so that a default may have to be written in them.
REPLACING = ("model/image", "model/text", "data/augmentation", "experiment", "debug")
NODES = {
    "loss": "loss", "optimizer": "optimizer", "scheduler": "scheduler", "strategy": "strategy", "callbacks": "callbacks",
    "logger": "logger", "finetune": "finetune", "data": "data", "model": "model", "task": "task",
}  # fmt: skip


def defaults_in(model: type[Config], values: dict, at: str) -> list[str]:
    """Return the keys of a file that repeat defaults of the schema."""
    found = []
    for name, field in model.model_fields.items():
        key = key_of(name, field)
        if key not in values:
            continue
        models = members(field.annotation)
        node = chosen(models, values[key]) if models and isinstance(values[key], dict) else None
        if node is not None:
            found += defaults_in(node, values[key], f"{at}{key}.")
        elif values[key] == plain(default_of(field)) and key not in ("name", "kind", "_target_"):
            found.append(f"{at}{key}")
    return found


@pytest.mark.parametrize(("group", "option"), [(group, option) for group in NODES for option in options(group)])
def test_no_option_repeats_a_default_of_the_schema(group: str, option: str) -> None:
    values = yaml.safe_load((conf_dir() / group / f"{option}.yaml").read_text()) or {}
    field = TrainConfig.model_fields[NODES[group]]
    if group == "task":
        from clip_exp.config.evaluation import TaskConfig

        kinds = members(TaskConfig)
        assert [
            key for name, task in values.items() for key in defaults_in(chosen(kinds, task), task, f"{name}.")
        ] == []
        return
    model = chosen(members(field.annotation), values)
    assert model is not None
    assert defaults_in(model, values, f"{group}.") == []


def test_no_command_file_repeats_a_default_of_the_schema() -> None:
    for command, schema in SCHEMAS.items():
        values = yaml.safe_load((conf_dir() / f"{config_name(command)}.yaml").read_text())
        del values["defaults"]
        assert defaults_in(schema, values, "") == [], command
        assert values.keys() <= {"name"}, command


def annotations(model: type[Config]) -> dict[str, str]:
    return {name: str(field.annotation) for name, field in model.model_fields.items()}


def test_no_field_is_any() -> None:
    models = nested_models(*SCHEMAS.values())
    loose = {
        f"{model.__name__}.{name}" for model in models for name, text in annotations(model).items() if "Any" in text
    }
    assert loose == set()


def test_every_key_has_a_meaning() -> None:
    models = nested_models(*SCHEMAS.values())
    without = {
        f"{model.__name__}.{name}"
        for model in models
        for name, field in model.model_fields.items()
        if not field.description and not members(field.annotation) and name not in ("kind", "name", "target")
    }
    assert without == set()


def test_completing_is_done_once() -> None:
    values = complete(
        TrainConfig,
        {"optimizer": {"_target_": "torch.optim.SGD"}, "loss": {"name": "softmax"}, "strategy": {"name": "ddp"}},
    )
    assert complete(TrainConfig, plain(values)) == values
    assert values["name"] == values["model"]["embed_dim"] == MISSING
    assert compose_config().keys() == values.keys()
