"""Labeled images from folders and tables. Parent folders of splits are refused with the folder to use;
class folders are accepted with any layout of their images.
"""

import re
from pathlib import Path

import pytest

from clip_exp.config.data import GenerateConfig, Generator
from clip_exp.config.evaluation import LabeledDataConfig
from clip_exp.errors import ConfigError, DataError
from clip_exp.evaluation.sets.datasets import from_folder, from_table, labeled_images
from clip_exp.evaluation.sets.labeled import LabeledImages
from tests.small_runs import write_image


def names(images: LabeledImages) -> list[str]:
    return [images.images.name(index) for index in range(len(images.images))]


def test_folders_are_classes_in_code_point_order_and_underscores_are_spaces(class_folders: Path):
    images = from_folder(class_folders)
    assert images.class_names == ["Zebra", "dog", "tabby cat"]
    assert images.labels == [0] * 4 + [1] * 4 + [2] * 4
    assert [Path(path).parent.name for path in list(images.images.paths)] == ["Zebra"] * 4 + ["dog"] * 4 + [
        "tabby_cat"
    ] * 4
    assert not [path for path in list(images.images.paths) if "hidden" in path or "notes" in path]


def test_labels_lose_their_blanks_and_similar_ones_are_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    for number, folder in enumerate(("cat", "cat ", "Cat", "\u00a0guinea_pig")):
        write_image(tmp_path / "root" / folder / f"{number}.png", number)
    images = from_folder(tmp_path / "root", ["Cat", " cat\u200b", "guinea pig"])
    assert (images.class_names, images.keys) == (["Cat", "cat", "guinea pig"], ["Cat", "cat", "guinea_pig"])
    assert sorted(zip([Path(name).name for name in names(images)], images.labels, strict=True)) == [
        ("0.png", 1), ("1.png", 1), ("2.png", 0), ("3.png", 2),
    ]  # fmt: skip
    assert "'Cat' and 'cat'" in caplog.text
    (tmp_path / "labels.csv").write_text("filepath,label\na.png,cat\nb.png,cat \n./a.png,\u00a0cat\nc.png,dog\n")
    table = from_table(str(tmp_path / "labels.csv"), LabeledDataConfig())
    assert (table.class_names, table.labels) == (["cat", "dog"], [0, 0, 1])


def test_images_in_subfolders_of_a_class_belong_to_it(tmp_path: Path):
    write_image(tmp_path / "cat" / "images" / "1.JPEG", 0)
    assert list(from_folder(tmp_path).images.paths) == [str(tmp_path / "cat" / "images" / "1.JPEG")]


def test_names_are_matched_by_name_before_they_are_matched_by_order(class_folders: Path):
    by_name = from_folder(class_folders, ["tabby cat", "dog", "horse", "Zebra"])
    assert by_name.labels == [3] * 4 + [1] * 4 + [0] * 4
    assert by_name.missing == ["horse"]
    by_order = from_folder(class_folders, ["striped horse", "hound", "kitten"])
    assert by_order.labels == [0] * 4 + [1] * 4 + [2] * 4
    assert by_order.keys == ["Zebra", "dog", "tabby_cat"]


def test_a_mapping_names_folders_also_from_a_file(class_folders: Path, tmp_path: Path):
    mapping = {"tabby_cat": "kitten", "dog": "hound", "Zebra": "striped horse"}
    path = tmp_path / "names.tsv"
    path.write_text("".join(f"{key}\t{name}\n" for key, name in mapping.items()))
    for images in (from_folder(class_folders, mapping), from_folder(class_folders, str(path))):
        assert images.class_names == ["kitten", "hound", "striped horse"]
        assert images.labels == [2] * 4 + [1] * 4 + [0] * 4


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (["one", "two"], "2 names.*3 classes"),
        ({"dog": "hound"}, "'Zebra', 'tabby_cat'"),
        (["dog", "dog", "Zebra", "tabby cat"], "dog. twice"),
        ("lables", "lables: no such file"),
    ],
)
def test_names_that_do_not_fit_the_folders_are_refused(class_folders: Path, classes, message: str):
    with pytest.raises(ConfigError, match=message):
        from_folder(class_folders, classes)


def test_an_imagenet_folder_is_scored_against_all_1000_names_in_the_order_of_wnids(tmp_path: Path):
    for wnid in ("n04356056", "n01440764", "n03773504"):
        write_image(tmp_path / wnid / "a.JPEG", 0)
    images = from_folder(tmp_path, "imagenet")
    assert len(images.class_names) == 1000
    assert images.labels == [0, 657, 837]
    assert [images.class_names[label] for label in images.labels] == ["tench", "missile", "sunglasses"]
    assert len(images.missing) == 997


@pytest.mark.parametrize(
    ("folder", "message"),
    [("cat", "not WordNet ids such as n01440764: 'cat'"), ("n99999999", "not classes of ImageNet-1k: 'n99999999'")],
)
def test_a_folder_that_is_not_a_class_of_imagenet_is_refused(tmp_path: Path, folder: str, message: str):
    write_image(tmp_path / "n01440764" / "a.png", 0)
    write_image(tmp_path / folder / "a.png", 0)
    with pytest.raises(DataError, match=message):
        from_folder(tmp_path, "imagenet")


def test_empty_and_missing_folders_are_distinguished(tmp_path: Path):
    with pytest.raises(DataError, match="no folders with images"):
        from_folder(tmp_path)
    write_image(tmp_path / "loose.png", 0)
    with pytest.raises(DataError, match="sort them into one folder per class"):
        from_folder(tmp_path)
    with pytest.raises(ConfigError, match=r"task\.x\.root=.*absent: no such folder"):
        from_folder(tmp_path / "absent", where="task.x")


def test_a_table_gives_its_distinct_labels_as_written(tmp_path: Path):
    table = tmp_path / "labels.csv"
    table.write_text("filepath,label\nb.png,tabby_cat\na.png,dog\nc.png,dog\n")
    images = from_table(str(table), LabeledDataConfig())
    assert images.class_names == ["dog", "tabby_cat"]
    assert images.labels == [1, 0, 0]
    assert names(images) == [str(tmp_path / name) for name in ("b.png", "a.png", "c.png")]


def test_labels_that_are_numbers_are_in_the_order_of_their_values(tmp_path: Path):
    table = tmp_path / "labels.csv"
    table.write_text("filepath,label\na.png,10\nb.png,2\n")
    images = from_table(str(table), LabeledDataConfig(classes=["two", "ten"]))
    assert (images.labels, images.keys) == ([1, 0], ["2", "10"])


def test_generated_data_give_their_validation_split_unless_train_is_requested(tmp_path: Path):
    digits = GenerateConfig(kind=Generator.digits, rows=6, val_rows=4)
    for values, split, count in (
        ({}, None, 4),
        ({}, "train", 6),
        ({"split": "train"}, None, 6),
        ({"split": "val"}, "train", 4),
    ):
        data = LabeledDataConfig(generate=digits, **values)
        assert len(labeled_images(data, "task.t", str(tmp_path), split=split).labels) == count


def test_an_image_in_several_rows_counts_once_and_has_one_label(tmp_path: Path):
    table = tmp_path / "labels.csv"
    table.write_text("filepath,label\na.png,dog\nb.png,cat\na.png,dog\n")
    images = from_table(str(table), LabeledDataConfig())
    assert (names(images), images.labels) == ([str(tmp_path / "a.png"), str(tmp_path / "b.png")], [1, 0])
    table.write_text("filepath,label\na.png,dog\nb.png,cat\na.png,cat\n")
    with pytest.raises(DataError, match=r"line 4: the label of a\.png is 'cat' here, but 'dog' in"):
        from_table(str(table), LabeledDataConfig())


def test_images_without_a_label_are_left_out_and_counted(tmp_path: Path):
    table = tmp_path / "labels.csv"
    table.write_text("filepath,label\na.png,dog\nb.png,\nb.png,\n")
    images = from_table(str(table), LabeledDataConfig())
    assert (images.class_names, images.labels, images.unlabeled) == (["dog"], [0], 1)
    table.write_text("filepath,label\nb.png,\n")
    with pytest.raises(DataError, match="the column label is empty in every row"):
        from_table(str(table), LabeledDataConfig())


def test_a_missing_column_is_reported_with_the_key_of_the_task(tmp_path: Path):
    table = tmp_path / "labels.csv"
    table.write_text("filepath,kind\na.png,dog\n")
    with pytest.raises(DataError, match=r"no column 'label' \(task\.t\.label_key\).* Set task\.t\.label_key="):
        labeled_images(LabeledDataConfig(table=str(table)), "task.t", str(tmp_path))


def write(root: Path, *places: str) -> Path:
    for number, place in enumerate(places):
        write_image(root / place, number)
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
def test_a_parent_folder_of_splits_is_refused_with_the_folder_to_use(tmp_path: Path, case: str) -> None:
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
def test_class_folders_are_accepted(tmp_path: Path, case: str) -> None:
    (tmp_path / "empty").mkdir()
    write(tmp_path, *CLASSES[case])
    assert len({*from_folder(tmp_path).labels}) == 2


def test_a_mapping_selects_folders_with_subfolders_as_classes(tmp_path: Path) -> None:
    write(tmp_path, "animal/cat/1.png", "animal/dog/1.png", "plant/rose/1.png", "plant/tulip/1.png")
    with pytest.raises(ConfigError, match=r"task\.classes=\{animal: animal, …\}"):
        from_folder(tmp_path)
    assert from_folder(tmp_path, {"animal": "animal", "plant": "plant"}).labels == [0, 0, 1, 1]
