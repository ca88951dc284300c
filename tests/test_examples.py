"""Tests that the examples are short and work."""

import ast
import io
import json
import os
import shutil
import subprocess
import sys
import tokenize
from collections.abc import Callable
from pathlib import Path

import pytest

import clip_exp
from tests.conftest import REPOSITORY
from tests.small_runs import nano, run_dir, write_image

__all__ = ["nano", "run_dir"]
EXAMPLES = sorted((REPOSITORY / "examples").glob("*.py"))


def lines_of_code(source: str) -> int:
    """Return the number of lines without docstrings and comments."""
    docstring = ast.parse(source).body[0]
    skipped = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    lines = {line for t in tokens if t.type not in skipped for line in range(t.start[0], t.end[0] + 1)}
    return len(lines - set(range(docstring.lineno, (docstring.end_lineno or 0) + 1)))


def test_there_is_an_example_for_each_use() -> None:
    assert [path.stem for path in EXAMPLES] == ["classify", "rank", "search", "train"]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_has_at_most_ten_lines_and_begins_with_its_command(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert lines_of_code(source) <= 10
    docstring = ast.get_docstring(ast.parse(source)) or ""
    assert f"python examples/{path.name} " in docstring


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for number in range(3):
        write_image(tmp_path / "photos" / f"{number}.png", number)
    return tmp_path / "photos"


def test_classify_names_the_most_probable_text(command: Callable, run_dir: Path, photos: Path, tmp_path: Path) -> None:
    done = command("examples/classify.py", str(run_dir), "photos/0.png", "photos/1.png", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    labels = ["a diagram", "a dog", "a cat"]
    probabilities = clip_exp.load(run_dir, accelerator="cpu").classify([photos / "0.png", photos / "1.png"], labels)
    assert done.stdout == "".join(
        f"photos/{number}.png: {labels[row.argmax()]} ({row.max():.1%})\n" for number, row in enumerate(probabilities)
    )


def test_rank_and_search_find_the_same_images(command: Callable, run_dir: Path, photos: Path, tmp_path: Path) -> None:
    ranked = command("examples/rank.py", str(run_dir), "two dogs", "photos", cwd=tmp_path)
    searched = command("examples/search.py", str(run_dir), "photos", "two dogs", "a car", cwd=tmp_path)
    assert ranked.returncode == 0, ranked.stderr
    assert searched.returncode == 0, searched.stderr
    expected = clip_exp.load(run_dir, accelerator="cpu").rank("two dogs", photos)
    names = [Path(match.path).name for match in expected]
    assert [Path(line.split()[-1]).name for line in ranked.stdout.splitlines()] == names
    lines = searched.stdout.splitlines()
    assert [Path(line.split()[-1]).name for line in lines if line.startswith("two dogs")] == names
    assert len(lines) == 6
    assert (tmp_path / "photos.index").is_file()


def test_train_leaves_a_run_that_the_others_use(command: Callable, single, tmp_path: Path) -> None:
    scenes = next((single.folder.parents[2] / "data").glob("shapes-*"))
    shutil.copytree(scenes, tmp_path / "data")
    done = command(
        "examples/train.py", "data/train.csv", "max_steps=2", "global_batch_size=8", "data.num_workers=0",
        "trainer.accelerator=cpu", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    run = Path(done.stdout.splitlines()[-1].removeprefix("trained: "))
    assert clip_exp.load(tmp_path / run, accelerator="cpu").encode_text("a dog").shape == (1, 192)


NOTEBOOK = REPOSITORY / "examples" / "notebook.ipynb"


def test_the_notebook_has_the_form_of_nbformat_4_and_no_outputs() -> None:
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    cells = notebook["cells"]
    assert len({cell["id"] for cell in cells}) == len(cells)
    for cell in cells:
        more = {"execution_count", "outputs"} if cell["cell_type"] == "code" else set()
        assert cell.keys() == {"cell_type", "id", "metadata", "source", *more}
        assert "".join(cell["source"]).strip() == "".join(cell["source"])
        assert not cell.get("outputs")


def test_the_notebook_trains_plots_evaluates_and_classifies(tmp_path: Path) -> None:
    """Execute the code cells in one namespace of a process, as a kernel does."""
    code = (
        "import json, sys\n"
        "cells = json.load(open(sys.argv[1], encoding='utf-8'))['cells']\n"
        "for cell in (cell for cell in cells if cell['cell_type'] == 'code'):\n"
        "    exec(compile(''.join(cell['source']), cell['id'], 'exec'), globals())\n"
        "from matplotlib import pyplot\n"
        "assert len(pyplot.get_fignums()) == 1, pyplot.get_fignums()\n"
        "assert abs(sum(probabilities[0].tolist()) - 1) < 1e-5\n"
        "assert losses['train/loss'].iloc[-1] < losses['train/loss'].iloc[0]\n"
        "print('run folders', run, mine)\n"
    )
    environment = {**os.environ, "MPLBACKEND": "svg", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", code, str(NOTEBOOK)], capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()[-1].split()[-2:]
    assert first != second
