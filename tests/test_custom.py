"""Tests of the user's own configuration folder: the recipe of `docs/configuration.md`, and the loss and task of `docs/extending.md`.

The folder is named by `--config-dir`, `hydra.searchpath`, or `config_dir` of the Python API.
"""

import ast
import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import clip_exp
from clip_exp.config import registry
from clip_exp.config.base import Member
from clip_exp.config.evaluation import TaskConfig
from clip_exp.config.files import read_run_config
from clip_exp.config.training import LossConfig
from clip_exp.errors import ConfigError
from tests.conftest import REPOSITORY
from tests.runs import TINY, Finished, Train, run_folders

PACKAGE = Path(registry.__file__).parents[1]
PAGES = "\n".join(
    (REPOSITORY / "docs" / name).read_text(encoding="utf-8") for name in ("configuration.md", "extending.md")
)
BLOCK = re.compile(r"```(?:python|yaml)\n((?:# @package _global_\n)?)# mine/(\S+)\n(.*?)```", re.DOTALL)


def test_no_other_module_names_a_kind_of_loss_or_task() -> None:
    bases = (LossConfig, TaskConfig)
    classes = {model.__name__: model for base in bases for model in base.members()}
    names = {model.model_fields[base.key].default for base in bases for model in base.members()} - {"auto", "custom"}
    assert names >= {"softmax", "sigmoid", "zero_shot", "retrieval", "linear_probe", "knn", "robustness"}
    packages = tuple(model.__module__ for model in classes.values())
    found = []
    for file in PACKAGE.rglob("*.py"):
        at = f"clip_exp.{'.'.join(file.relative_to(PACKAGE).with_suffix('').parts)}"
        if not at.startswith(packages):
            nodes = ast.walk(ast.parse(file.read_text(encoding="utf-8")))
            found += [
                f"{at}: {ast.unparse(node)}"
                for node in nodes
                if (isinstance(node, ast.ImportFrom) and str(node.module).startswith(packages))
                or (isinstance(node, ast.Name) and node.id in classes)
                or (isinstance(node, ast.Constant) and node.value in names)
            ]
    assert found == []


@pytest.fixture(scope="module")
def mine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create the folder with the files from the documentation."""
    folder = tmp_path_factory.mktemp("custom") / "mine"
    for header, name, text in BLOCK.findall(PAGES):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(header + text)
    assert sorted(str(path.relative_to(folder)) for path in folder.rglob("*.*")) == [
        "experiment/slow_digits.yaml", "loss/smooth.yaml", "loss/smoothed.py", "loss/smoothed.yaml", "optimizer/slow.yaml",
        "task/hits.py", "task/hits.yaml",
    ]  # fmt: skip
    return folder


@pytest.fixture
def forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unregister custom members after a command in this process."""
    monkeypatch.setitem(os.environ, registry.FOLDERS, "")
    registry._load_file.cache_clear()
    for base in (LossConfig, TaskConfig):
        assert issubclass(base, Member)
        base.members()
        monkeypatch.setattr(base, "registered", {**base.registered})


@pytest.fixture(scope="module")
def runs(mine: Path, train: Train, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Finished]:
    """Train runs with the custom loss and task, by the number of processes."""
    custom = ("--config-dir", str(mine), *TINY, "loss=smoothed", "loss.smoothing=0.2", "max_steps=3")
    task = (
        "task=hits",
        "+task.hits.generate={kind: digits, rows: 40, val_rows: 30}",
        "monitor=hits/hits",
        "task_every_n_steps=3",
    )
    return {
        devices: train(*custom, *task, f"trainer.devices={devices}", output_dir=tmp_path_factory.mktemp("runs"))
        for devices in (1, 2)
    }


def test_a_users_loss_trains_on_one_process_and_on_two_alike(runs: dict[int, Finished]) -> None:
    assert "name: smoothed" in (runs[1].folder / "config.yaml").read_text()
    assert len(runs[1].losses) > 0
    assert runs[2].losses == pytest.approx(runs[1].losses, rel=1e-4)
    assert runs[2].summary["metrics"]["hits/hits"] == runs[1].summary["metrics"]["hits/hits"]


def test_a_users_task_scores_a_run_and_leaves_numbers_and_a_page(
    runs: dict[int, Finished], mine: Path, command: Callable, tmp_path: Path
) -> None:
    found = {}
    for devices in (1, 2):
        done = command(
            "evaluate.py", "--config-dir", str(mine), f"run={runs[1].folder}", "task=hits", "task.hits.top_k=10",
            "+task.hits.generate={kind: digits, rows: 40, val_rows: 30}", "num_workers=0", "accelerator=cpu",
            f"devices={devices}", f"output_dir={tmp_path / str(devices)}", cwd=tmp_path,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert "hits/hits" in done.stdout
        (folder,) = (tmp_path / str(devices)).glob("evaluate/*/*/eval")
        found[devices] = json.loads((folder / "hits.json").read_text())
        page = (folder / "hits.html").read_text()
        assert "100.0" in page
    assert found[1]["metrics"] == found[2]["metrics"] == {"hits": 1.0}, "each of ten classes is among the best ten"
    assert found[1]["protocol"]["kind"] == "hits"
    assert (found[1]["protocol"]["images"], found[1]["protocol"]["top_k"]) == (30, 10)


@pytest.mark.usefixtures("forgotten")
@pytest.mark.parametrize(
    ("script", "overrides", "message"),
    [
        ("train.py", ("loss=smoothed", "loss.smothing=0.2"), "loss.smothing does not exist: did you mean 'loss.smoothing'?"),
        ("train.py", ("loss=smoothed", "loss.smoothing=2"), "loss.smoothing=2"),
        ("train.py", ("task=hits", "task.hits.tpo_k=2"), "task.hits.tpo_k does not exist: did you mean 'task.hits.top_k'?"),
        ("evaluate.py", ("run=x", "task=hits", "task.hits.tpo_k=2"), "task.hits.tpo_k does not exist: did you mean 'task.hits.top_k'?"),
        ("train.py", ("loss=smothed",), "smothed"),
    ],
)  # fmt: skip
def test_wrong_keys_of_a_users_loss_and_task_are_refused_by_their_full_names(
    mine: Path, refused: Callable, tmp_path: Path, script: str, overrides: tuple[str, ...], message: str
) -> None:
    done = refused(script, "--config-dir", str(mine), *overrides, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert not run_folders(tmp_path / "outputs")


def test_a_typo_is_reported_without_importing_torch(mine: Path, command: Callable, tmp_path: Path) -> None:
    script = tmp_path / "probe.py"
    script.write_text(
        "import sys\nfrom clip_exp.cli import run\n"
        f"assert run('train', ['--config-dir', {str(mine)!r}, 'loss=smoothed', 'task=hits', '--cfg', 'job']) == 0\n"
        "assert 'torch' not in sys.modules, 'torch was imported'\n"
    )
    done = command(str(script), cwd=tmp_path, cold=True, PYTHONPATH=sys.path[0])
    assert done.returncode == 0, done.stderr


# ------------------------------------------------------------------------------------------------- how it is named


def test_the_documented_recipe_trains(mine: Path, command: Callable, tmp_path: Path) -> None:
    typed = re.search(r"^python (train\.py --config-dir mine experiment=.*)$", PAGES, re.MULTILINE)
    assert typed is not None
    shutil.copytree(mine, tmp_path / "mine")
    script, *words = shlex.split(typed[1])
    done = command(script, *words, "data.num_workers=0", "trainer.accelerator=cpu", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (run,) = run_folders(tmp_path / "outputs")
    config = read_run_config(run)
    assert (run.parent.name, config.data.name, config.max_steps) == ("slow_digits", "digits", 20)
    assert (config.optimizer.target, config.optimizer.arguments["lr"]) == ("torch.optim.SGD", 1e-3)


def test_python_files_are_found_in_folders_of_the_search_path_also_by_ranks(
    mine: Path, runs: dict[int, Finished], train: Train, command: Callable, tmp_path: Path
) -> None:
    (tmp_path / "other").mkdir()
    searched = f"hydra.searchpath=[{tmp_path}/other,file://{mine}]"
    words = (*TINY, "loss=smoothed", "loss.smoothing=0.2", "max_steps=3", "trainer.devices=2")
    found = train(searched, *words, output_dir=tmp_path)
    assert found.losses == pytest.approx(runs[2].losses, rel=1e-4)
    (line,) = (line for line in found.output.splitlines() if line.startswith("next:"))
    assert f"hydra.searchpath=[{tmp_path}/other,{mine}]" in shlex.split(line)
    done = command("evaluate.py", *shlex.split(line)[-2:], "task=digits", "num_workers=0", cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.usefixtures("forgotten")
def test_python_files_in_a_run_folder_of_the_search_path_are_not_run(refused: Callable, tmp_path: Path) -> None:
    (tmp_path / "run" / "loss").mkdir(parents=True)
    (tmp_path / "run" / "run.json").write_text("{}")
    (tmp_path / "run" / "loss" / "x.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    (tmp_path / "primary").mkdir()
    (tmp_path / "primary" / "own.yaml").write_text("defaults: [train, _self_]\nhydra:\n  searchpath: [file://run]\n")
    named = refused("train.py", "hydra.searchpath=[run]", "--cfg", "job", cwd=tmp_path)
    assert named.returncode == 2
    assert "run/loss/x.py is not imported, since" in named.stderr
    os.environ[registry.FOLDERS] = ""
    by_file = ("--config-dir", "primary", "--config-name", "own")
    assert refused("train.py", *by_file, "--cfg", "job", cwd=tmp_path).returncode == 0
    assert not (tmp_path / "ran").exists()


OF_HYDRA = {
    "callbacks": "{x: {_target_: canary.Thing}}",
    "job_logging": "{version: 1, formatters: {x: {(): canary.Thing}}, root: {}}",
    "job": "{env_set: {CLIP_EXP_ALLOWED_TARGETS: canary}}",
    "launcher": "{_target_: canary.Thing}",
}


@pytest.mark.usefixtures("forgotten")
@pytest.mark.parametrize("key", OF_HYDRA)
def test_keys_of_hydra_in_a_run_folder_are_refused_without_running_what_they_name(
    key: str, refused: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "canary.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Thing: ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    run = tmp_path / "run"
    (run / "hydra" / "job_logging").mkdir(parents=True)
    (run / "config.yaml").write_text(f"defaults: [train, _self_]\nhydra:\n  {key}: {OF_HYDRA[key]}\n")
    (run / "hydra" / "job_logging" / "own.yaml").write_text(OF_HYDRA["job_logging"])
    (run / "option.yaml").write_text("defaults: [train, override hydra/job_logging: own, _self_]\n")
    for name, named in (("config", f"hydra.{key}"), ("option", "hydra/job_logging/own")):
        done = refused("train.py", "--config-dir", str(run), "--config-name", name, "max_steps=1", cwd=tmp_path)
        assert done.returncode == 2
        assert f"run/{name}.yaml sets {named}, which is not used, since" in done.stderr
    assert not (tmp_path / "ran").exists()


@pytest.mark.usefixtures("forgotten")
def test_the_python_api_accepts_own_folders_for_one_call(
    mine: Path, runs: dict[int, Finished], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(registry.FOLDERS)
    words = (*TINY, "loss=smoothed", "loss.smoothing=0.2", "max_steps=3", f"output_dir={tmp_path}")
    for devices, given in ((1, str(mine)), (2, [mine])):
        run = clip_exp.train(*words, f"trainer.devices={devices}", config_dir=given)
        assert Finished(run, "").losses == pytest.approx(runs[devices].losses, rel=1e-4)
        assert registry.FOLDERS not in os.environ
    hits = ("task=hits", "+task.hits.generate={kind: digits, rows: 40, val_rows: 30}", "task.hits.top_k=10")
    results = clip_exp.evaluate(f"run={run}", *hits, "accelerator=cpu", "num_workers=0", config_dir=mine)
    assert results["hits"]["metrics"] == {"hits": 1.0}
    with pytest.raises(ConfigError, match=r"loss\.name=smoothed .*--config-dir"):
        clip_exp.load(run, accelerator="cpu")
    clip = clip_exp.load(run, accelerator="cpu", config_dir=mine)
    assert registry.FOLDERS not in os.environ
    assert clip.encode_text("a dog").shape == (1, 64)
    searched = f"hydra.searchpath=[{mine}]"
    with pytest.raises(ConfigError, match=r"loss\.smothing does not exist: did you mean 'loss\.smoothing'"):
        clip_exp.train(searched, "loss=smoothed", "loss.smothing=1")
    assert registry.FOLDERS not in os.environ


@pytest.mark.usefixtures("forgotten")
def test_two_calls_may_have_folders_with_members_of_the_same_name(mine: Path, tmp_path: Path) -> None:
    """The loss of the other folder has another key, so each call shows whose class it has."""
    shutil.copytree(mine, tmp_path / "other")
    file = tmp_path / "other" / "loss" / "smoothed.py"
    file.write_text(file.read_text().replace("smoothing:", "softness:"))
    for folder, key, unknown in (
        (mine, "smoothing", "softness"), (tmp_path / "other", "softness", "smoothing"), (mine, "smoothing", "softness"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=rf"^loss\.{unknown} does not exist: valid keys are .*\b{key}\b"):
            clip_exp.train("loss=smoothed", f"loss.{unknown}=0.2", f"loss.{key}=0.2", config_dir=folder)


@pytest.mark.usefixtures("forgotten")
@pytest.mark.parametrize("call", [clip_exp.train, clip_exp.evaluate, clip_exp.load])
def test_an_own_folder_of_the_python_api_must_exist(call: Callable, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^config_dir: .*absent is not a folder\. Give an existing folder\.$"):
        call("model=vit_nano", config_dir=[tmp_path, tmp_path / "absent"])
    assert os.environ[registry.FOLDERS] == ""
