"""Overlap of test and training images: found under any path and as copies, in folders, tables, shards and datasets of torchvision."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from clip_exp.config.evaluation import LabeledDataConfig
from clip_exp.data import files
from clip_exp.data.files import ImageSignature, Stored, image_signature
from clip_exp.data.image_sets import ImageFiles
from clip_exp.errors import ConfigError
from clip_exp.evaluation.sets.splits import find_overlap
from clip_exp.evaluation.tasks.knn import KNNTask, KNNTaskConfig
from tests.data.tables.shard_files import write_shard
from tests.evaluation.cifar import write_cifar10
from tests.evaluation.sets.test_torchvision_sets import write_food
from tests.small_runs import write_image


@pytest.fixture(autouse=True)
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder with train and test images of two classes, all different but of the same size."""
    monkeypatch.chdir(tmp_path)
    for number, place in enumerate(("train/cat", "train/dog", "test/cat", "test/dog")):
        for image in range(2):
            write_image(tmp_path / place / f"{image}.png", 10 * number + image)
            os.truncate(tmp_path / place / f"{image}.png", 6000)
    return tmp_path


def prepare(own: dict[str, Any], train: dict[str, Any]) -> KNNTask:
    return KNNTaskConfig(**own, train=LabeledDataConfig(**train), k=1).prepare("knn", "outputs")[0]


def counts(task: KNNTask) -> tuple[int, int]:
    assert task.overlap is not None
    return task.overlap.same_file, task.overlap.equal_content


@pytest.mark.parametrize("train", ["test", "test/", "./test", "train/../test", "link", "{tmp}/test"])
def test_the_same_folder_is_refused_however_it_is_written(data: Path, train: str) -> None:
    (data / "link").symlink_to("test")
    with pytest.raises(ConfigError, match=r"task\.knn\.train has the test images: all 4 images of test are also in"):
        prepare({"root": "test"}, {"root": train.format(tmp=data)})


def test_copies_under_other_names_are_found_and_counted(data: Path) -> None:
    shutil.copy(data / "test" / "cat" / "1.png", data / "train" / "cat" / "copy.png")
    os.link(data / "test" / "dog" / "0.png", data / "train" / "dog" / "link.png")
    task = prepare({"root": "test"}, {"root": "train"})
    assert counts(task) == (1, 1)
    assert task.overlap is not None
    assert task.overlap.protocol() == {
        "images": 2, "same_file": 1, "equal_content": 1, "examples": ["test/cat/1.png", "test/dog/0.png"],
    }  # fmt: skip


def test_a_copy_of_everything_is_refused(data: Path) -> None:
    shutil.copytree(data / "test", data / "copied")
    with pytest.raises(ConfigError, match=r"all 4 images of test are also in copied, 4 of them as copies"):
        prepare({"root": "test"}, {"root": "copied"})


def test_images_of_one_size_and_one_sample_are_distinguished_by_all_their_bytes(tmp_path: Path) -> None:
    for name, byte in (("a", b"y"), ("b", b"z"), ("c", b"y")):
        (tmp_path / name).write_bytes(bytes(20_000) + byte + bytes(80_000))
    assert not find_overlap(ImageFiles([tmp_path / "a"]), ImageFiles([tmp_path / "b"])).images
    assert find_overlap(ImageFiles([tmp_path / "a"]), ImageFiles([tmp_path / "c"])).equal_content == 1


def test_only_images_of_equal_size_are_opened(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.truncate(data / "test" / "cat" / "1.png", 6001)
    opened = []

    def recorded(place: Stored) -> ImageSignature:
        opened.append(place.file)
        return image_signature(place)

    monkeypatch.setattr(files, "image_signature", recorded)
    find_overlap(ImageFiles([data / "train/cat/0.png"]), ImageFiles([data / "test/cat/0.png", data / "test/cat/1.png"]))
    assert sorted({*opened}) == [str(data / "test/cat/0.png"), str(data / "train/cat/0.png")]


def test_missing_and_empty_files_are_not_copies_of_each_other(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).touch()
    ours, theirs = ([tmp_path / name, tmp_path / f"no {name}"] for name in ("a", "b"))
    assert not find_overlap(ImageFiles(ours), ImageFiles(theirs)).images


def test_tables_and_shards_are_compared_with_folders(data: Path) -> None:
    (data / "test.csv").write_text("filepath,label\n./test/cat/0.png,cat\ntest/../train/dog/0.png,dog\n")
    assert counts(prepare({"table": "test.csv"}, {"root": "train"})) == (1, 0)
    images = [("cat", data / "test/cat/0.png"), ("dog", data / "train/dog/1.png")]
    members = {}
    for number, (label, path) in enumerate(images):
        members |= {f"{number}.png": path.read_bytes(), f"{number}.cls": label}
    write_shard(data / "test.tar", members)
    shard = {"table": "test.tar", "label_key": "cls", "image_key": "png"}
    assert counts(prepare(shard, {"root": "train"})) == (0, 1)
    with pytest.raises(ConfigError, match="all 2 images"):
        prepare(shard, {**shard, "table": "./test.tar"})


def test_datasets_of_torchvision_are_compared_by_their_files(data: Path) -> None:
    write_food(data)
    with pytest.raises(ConfigError, match="all 3 images of torchvision's Food101/test"):
        prepare(
            {"torchvision": "Food101", "root": "."}, {"torchvision": "Food101", "root": str(data), "split": "train"}
        )


def test_a_dataset_without_image_files_is_identified_by_its_folder(data: Path) -> None:
    write_cifar10(data, 17)
    (data / "link").symlink_to(data)
    cifar = {"torchvision": "CIFAR10", "root": "."}
    with pytest.raises(ConfigError, match="all 17 images"):
        prepare(cifar, {**cifar, "root": "link", "split": "test"})
    assert find_overlap(ImageFiles(["train/cat/0.png"]), _Array()) is None


class _Array(ImageFiles):
    def __init__(self) -> None:
        super().__init__(["0"])

    def stored(self, index: int) -> None: ...  # type: ignore[override]

    def fingerprint(self) -> str:
        return "an array"
