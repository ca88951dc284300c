"""Tests that the commands in the README and docs/ work."""

import ast
import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from clip_exp.cli import COMMANDS as CLI_COMMANDS
from clip_exp.config.base import typed_keys, unused_keys
from clip_exp.config.command_line import read
from clip_exp.config.compose import compose
from clip_exp.config.evaluation import EvaluateConfig
from clip_exp.config.help import split_topics
from tests.conftest import REPOSITORY

PAGES = [*sorted(REPOSITORY.glob("*.md")), *sorted((REPOSITORY / "docs").rglob("*.md"))]
RECIPES = sorted((REPOSITORY / "conf" / "experiment").glob("*.yaml"))
FLAGS = {"-m", "--help", "--cfg", "job", "…"}


def commands_of(path: Path) -> list[str]:
    """Return the commands in a page's code blocks, or in a recipe's header."""
    text = path.read_text(encoding="utf-8")
    blocks = (
        re.findall(r"```\w*\n(.*?)```", text, re.DOTALL)
        if path.suffix == ".md"
        else [re.sub(r"^# ?", "", text, flags=re.MULTILINE)]
    )
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    names = "|".join(CLI_COMMANDS)
    return [line.strip() for line in lines if re.match(rf"\s*(python (train|evaluate)\.py|clip-exp ({names})) ", line)]


COMMANDS = [
    (path.name, command)
    for path in (*PAGES, *RECIPES)
    for command in commands_of(path)
    if "--config-dir" not in command  # tests/test_custom.py
]


@pytest.mark.parametrize(("page", "command"), COMMANDS)
def test_every_documented_command_composes(page: str, command: str) -> None:
    words = [word for word in split_topics(shlex.split(command, comments=True)[2:])[1] if word not in FLAGS]
    name = command.split()[1].removesuffix(".py")
    # A sweep's choices are one value here: the first.
    sweeping = "-m" in command.split()
    given = [re.sub(r"^([^=]+=[^,\[]+),.*$", r"\1", word) if sweeping else word for word in words]
    overrides = read(name, given)
    assert unused_keys(compose(name, overrides), typed_keys(overrides)) == []


def test_the_pages_that_the_readme_links_exist() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links {target}"


def test_the_headings_that_pages_link_exist() -> None:
    def anchors(page: Path) -> set[str]:
        titles = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
        return {re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-") for title in titles}

    links = [
        (page, page.parent / target if target else page, anchor)
        for page in PAGES
        for target, anchor in re.findall(r"\]\(((?!https?:)[^)#\s]*)#([^)]+)\)", page.read_text(encoding="utf-8"))
    ]
    assert links
    assert [(page.name, anchor) for page, target, anchor in links if anchor not in anchors(target)] == []


NO_BEGINNING = {"what", "whether", "how", "of", "where", "which", "when", "who", "that", "for", "by", "in", "likewise"}


def test_docstrings_begin_with_a_verb_or_a_noun() -> None:
    """Functions: ruff's D401 asks for the imperative; what it does not know is here. Classes and modules begin with a noun."""
    wrong = []
    for path in sorted((REPOSITORY / "clip_exp").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (text := ast.get_docstring(node)):
                first = text.split()[0]
                odd = not first[:1].isalpha() if isinstance(node, ast.FunctionDef) else False
                if odd or first.lower().strip(",.:'") in NO_BEGINNING:
                    wrong.append(f"{path.relative_to(REPOSITORY)}:{getattr(node, 'lineno', 1)}: {text.splitlines()[0]}")
    assert wrong == []


def test_the_readme_names_every_option_of_the_groups_it_lists() -> None:
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    for group in ("model", "data", "loss", "optimizer", "scheduler", "strategy", "logger"):
        for path in (REPOSITORY / "conf" / group).glob("*.yaml"):
            assert f"`{path.stem}`" in text, f"{group}={path.stem}"


def test_every_task_has_a_page_and_is_named_where_tasks_are_listed() -> None:
    """The page of a task starts with `task=…`; a task without its own page has a section that does."""
    tasks = {path.stem for path in (REPOSITORY / "conf" / "task").glob("*.yaml")}
    pages = [page.read_text(encoding="utf-8") for page in (REPOSITORY / "docs" / "tasks").glob("*.md")]
    titled = [task for page in pages for task in re.findall(r"^##? `task=(\w+)`", page, re.MULTILINE)]
    assert sorted(titled) == sorted(tasks)
    for list_of_tasks in ("README.md", "docs/evaluation.md"):
        text = (REPOSITORY / list_of_tasks).read_text(encoding="utf-8")
        assert not [task for task in tasks if f"`{task}`" not in text], list_of_tasks


def test_the_page_of_evaluation_names_every_setting() -> None:
    text = (REPOSITORY / "docs" / "evaluation.md").read_text(encoding="utf-8")
    assert not [name for name in EvaluateConfig.model_fields if f"`{name}`" not in text]


def test_make_help_lists_the_targets() -> None:
    listed = subprocess.run(["make", "help"], cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    assert {line.split()[0] for line in listed.splitlines()} >= {"install", "train", "test", "test-all", "lint", "help"}


def test_the_way_from_a_csv_to_a_scored_model(command, single, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command of the README runs on generated scenes instead of photographs, and for a few steps only."""
    scenes = next((single.folder.parents[2] / "data").glob("shapes-*"))
    for split, table in (("train", "pairs.csv"), ("val", "held_out.csv")):
        shutil.copytree(scenes / split, tmp_path / split)
        shutil.copy(scenes / f"{split}.csv", tmp_path / table)
    shutil.copytree(scenes / "val", tmp_path / "flowers" / "test" / "rose")
    shutil.copytree(scenes / "val", tmp_path / "imagenet" / "val" / "n01440764")
    train, evaluate = (
        next(c for c in commands_of(REPOSITORY / "README.md") if c.startswith(start))
        for start in (
            "python train.py model=vit_tiny data=csv",
            "python evaluate.py run=outputs/train/vit_tiny_csv/<time> 'task=",
        )
    )
    shortened = ["epochs=null", "max_steps=2", "global_batch_size=16", "data.num_workers=0"]
    trained = command(
        "train.py", *(w for w in shlex.split(train)[2:] if "epochs" not in w), *shortened[1:], cwd=tmp_path
    )
    assert trained.returncode == 0, trained.stdout + trained.stderr
    run = next((tmp_path / "outputs" / "train" / "vit_tiny_csv").iterdir())
    words = [word.replace("<time>", run.name) for word in shlex.split(evaluate)[2:]]
    scored = command("evaluate.py", *words, "task.imagenet.templates=['a {}.']", "num_workers=0", cwd=tmp_path)
    assert scored.returncode == 0, scored.stdout + scored.stderr
    results = {path.stem: json.loads(path.read_text())["metrics"] for path in (run / "eval").glob("*.json")}
    assert results.keys() == {"retrieval", "image_folder", "imagenet"}
    assert results["image_folder"]["top1"] == 1.0
    assert 0 <= results["imagenet"]["top5"] <= 1
    snippet = re.search(r"```python\n(.*?)```", (REPOSITORY / "README.md").read_text(), re.DOTALL)
    assert snippet is not None
    shutil.copy(tmp_path / "val" / "000000.png", tmp_path / "image.jpg")
    shutil.copy(tmp_path / "val" / "000001.png", tmp_path / "a.jpg")
    shutil.copy(tmp_path / "val" / "000002.png", tmp_path / "b.jpg")
    script = tmp_path / "snippet.py"
    script.write_text(
        snippet.group(1).replace("<time>", run.name) + '\nassert clip.classify("a.jpg", ["x", "y"]).shape == (1, 2)\n'
    )
    used = command(str(script), cwd=tmp_path)
    assert used.returncode == 0, used.stderr


PROOFS = [
    (page.name, *proof)
    for page in PAGES
    for proof in re.findall(r"`pytest ((?:tests/\S+\.py ?)+)(?:-k \"?([\w ]+?)\"?)?`", page.read_text(encoding="utf-8"))
]


@pytest.mark.parametrize(("page", "paths", "words"), PROOFS)
def test_the_test_that_proves_a_promise_exists(page: str, paths: str, words: str) -> None:
    texts = [(REPOSITORY / path).read_text(encoding="utf-8") for path in paths.split()]
    names = [name for text in texts for name in re.findall(r"^def (test_\w+)", text, re.MULTILINE)]
    assert any(word in name for word in words.split(" or ") for name in names), page
