"""Invalid input to an evaluation: a clear message, the right exit code, and no folder of an evaluation."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from clip_exp.config.base import parse
from clip_exp.config.evaluation import EvalOnBadImage, EvaluateConfig
from clip_exp.errors import ClipExpError, ConfigError, DataError
from clip_exp.evaluation.launch import check, evaluate
from tests.evaluation.cifar import write_cifar10
from tests.evaluation.sets.test_torchvision_sets import write_eurosat
from tests.small_runs import write_image


def config(tmp_path: Path, run: Path, **tasks: dict[str, Any]) -> EvaluateConfig:
    task = {name: {"kind": "zero_shot", **values} for name, values in tasks.items()}
    output = str(tmp_path / "outputs")
    values = {"run": str(run), "task": task, "output_dir": output, "accelerator": "cpu", "num_workers": 0}
    return parse(EvaluateConfig, values)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Return a folder with the data of all cases in this file."""
    root = tmp_path / "data"
    for number, name in enumerate(["n01440764", "n01443537", "n99999999"]):
        write_image(root / "unknown_class" / name / "1.JPEG", number)
    for number in range(3):
        write_image(root / "flat" / f"{number}.JPEG", number)
        write_image(root / "pets" / ("cat", "dog", "cow")[number] / f"{number}.png", number)
    write_image(root / "pets" / "dog" / "3.png", 3)
    (root / "empty" / "n01440764").mkdir(parents=True)
    write_image(root / "objectnet-1.0" / "images" / "banana" / "1.png", 0)
    (root / "labels.txt").write_text("0\n1\n")
    (root / "names.txt").write_text("\n")
    (root / "names.json").write_text('["cat"')
    (root / "templates.txt").write_text("a photo of a {}.\nart of the thing\n")
    (root / "table.csv").write_text("filepath,label\nflat/0.JPEG,cat\nflat/1.JPEG,\n")
    return root


WRONG = {
    "unknown class": (3, {"root": "unknown_class", "classes": "imagenet"}, "not classes of ImageNet-1k: 'n99999999'"),
    "no folder": (2, {"root": "absent"}, r"task\.t\.root=.*absent: no such folder"),
    "empty folders": (3, {"root": "empty", "classes": "imagenet"}, "contains no folders with images"),
    "flat": (3, {"root": "flat", "classes": "imagenet"}, r"sort them .* task\.t\.ground_truth=FILE"),
    "short labels": (
        3,
        {"root": "flat", "classes": "imagenet", "ground_truth": "labels.txt"},
        "has 2 labels, .*flat has 3 images",
    ),
    "no labels": (2, {"root": "flat", "ground_truth": "absent.txt"}, r"task\.t\.ground_truth=.*no such file"),
    "names of an empty file": (2, {"root": "pets", "classes": "names.txt"}, "names.txt has no texts"),
    "names of a broken file": (2, {"root": "pets", "classes": "names.json"}, "names.json is not valid JSON"),
    "names for other classes": (2, {"root": "pets", "classes": ["one", "two"]}, "2 names, .*pets has 3 classes"),
    "names that miss a class": (2, {"root": "pets", "classes": {"cat": "Katze"}}, "has no name for 'cow', 'dog'"),
    "template without a place": (2, {"root": "pets", "templates": "templates.txt"}, "'art of the thing' has no {}"),
    "no templates": (2, {"root": "pets", "templates": []}, r"task\.t\.templates has no texts"),
    "unknown set": (2, {"torchvision": "CIFAR-10", "root": "."}, "did you mean 'cifar10'"),
    "set that is not there": (2, {"torchvision": "CIFAR10", "root": "."}, r"task\.t\.download=true"),
    "no source": (2, {}, "exactly one of root, table, generate, torchvision; given: none"),
    "two sources": (2, {"root": "pets", "table": "table.csv"}, "given: root, table"),
    "three sources": (
        2,
        {"root": "pets", "torchvision": "CIFAR10", "generate": {"kind": "digits"}},
        "given: root, generate, torchvision",
    ),
    "a key of another source": (
        2,
        {"root": "pets", "split": "test"},
        r"task\.t\.split=test has no effect without task\.t\.torchvision",
    ),
    "labels for folders": (
        2,
        {"table": "table.csv", "ground_truth": "labels.txt"},
        "ground_truth=.* has no effect without flat images",
    ),
    "unknown part": (2, {"generate": {"kind": "digits"}, "split": "test"}, "split=test must be one of train, val"),
    "table that is a number": (2, {"table": 7}, r"task\.t\.table: The table 7 does not exist"),
    "table that is a mapping": (2, {"table": {"a": 1}}, r"task\.t\.table must be a path, or a list of paths"),
    "no column": (3, {"table": "table.csv", "label_key": "class"}, "class"),
    "objectnet without mappings": (2, {"root": "objectnet-1.0", "classes": "objectnet"}, "mappings are missing"),
}
PATHS = ("root", "table", "classes", "templates", "ground_truth")


@pytest.mark.parametrize("case", WRONG)
def test_invalid_data_give_one_message_with_their_exit_code(
    tmp_path: Path, run_dir: Path, data: Path, case: str
) -> None:
    code, values, message = WRONG[case]
    named = {
        key: str(data / value)
        if key in PATHS and isinstance(value, str) and value not in ("imagenet", "objectnet")
        else value
        for key, value in values.items()
    }
    with pytest.raises(ClipExpError, match=message) as caught:
        evaluate(config(tmp_path, run_dir, t=named))
    assert caught.value.exit_code == code
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "outputs" / "evaluate").exists()
    assert not (run_dir / "eval").exists()


def test_classes_without_images_are_counted_and_can_be_predicted(tmp_path: Path, run_dir: Path, data: Path) -> None:
    (data / "unknown_class" / "n99999999" / "1.JPEG").unlink()
    (data / "unknown_class" / "n99999999").rmdir()
    _, [task] = check(config(tmp_path, run_dir, t={"root": str(data / "unknown_class"), "classes": "imagenet"}))
    assert (len(task.data.class_names), len(task.data.missing), len(task.data.labels)) == (1000, 998, 2)


def test_nothing_is_downloaded_if_there_are_other_errors(tmp_path: Path, run_dir: Path, monkeypatch) -> None:
    fetched = []
    monkeypatch.setattr(
        "torchvision.datasets.eurosat.download_and_extract_archive",
        lambda url, download_root, md5: (fetched.append(url), write_eurosat(Path(download_root).parent)),
    )
    good = {"torchvision": "EuroSAT", "root": str(tmp_path / "sets"), "download": True, "templates": ["a {}."]}
    with pytest.raises(ConfigError, match=r"task\.bad\.root=.*no such folder") as caught:
        evaluate(config(tmp_path, run_dir, good=good, bad={"root": str(tmp_path / "absent")}))
    assert "EuroSAT" not in str(caught.value)
    assert not fetched
    _, tasks = check(config(tmp_path, run_dir, good=good))
    assert (len(fetched), len(tasks[0].data.labels)) == (1, 3)
    check(config(tmp_path, run_dir, good=good))
    assert len(fetched) == 1


def test_a_table_reads_paths_outside_its_folder_only_if_allowed(tmp_path: Path, run_dir: Path, data: Path) -> None:
    (data / "t").mkdir()
    (data / "secret").write_text("root:x:0:0\n")
    (data / "t" / "t.csv").write_text("filepath,label\n../flat/0.JPEG,cat\n../secret,dog\n")
    values = {"table": str(data / "t" / "t.csv"), "templates": "a {}."}
    with pytest.raises(DataError, match=r"outside the data root: .*allow_outside_root=true"):
        evaluate(config(tmp_path, run_dir, t=values))
    with pytest.raises(DataError, match=r"secret: not an image\. ") as caught:
        evaluate(config(tmp_path, run_dir, t={**values, "allow_outside_root": True}))
    assert "root:x" not in str(caught.value)


def test_the_name_of_an_evaluation_is_a_valid_folder_name(tmp_path: Path, run_dir: Path, data: Path) -> None:
    good = config(tmp_path, run_dir, t={"root": str(data / "pets"), "templates": "a {}."})
    for name, expected in (
        ("a/b", "not a valid folder name"),
        ("x" * 300, "has 300 bytes"),
        ("a\nb", "not a valid folder name"),
    ):
        with pytest.raises(ConfigError, match=expected):
            check(good.model_copy(update={"name": name}))
    with pytest.raises(ConfigError, match=r"the name of a task is used as a file name: .* at most 200 bytes"):
        check(good.model_copy(update={"task": {"x" * 300: good.task["t"]}}))


def test_a_broken_image_stops_or_is_counted_as_in_training(tmp_path: Path, run_dir: Path, data: Path) -> None:
    (data / "pets" / "cow" / "2.png").write_bytes(b"no image")
    strict = config(tmp_path, run_dir, pets={"root": str(data / "pets"), "templates": "a {}."})
    with pytest.raises(DataError, match=r"cow/2\.png: not an image\."):
        evaluate(strict)
    assert not (run_dir / "eval").exists()
    result = evaluate(strict.model_copy(update={"on_bad_image": EvalOnBadImage.skip}))["pets"]
    assert (result["protocol"]["images"], result["protocol"]["bad_images"]) == (3, 1)
    assert "cow/2.png" in result["protocol"]["bad"][0]
    assert list(result["metrics"]) == ["top1", "mean_per_class_recall"]  # in three classes


def test_invalid_data_are_reported_by_the_command_without_a_folder(
    tmp_path: Path, run_dir: Path, data: Path, command: Callable
) -> None:
    done = command(
        "evaluate.py", f"run={run_dir}", "task=[imagenet,cifar10,objectnet]",
        f"task.imagenet.root={data / 'flat'}", f"task.imagenet.ground_truth={data / 'labels.txt'}",
        f"task.cifar10.root={data}", f"task.objectnet.root={data / 'objectnet-1.0'}", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    for part in ("has 2 labels, ", "has 3 images", "task.cifar10.download=true", "mappings are missing"):
        assert part in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "outputs").exists()


def test_cifar10_and_imagenet_v2_are_scored_by_the_command(tmp_path: Path, run_dir: Path, command: Callable) -> None:
    write_cifar10(tmp_path, 17)
    for number in (2, 10, 999):
        write_image(tmp_path / "v2" / str(number) / "1.jpeg", number)
    done = command(
        "evaluate.py", f"run={run_dir}", "task=[cifar10,imagenet_v2]", "task.cifar10.root=.", "task.imagenet_v2.root=v2",
        "task.imagenet_v2.templates=['a {}.']", "num_workers=0", "accelerator=cpu", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    protocol = json.loads((run_dir / "eval" / "cifar10.json").read_text())["protocol"]
    assert (protocol["images"], protocol["classes"], protocol["templates"]) == (17, 10, 18)
    assert (protocol["split"], protocol["files_with_other_checksum"]) == ("test", ["test_batch"])
    protocol = json.loads((run_dir / "eval" / "imagenet_v2.json").read_text())["protocol"]
    assert (protocol["images"], protocol["classes"], protocol["classes_without_images"]) == (3, 1000, 997)


def test_a_bad_row_of_a_tasks_table_is_reported_with_the_key_of_the_task_or_left_out_and_counted(
    tmp_path: Path, run_dir: Path
) -> None:
    write_image(tmp_path / "a.png", 0)
    (tmp_path / "pairs.csv").write_text("filepath,title,label\na.png,a cat,cat\na.png,two, commas, here\n")
    tables = {"table": str(tmp_path / "pairs.csv"), "separator": ","}
    tasks = {"labels": {"kind": "zero_shot", **tables}, "pairs": {"kind": "retrieval", **tables}}
    for name, values in tasks.items():
        with pytest.raises(DataError, match=rf"line 3: .*task\.{name}\.on_bad_row=skip"):
            check(EvaluateConfig(run=str(run_dir), task={name: values}))
        kept = {"templates": "a {}."} if name == "labels" else {}
        config = EvaluateConfig(
            run=str(run_dir),
            task={name: {**values, **kept, "on_bad_row": "skip"}},
            output_dir=str(tmp_path / "outputs"),
        )
        assert evaluate(config)[name]["protocol"]["bad_rows"] == 1
