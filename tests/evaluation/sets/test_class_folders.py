"""Roots above the classes are refused with the folder to give instead; folders of classes are taken, however their images lie in them."""

import re
from pathlib import Path

import pytest

from clip_exp.errors import ConfigError
from clip_exp.evaluation.sets.datasets import from_folder
from tests.small_runs import write_picture


def write(root: Path, *places: str) -> Path:
    for number, place in enumerate(places):
        write_picture(root / place, number)
    return root


ABOVE = {
    "splits": (["train/cat/1.png", "train/dog/1.png", "test/cat/2.png", "test/dog/2.png"], "test"),
    "one split": (["val/cat/1.png", "val/dog/1.png"], "val"),
    "training and validation": (["train/cat/1.png", "train/dog/1.png", "valid/cat/2.png", "valid/dog/2.png"], "valid"),
    "splits by year": (["train2017/cat/1.png", "train2017/dog/1.png", "Val_2017/cat/2.png", "Val_2017/dog/1.png"], "Val_2017"),
    "flat test images": (["train/cat/1.png", "train/dog/1.png", "val/cat/2.png", "val/dog/2.png", "test/3.png"], "val"),
    "flat splits": (["train/1.png", "test/2.png"], "test"),
    "splits and others": (["train/cat/1.png", "test/cat/1.png", "test/dog/1.png", "docs/figure.png"], "test"),
    "splits in an archive": (["archive/train/cat/1.png", "archive/test/cat/1.png", "archive/test/dog/1.png"], "archive/test"),
    "an archive": (["archive/flowers/rose/1.png", "archive/flowers/tulip/1.png"], "archive/flowers"),
    "domains": (["photo/cat/1.png", "photo/dog/1.png", "sketch/cat/1.png", "sketch/dog/1.png"], "photo"),
}  # fmt: skip


@pytest.mark.parametrize("case", ABOVE)
def test_a_root_above_the_classes_is_refused_with_the_folder_to_give(tmp_path: Path, case: str) -> None:
    places, instead = ABOVE[case]
    write(tmp_path, *places)
    with pytest.raises(ConfigError) as caught:
        from_folder(tmp_path, where="task.image_folder")
    assert re.search(rf"task\.image_folder\.root={re.escape(str(tmp_path / instead))}\.( |$)", str(caught.value))
    if "flat splits" not in case:
        assert from_folder(tmp_path / instead).class_names


CLASSES = {
    "images in the folders": ["cat/1.png", "dog/1.png"],
    "some in folders below": ["cat/1.png", "cat/kittens/2.png", "dog/puppies/1.png"],
    "all in a folder of one name": ["cat/images/1.png", "dog/images/1.png"],
    "one is called like a split": ["test/1.png", "dog/1.png"],
}


@pytest.mark.parametrize("case", CLASSES)
def test_folders_that_are_classes_are_taken(tmp_path: Path, case: str) -> None:
    (tmp_path / "empty").mkdir()
    write(tmp_path, *CLASSES[case])
    assert len({*from_folder(tmp_path).labels}) == 2


def test_a_mapping_names_folders_above_others_as_the_classes(tmp_path: Path) -> None:
    write(tmp_path, "animal/cat/1.png", "animal/dog/1.png", "plant/rose/1.png", "plant/tulip/1.png")
    with pytest.raises(ConfigError, match=r"task\.classes=\{animal: animal, …\}"):
        from_folder(tmp_path)
    assert from_folder(tmp_path, {"animal": "animal", "plant": "plant"}).labels == [0, 0, 1, 1]
