"""docs/contract.md lists the names that scripts may rely on: what it says is what the commands take and write."""

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest

import clip_exp
from clip_exp.cli import COMMANDS
from clip_exp.config.commands import SCHEMAS
from clip_exp.config.evaluation import TaskConfig
from clip_exp.data.bad_samples import HEADER
from tests.conftest import DOOR, REPOSITORY, Run
from tests.keys import leaf_keys
from tests.runs import Finished

PAGE = REPOSITORY / "docs" / "contract.md"
SHARED = {"evaluate", "predict", "rank", "search", "embed", "export"}  # commands that select a model with the same keys


def listed(heading: str) -> set[str]:
    """Return the names in the first code block under a heading of the page."""
    found = re.search(rf"^#+ {re.escape(heading)}\n.*?```\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.M | re.S)
    assert found, f"{PAGE.name} has no section '{heading}'"
    return set(found[1].split())


def keys_of(command: str) -> set[str]:
    return set(leaf_keys(SCHEMAS[command]))


def columns(path: Path) -> set[str]:
    with path.open(encoding="utf-8", newline="") as lines:
        return set(next(csv.reader(lines)))


def fields(values: Any, depth: int, at: str = "") -> set[str]:
    """Return the keys of a JSON object and, with a dot, of the objects in it, also of those in lists."""
    found = set()
    for value in values if isinstance(values, list) else [values]:
        for key, inner in value.items() if isinstance(value, dict) else ():
            found |= {at + key, *(fields(inner, depth - 1, f"{at}{key}.") if depth > 1 else ())}
    return found


def test_commands() -> None:
    assert listed("Commands") == COMMANDS.keys()


def test_python(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").touch()
    names = {name for name in dir(clip_exp.Run(tmp_path)) if not name.startswith("_")}
    assert listed("Python") == {*clip_exp.__all__, *(f"Run.{name}" for name in names)} - {"__version__"}


@pytest.mark.parametrize("command", [command for command in COMMANDS if command not in SHARED])
def test_keys(command: str) -> None:
    assert listed(f"Keys of `{command}`") == keys_of(command)


def test_keys_that_select_a_model() -> None:
    assert listed("Keys that select a model") == set.intersection(*map(keys_of, SHARED))


@pytest.mark.parametrize("command", sorted(SHARED))
def test_other_keys_of_commands_that_select_a_model(command: str) -> None:
    assert listed(f"Keys of `{command}`") == keys_of(command) - set.intersection(*map(keys_of, SHARED))


def test_keys_of_tasks() -> None:
    of_kinds = {
        f"{kind.model_fields['kind'].default}.{key}" for kind in TaskConfig.members() for key in leaf_keys(kind)
    }
    assert listed("Keys of tasks") == of_kinds


def test_what_a_run_leaves(digits: Finished) -> None:
    sometimes = {
        "train/peak_memory_gb",
        "train/skipped_steps",
    }  # on GPUs, and after a step with a gradient that is not finite
    assert listed("`metrics.csv`") - sometimes == columns(digits.folder / "metrics.csv") - sometimes
    assert listed("`summary.json`") == fields(digits.summary, 1)
    of_others = {"pretrained", "error", "exit_code"}  # of a run with start weights, and of a failed one
    assert listed("`run.json`") == fields(digits.record, 1) | of_others
    assert listed("`bad_samples.csv`") == set(HEADER)


@pytest.fixture(scope="module")
def evaluated(command: Run, digits: Finished, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `eval` folder of an evaluation of the digits run."""
    output_dir = tmp_path_factory.mktemp("outputs")
    table = next((digits.folder.parents[2] / "data").glob("digits-*/val.csv"))
    tasks = ("task=[digits,retrieval,digits_knn,digits_linear_probe]", f"task.retrieval.table={table}")
    done = command("evaluate.py", f"run={digits.folder}", *tasks, f"output_dir={output_dir}", cwd=output_dir)
    assert done.returncode == 0, done.stderr
    return next(output_dir.glob("evaluate/*/*/eval"))


@pytest.mark.parametrize("task", ["digits", "retrieval", "digits_knn", "digits_linear_probe"])
def test_what_an_evaluation_leaves(evaluated: Path, task: str) -> None:
    result = json.loads((evaluated / f"{task}.json").read_text(encoding="utf-8"))
    kind = result["protocol"]["kind"]
    assert result.keys() == {"metrics", "protocol"}
    assert listed(f"Metrics of `kind: {kind}`") == result["metrics"].keys()
    assert listed("`protocol` of every task") | listed(f"`protocol` of `kind: {kind}`") == result["protocol"].keys()
    if (evaluated / f"{task}.csv").is_file():
        assert listed("`eval/<task>.csv`") == columns(evaluated / f"{task}.csv")


@pytest.mark.parametrize("name", ["predict", "rank", "search", "models", "check-data"])
def test_what_commands_write(command: Run, digits: Finished, tmp_path: Path, name: str) -> None:
    data = next((digits.folder.parents[2] / "data").glob("digits-*"))
    model = (f"run={digits.folder}", f"images={data / 'val'}", "num_workers=0")
    given = {
        "predict": (*model, "texts=[one,two]"),
        "rank": (*model, "text=one"),
        "search": (*model, "text=one", "index=photos.index"),
        "models": (),
        "check-data": ("data=csv", f"data.train={data / 'val.csv'}", f"data.val={data / 'val.csv'}", "model=vit_nano"),
    }[name]
    written = command(DOOR, name, *given, "format=json", cwd=tmp_path)
    document = json.loads(written.stdout)
    found = {re.sub(r"^splits\.(train|val)", "splits.<split>", field) for field in fields(document, 3)}
    assert listed(f"JSON of `{name}`") == found
    if name != "check-data":
        table = command(DOOR, name, *given, "format=csv", cwd=tmp_path)
        assert listed(f"CSV of `{name}`") == set(next(csv.reader(table.stdout.splitlines())))
