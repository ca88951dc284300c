"""Five kinds of data in one call, with prime numbers of images: the same results on any number of ranks."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from tests.evaluation.cifar import write_cifar10
from tests.exhaustive import repeat_beyond
from tests.small_runs import nano, write_image, write_run

__all__ = ["nano"]

TASKS = ("imagenet", "image_folder", "cifar10", "table", "retrieval")
LONG = "a very " + "long " * 100 + "caption"


def imagenet(root: Path) -> None:
    """Write 7 images of three classes, two of which have the same name."""
    for number, wnid in enumerate(["n03773504", "n04008634", "n01440764"] * 2 + ["n01440764"]):
        write_image(root / wnid / f"{number}.JPEG", number, (50, 41))


def flowers(root: Path) -> None:
    """Write 101 images of five classes, one of which is broken."""
    names = ["daisy", "dandelion", "rose", "sunflower", "tulip"]
    for number in range(101):
        write_image(root / names[number % 5] / f"{number:03d}.png", number)
    (root / "rose" / "052.png").write_bytes(b"not an image")


def tables(root: Path) -> None:
    """Write tables of 13 images with a label, and of 17 with one to three captions, one of them longer than 77 tokens."""
    for number in range(17):
        write_image(root / f"{number}.png", number)
    labels = [f"{number}.png,{('red', 'green')[number % 2]}" for number in range(13)]
    (root / "labels.csv").write_text("\n".join(["filepath,label", *labels]) + "\n")
    captions = [f"{n}.png,caption {j} of number {n}" for n in range(17) for j in range(1 + n % 3)]
    (root / "pairs.csv").write_text("\n".join(["filepath,title", *captions, f"3.png,{LONG}"]) + "\n")


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory, nano) -> list[str]:
    root = tmp_path_factory.mktemp("sets")
    imagenet(root / "imagenet")
    flowers(root / "flowers")
    write_cifar10(root / "cifar", 103)
    tables(root)
    run_dir = write_run(root / "run", nano)
    return [
        f"run={run_dir}", f"task=[{','.join(TASKS)}]", f"task.imagenet.root={root / 'imagenet'}",
        "task.imagenet.templates=['a {}.']", f"task.image_folder.root={root / 'flowers'}",
        "task.image_folder.templates=simple", f"task.cifar10.root={root / 'cifar'}",
        f"task.table.table={root / 'labels.csv'}", f"task.retrieval.table={root / 'pairs.csv'}",
        "accelerator=cpu", "cache_gb=0", "batch_size=10", "num_workers=0", "on_bad_image=skip",
    ]  # fmt: skip


def results(output_dir: Path) -> dict[str, str]:
    """Return the contents of all JSON and CSV files of an evaluation."""
    (folder,) = output_dir.glob("evaluate/*/*")
    found = {path.name: path.read_text() for path in (folder / "eval").iterdir() if path.suffix in (".json", ".csv")}
    assert {f"{task}.json" for task in TASKS} <= found.keys()
    return found


@pytest.fixture(scope="module")
def alone(arguments: list[str], command: Callable, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    output_dir = tmp_path_factory.mktemp("alone")
    done = command("evaluate.py", *arguments, "devices=1", f"output_dir={output_dir}", cwd=output_dir)
    assert done.returncode == 0, done.stderr
    return results(output_dir)


@pytest.mark.parametrize("devices", repeat_beyond((3,), (2, 3)))  # two are also those of the next test
def test_every_rank_count_gives_the_same_files(
    arguments: list[str], alone: dict[str, str], command: Callable, tmp_path: Path, devices: int
) -> None:
    done = command("evaluate.py", *arguments, f"devices={devices}", f"output_dir={tmp_path}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert results(tmp_path) == alone
    assert done.stdout.count("cifar10/top1") == 1
    assert done.stderr.count("retrieval: texts truncated to the context length of the model: 1.") == 1


def test_truncated_texts_are_counted_once_on_any_rank_count_and_from_the_cache(
    arguments: list[str], alone: dict[str, str], command: Callable, tmp_path: Path
) -> None:
    assert json.loads(alone["retrieval.json"])["protocol"]["truncated_texts"] == 1
    only = [argument for argument in arguments if not argument.startswith("cache_gb")]
    for time in ("first", "second"):
        output_dir = tmp_path / time
        output_dir.mkdir()
        (output_dir / "cache").symlink_to(tmp_path / "cache")
        (tmp_path / "cache").mkdir(exist_ok=True)
        done = command("evaluate.py", *only, "devices=2", f"output_dir={output_dir}", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert results(output_dir) == alone


def test_a_bad_image_of_one_rank_ends_all_with_its_message(
    arguments: list[str], command: Callable, tmp_path: Path
) -> None:
    strict = [argument for argument in arguments if not argument.startswith("on_bad_image")]
    done = command("evaluate.py", *strict, "devices=2", f"output_dir={tmp_path}", cwd=tmp_path)
    assert done.returncode == 3, done.stderr
    *_, line = done.stderr.strip().splitlines()
    assert (done.stderr.count("error:"), done.stderr.count("Traceback")) == (1, 0)
    assert line.startswith("error: ")
    assert "052.png" in line
    assert line.endswith("on_bad_image=skip.")
    (record,) = tmp_path.glob("evaluate/*/*/run.json")
    assert (json.loads(record.read_text())["status"], json.loads(record.read_text())["exit_code"]) == ("failed", 3)
    assert sorted(path.name for path in (record.parent / "eval").iterdir()) == [
        "imagenet.csv",
        "imagenet.html",
        "imagenet.json",
    ]


@pytest.mark.exhaustive
def test_torchrun_gives_the_same_files(arguments: list[str], alone: dict[str, str], tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*torchrun, str(REPOSITORY / "evaluate.py"), *arguments, f"output_dir={tmp_path}"], cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert results(tmp_path) == alone
    assert done.stdout.count("cifar10/top1") == 1
