"""Datasets of torchvision by name, from tiny copies in the files that torchvision reads."""

import csv
import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torchvision.datasets

from clip_exp.config.evaluation import LabeledDataConfig
from clip_exp.data.files import BadImage, ImageLimits
from clip_exp.errors import ConfigError, DataError
from clip_exp.evaluation.sets.datasets import labeled_images
from clip_exp.evaluation.sets.labeled import LabeledImages
from tests.evaluation.cifar import CLASSES, cifar10_pixels, write_cifar10
from tests.small_runs import write_image


def read(root: Path, name: str, part: str | None = None, **values) -> LabeledImages:
    return labeled_images(
        LabeledDataConfig(torchvision=name, root=str(root), **values), "task.t", "outputs", split=part
    )


def write_mnist(root: Path) -> None:
    folder = root / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for part, count in (("train", 7), ("t10k", 5)):
        pixels = np.random.default_rng(count).integers(0, 256, (count, 28, 28), dtype=np.uint8)
        header = struct.pack(">4i", 0x803, count, 28, 28)
        (folder / f"{part}-images-idx3-ubyte").write_bytes(header + pixels.tobytes())
        labels = bytes(index % 10 for index in range(count))
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 0x801, count) + labels)


def write_food(root: Path) -> None:
    files = {"apple_pie": ["apple_pie/1", "apple_pie/2"], "waffles": ["waffles/3"]}
    (root / "food-101" / "meta").mkdir(parents=True)
    for part in ("train", "test"):
        (root / "food-101" / "meta" / f"{part}.json").write_text(json.dumps(files))
    for number, file in enumerate(file for own in files.values() for file in own):
        write_image(root / "food-101" / "images" / f"{file}.jpg", number)


def write_pets(root: Path) -> None:
    lines = ["Abyssinian_1 1 1 1", "great_pyrenees_7 2 2 1", "great_pyrenees_9 2 2 1"]
    folder = root / "oxford-iiit-pet"
    (folder / "annotations").mkdir(parents=True)
    for part in ("trainval", "test"):
        (folder / "annotations" / f"{part}.txt").write_text("\n".join(lines) + "\n")
    for number, line in enumerate(lines):
        write_image(folder / "images" / f"{line.split()[0]}.jpg", number)


def write_eurosat(root: Path) -> None:
    for number, name in enumerate(["AnnualCrop", "AnnualCrop", "SeaLake"]):
        write_image(root / "eurosat" / "2750" / name / f"{number}.jpg", number)


def write_sun(root: Path) -> None:
    folder = root / "SUN397"
    for number, name in enumerate(["a/abbey", "a/abbey", "b/bath/indoor"]):
        write_image(folder / name / f"sun_{number}.jpg", number)
    (folder / "ClassName.txt").write_text("/a/abbey\n/b/bath/indoor\n")


def write_gtsrb(root: Path) -> None:
    folder = root / "gtsrb"
    rows = [("0.ppm", 2), ("1.ppm", 0), ("2.ppm", 1)]
    for number, (file, _) in enumerate(rows):
        write_image(folder / "GTSRB" / "Final_Test" / "Images" / file, number)
    with open(folder / "GT-final_test.csv", "w", newline="") as file:
        csv.writer(file, delimiter=";").writerows([("Filename", "ClassId"), *rows])


def write_clevr(root: Path) -> None:
    folder = root / "clevr" / "CLEVR_v1.0"
    counts = {"CLEVR_val_0.png": 3, "CLEVR_val_1.png": 10, "CLEVR_val_2.png": 4}
    for number, file in enumerate(counts):
        write_image(folder / "images" / "val" / file, number)
    scenes = [{"image_filename": file, "objects": [{}] * count} for file, count in counts.items()]
    (folder / "scenes").mkdir()
    (folder / "scenes" / "CLEVR_val_scenes.json").write_text(json.dumps({"scenes": scenes}))


def write_caltech(root: Path) -> None:
    folder = root / "caltech101" / "101_ObjectCategories"
    for name, count in (("BACKGROUND_Google", 1), ("Faces_easy", 2), ("accordion", 1)):
        for number in range(1, count + 1):
            write_image(folder / name / f"image_{number:04d}.jpg", number)


SETS: dict[str, tuple[Callable[[Path], None], dict, list[str]]] = {
    "MNIST": (write_mnist, {"train": False}, torchvision.datasets.MNIST.classes),
    "Food101": (write_food, {"split": "test"}, ["apple pie", "waffles"]),
    "OxfordIIITPet": (write_pets, {"split": "test"}, ["Abyssinian", "Great Pyrenees"]),
    "EuroSAT": (write_eurosat, {}, ["AnnualCrop", "SeaLake"]),
    "SUN397": (write_sun, {}, ["abbey", "bath/indoor"]),
    "Caltech101": (write_caltech, {}, ["Faces easy", "accordion"]),
}


@pytest.mark.parametrize("name", SETS)
def test_image_sets_labels_and_names_are_those_of_torchvisions_class(tmp_path: Path, name: str) -> None:
    write, arguments, names = SETS[name]
    write(tmp_path)
    dataset = getattr(torchvision.datasets, name)(str(tmp_path), **arguments)
    if name == "SUN397":  # which lists its files as the file system does
        order = sorted(range(len(dataset)), key=lambda index: dataset._image_files[index])
    else:
        order = list(range(len(dataset)))
    images = read(tmp_path, name)
    assert images.class_names == names
    for position, index in enumerate(order):
        theirs, label = dataset[index]
        assert images.labels[position] == label
        mine = images.images.open(position, ImageLimits(10**9))
        assert np.array_equal(np.asarray(mine.convert("RGB")), np.asarray(theirs.convert("RGB")))


def test_a_name_in_lower_case_and_the_training_split_are_found(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    assert [len(read(tmp_path, "mnist", part).labels) for part in (None, "train")] == [5, 7]
    assert len(read(tmp_path, "mnist", split="train").labels) == 7
    assert read(tmp_path, "mnist").images.name(3) == "MNIST/test/3"


def test_a_dataset_without_names_takes_custom_names_in_the_order_of_its_labels(tmp_path: Path) -> None:
    write_gtsrb(tmp_path)
    with pytest.raises(ConfigError, match=r"has no names for the 3 classes of GTSRB: .*task\.t\.classes"):
        read(tmp_path, "GTSRB")
    images = read(tmp_path, "GTSRB", classes=["20 km/h", "30 km/h", "50 km/h", "60 km/h"])
    assert (list(images.labels), images.missing) == ([2, 0, 1], ["60 km/h"])
    write_clevr(tmp_path)
    counted = read(tmp_path, "CLEVRClassification", classes=["10", "3", "4", "5"])
    assert list(counted.labels) == [1, 0, 2]


def test_files_of_cifar_with_other_checksums_are_read_and_listed_in_the_protocol(tmp_path: Path, caplog) -> None:
    write_cifar10(tmp_path, 13)
    with pytest.raises(RuntimeError):
        torchvision.datasets.CIFAR10(str(tmp_path), train=False)
    images = read(tmp_path, "CIFAR10")
    assert images.class_names == CLASSES
    assert list(images.labels) == [index % 10 for index in range(13)]
    assert np.array_equal(np.asarray(images.images.open(12, ImageLimits(10**9))), cifar10_pixels(tmp_path)[12])
    assert images.about["files_with_other_checksum"] == ["test_batch"]
    assert "other checksums than in torchvision" in caplog.text
    train = read(tmp_path, "CIFAR10", "train")
    assert len(train.labels) == 65
    assert np.array_equal(
        np.asarray(train.images.open(14, ImageLimits(10**9))), cifar10_pixels(tmp_path, "data_batch_2")[1]
    )


class Command:
    """Object whose pickle runs a command when it is loaded."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def test_a_pickle_that_would_run_a_command_is_refused_and_does_not(tmp_path: Path) -> None:
    write_cifar10(tmp_path, 3)
    batch = tmp_path / "cifar-10-batches-py" / "test_batch"
    batch.write_bytes(pickle.dumps({"data": Command(f"touch {tmp_path / 'ran'}"), "labels": []}))
    with pytest.raises(DataError, match=r"test_batch cannot be read: the pickle calls .*system, which is not allowed"):
        read(tmp_path, "CIFAR10")
    assert not (tmp_path / "ran").exists()


def test_damaged_files_of_cifar_are_named(tmp_path: Path) -> None:
    write_cifar10(tmp_path, 3)
    batch = tmp_path / "cifar-10-batches-py" / "test_batch"
    batch.write_bytes(batch.read_bytes()[:-40])
    with pytest.raises(DataError, match=r"test_batch cannot be read: .*task\.t\.download=true"):
        read(tmp_path, "CIFAR10")
    content = {"data": np.zeros((3, 3072), np.uint8), "labels": [0, 1, 10]}
    batch.write_bytes(pickle.dumps(content, protocol=2))
    with pytest.raises(DataError, match="must have a label from 0 to 9 for each of its 3 images"):
        read(tmp_path, "CIFAR10")


def test_missing_data_are_reported_with_the_key_that_downloads_them(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"does not find CIFAR100 there .* To download it: task\.t\.download=true"):
        read(tmp_path, "CIFAR100")
    with pytest.raises(
        ConfigError, match=r"absent: no such folder. To download CIFAR10 into it: task\.t\.download=true"
    ):
        read(tmp_path / "absent", "CIFAR10")
    with pytest.raises(ConfigError, match="torchvision cannot download it"):
        read(tmp_path, "FER2013")


def test_only_missing_data_are_downloaded_and_a_failure_is_one_message(tmp_path: Path, monkeypatch) -> None:
    fetched = []

    def fetch(url: str, root: str, **_: object) -> None:
        fetched.append(url)
        if len(fetched) == 1:
            raise OSError("no route to host")
        write_eurosat(Path(root).parent)

    monkeypatch.setattr(
        "torchvision.datasets.eurosat.download_and_extract_archive",
        lambda url, download_root, md5: fetch(url, download_root),
    )
    with pytest.raises(DataError, match=r"EuroSAT could not be downloaded to .*no route to host"):
        read(tmp_path / "new", "EuroSAT", download=True)
    (tmp_path / "new" / "eurosat").rmdir()
    assert len(read(tmp_path / "new", "EuroSAT", download=True).labels) == 3
    assert len(read(tmp_path / "new", "EuroSAT", download=True).labels) == 3
    assert len(fetched) == 2


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("CIFAR11", {}, "not a classification dataset of torchvision.datasets: did you mean 'cifar10'"),
        ("VOCDetection", {}, "not a classification dataset"),
        ("MNIST", {"split": "val"}, "split=val must be train or test for MNIST"),
        ("Food101", {"split": "valid"}, r"split=valid: Unknown value 'valid' for argument split. Valid values are"),
        ("EuroSAT", {"split": "test"}, "EuroSAT has no splits, such as test"),
        ("MNIST", {"classes": ["one", "two"]}, "2 names.*10 classes"),
        ("MNIST", {"root": None}, r"task\.t\.root has no value"),
    ],
)
def test_invalid_settings_are_reported(tmp_path: Path, name: str, values: dict, message: str) -> None:
    write_mnist(tmp_path)
    write_food(tmp_path)
    write_eurosat(tmp_path)
    with pytest.raises(ConfigError, match=message):
        labeled_images(LabeledDataConfig(**{"torchvision": name, "root": str(tmp_path), **values}), "task.t", "outputs")


def test_a_probe_cannot_train_on_the_dataset_that_it_is_scored_on(tmp_path: Path) -> None:
    write_eurosat(tmp_path)
    with pytest.raises(ConfigError, match="EuroSAT has no splits, such as train"):
        read(tmp_path, "EuroSAT", "train")


def test_a_broken_file_is_a_bad_image_and_a_change_changes_the_fingerprint(tmp_path: Path) -> None:
    write_food(tmp_path)
    (tmp_path / "other_set.zip").write_text("not Food101's")
    images = read(tmp_path, "Food101")
    before = images.images.fingerprint()
    (tmp_path / "other_set.zip").write_text("changed, but not Food101's")
    assert images.images.fingerprint() == before
    (tmp_path / "food-101" / "images" / "apple_pie" / "2.jpg").write_bytes(b"no image")
    assert images.images.fingerprint() != before
    with pytest.raises(BadImage, match=r"^not an image$"):
        images.images.open(1, ImageLimits(10**9))
    with pytest.raises(BadImage, match="more than max_image_pixels=100"):
        images.images.open(0, ImageLimits(100))
