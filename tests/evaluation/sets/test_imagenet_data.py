"""ImageNet and its shifted versions, each from a tiny copy in the layout of its distribution."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from clip_exp.config.evaluation import LabeledDataConfig
from clip_exp.data.files import ImageLimits
from clip_exp.errors import ConfigError, DataError
from clip_exp.evaluation.sets.datasets import labeled_images
from clip_exp.evaluation.sets.labeled import LabeledImages
from tests.small_runs import write_image

# Ids of the devkit are in another order than wnids: kit fox is 1 and tench is 449.
IDS = {1: "n02119789", 449: "n01440764", 450: "n01443537", 1001: "n01317541"}
WNIDS = ["n01443537", "n02119789", "n01440764", "n02119789"]  # of the four images; goldfish 1, kit fox 278, tench 0
LABELS = [1, 278, 0, 278]


def read(root: Path, classes: str = "imagenet", **values) -> LabeledImages:
    data = LabeledDataConfig(root=str(root), classes=classes, **{key: str(value) for key, value in values.items()})
    return labeled_images(data, "task.imagenet", "outputs")


@pytest.fixture
def flat(tmp_path: Path) -> Path:
    for number in range(1, 5):
        write_image(tmp_path / "val" / f"ILSVRC2012_val_{number:08d}.JPEG", number)
    return tmp_path / "val"


@pytest.fixture
def devkit(tmp_path: Path) -> Path:
    """Return a folder with the two required files of ILSVRC2012_devkit_t12, with a group of classes after the classes."""
    data = tmp_path / "ILSVRC2012_devkit_t12" / "data"
    data.mkdir(parents=True)
    (data / "ILSVRC2012_validation_ground_truth.txt").write_text("450\n1\n449\n1\n")
    kinds = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("gloss", "O"), ("num_children", "O")]
    rows = [(number, wnid, "words", "gloss", 2 if number > 1000 else 0) for number, wnid in IDS.items()]
    savemat(data / "meta.mat", {"synsets": np.array(rows, dtype=kinds).reshape(-1, 1)})
    return data.parent


def pack(folder: Path, archive: Path) -> Path:
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, arcname=folder.name)
        evil = tarfile.TarInfo("../escaped.txt")
        evil.size = 4
        tar.addfile(evil, io.BytesIO(b"evil"))
    return archive


def test_the_devkit_labels_flat_images_from_its_folder_and_from_its_archive(
    flat: Path, devkit: Path, tmp_path: Path
) -> None:
    archive = pack(devkit, tmp_path / "ILSVRC2012_devkit_t12.tar.gz")
    before = sorted(tmp_path.parent.rglob("*"))
    for given in (devkit, devkit / "data", archive, devkit / "data" / "ILSVRC2012_validation_ground_truth.txt"):
        images = read(flat, ground_truth=given)
        assert images.labels == LABELS
        assert len(images.class_names) == 1000
        assert images.about["ground_truth"] == str(given)
    assert sorted(tmp_path.parent.rglob("*")) == before  # nothing was extracted


def test_every_other_form_of_ground_truth_gives_the_same_labels(flat: Path, tmp_path: Path) -> None:
    names = [f"ILSVRC2012_val_{number:08d}" for number in range(1, 5)]
    kaggle = [f"{name},{wnid} 1 2 3 4 {wnid} 5 6 7 8" for name, wnid in zip(names, WNIDS, strict=True)]
    forms = {
        "LOC_val_solution.csv": ["ImageId,PredictionString", *reversed(kaggle)],
        "val.txt": [f"{name}.JPEG {label}" for name, label in reversed(list(zip(names, LABELS, strict=True)))],
        "wnids.txt": WNIDS,
        "numbers.txt": [str(label) for label in LABELS],
    }
    for file, lines in forms.items():
        (tmp_path / file).write_text("\n".join(lines) + "\n")
        assert read(flat, ground_truth=tmp_path / file).labels == LABELS, file


def test_numbers_in_names_order_images_by_value(tmp_path: Path) -> None:
    for number in (1, 2, 10):
        write_image(tmp_path / "flat" / f"{number}.png", number)
    (tmp_path / "labels.txt").write_text("cat\ndog\nbird\n")
    images = read(tmp_path / "flat", "labels", ground_truth=tmp_path / "labels.txt")
    assert [Path(images.images.name(index)).name for index in range(3)] == ["1.png", "2.png", "10.png"]
    assert [images.class_names[label] for label in images.labels] == ["cat", "dog", "bird"]


def test_another_number_of_labels_than_images_is_refused_with_both_counts(flat: Path, tmp_path: Path) -> None:
    for content in ("0\n1\n2\n", "\n".join(f"ILSVRC2012_val_{number:08d}.JPEG 0" for number in range(1, 4))):
        (tmp_path / "short.txt").write_text(content)
        with pytest.raises(DataError, match=r"has 3 labels, .*val has 4 images"):
            read(flat, ground_truth=tmp_path / "short.txt")


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        ("0\n1\n2\n1000\n", DataError, "not classes of ImageNet-1k: '1000'"),
        ("a.JPEG 0\nb.JPEG 0\nc.JPEG 0\nd.JPEG 0\n", DataError, "no label for 'ILSVRC2012_val_00000001'"),
        ("ImageId,PredictionString\nILSVRC2012_val_00000001,\n", DataError, "no label for ILSVRC2012_val_00000001"),
        ("", DataError, "labels.txt is empty"),
        ("a.JPEG 0\na.JPEG 1\n", DataError, "two labels for a.JPEG: 0 and 1"),
    ],
)
def test_an_invalid_ground_truth_is_reported(
    flat: Path, tmp_path: Path, content: str, error: type, message: str
) -> None:
    (tmp_path / "labels.txt").write_text(content)
    with pytest.raises(error, match=message):
        read(flat, ground_truth=tmp_path / "labels.txt")


def test_an_incomplete_or_damaged_devkit_is_reported(flat: Path, devkit: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no such file. Use ImageNet's devkit"):
        read(flat, ground_truth=tmp_path / "absent")
    meta = devkit / "data" / "meta.mat"
    meta.write_bytes(meta.read_bytes()[:200])
    with pytest.raises(DataError, match=r"meta.mat cannot be read"):
        read(flat, ground_truth=devkit)
    meta.unlink()
    with pytest.raises(
        ConfigError, match=r"contains no data/ILSVRC2012_validation_ground_truth.txt with data/meta.mat"
    ):
        read(flat, ground_truth=devkit)
    with pytest.raises(ConfigError, match=r"its ids are mapped to classes by meta.mat: use the whole devkit"):
        read(flat, ground_truth=devkit / "data" / "ILSVRC2012_validation_ground_truth.txt")
    archive = pack(devkit, tmp_path / "devkit.tar.gz")
    with pytest.raises(ConfigError, match=r"contains no ILSVRC2012_validation_ground_truth.txt with meta.mat"):
        read(flat, ground_truth=archive)
    archive.write_bytes(archive.read_bytes()[:-60])
    with pytest.raises((DataError, ConfigError)):
        read(flat, ground_truth=archive)


def test_flat_images_and_class_folders_are_not_confused(flat: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"contains images itself: sort them .* task\.imagenet\.ground_truth=FILE"):
        read(flat)
    with pytest.raises(
        ConfigError, match=r"parent folder of splits, not of classes: 'val'\. Use task\.imagenet\.root=.*/val\.$"
    ):
        read(tmp_path)
    write_image(tmp_path / "folders" / "n01440764" / "1.JPEG", 1)
    (tmp_path / "labels.txt").write_text("0\n")
    with pytest.raises(DataError, match=r"contains no images directly\. One folder per class needs no ground_truth"):
        read(tmp_path / "folders", ground_truth=tmp_path / "labels.txt")


def test_folders_of_imagenet_v2_are_numbers_not_texts(tmp_path: Path) -> None:
    for number in (0, 2, 10, 100, 657, 744):
        write_image(tmp_path / str(number) / "a.jpeg", number)
    images = read(tmp_path)
    assert images.labels == [0, 2, 10, 100, 657, 744]
    assert [Path(images.images.name(index)).parent.name for index in range(6)] == [
        "0",
        "2",
        "10",
        "100",
        "657",
        "744",
    ]
    assert [images.class_names[label] for label in images.labels[4:]] == ["missile", "missile"]
    assert images.imagenet == [[index] for index in range(1000)]
    assert images.keys[10] == "10"


def test_imagenet_v2_by_wnid_works_too_but_not_mixed(tmp_path: Path) -> None:
    write_image(tmp_path / "n01443537" / "a.jpeg", 0)
    assert read(tmp_path).labels == [1]
    write_image(tmp_path / "7" / "a.jpeg", 0)
    with pytest.raises(DataError, match="not WordNet ids such as n01440764: '7'"):
        read(tmp_path)


# Of ObjectNet's mappings: line 426 of ImageNet's labels is `analog clock`, the class 409 of ImageNet-1k.
LINES = {230: "banana", 426: "analog clock", 427: "digital clock"}
PYTORCH = {"954": 230, "409": 426, "530": 427}


@pytest.fixture
def objectnet(tmp_path: Path) -> Path:
    root = tmp_path / "objectnet-1.0"
    for number, folder in enumerate(["banana", "alarm_clock", "squeegee", "squeegee"]):
        write_image(root / "images" / folder / f"{number}.png", number, size=(20, 16))
    mappings = {
        "folder_to_objectnet_label.json": {
            "squeegee": "Squeegee",
            "banana": "Banana",
            "alarm_clock": "Alarm clock",
            "bench": "Bench",
        },
        "objectnet_to_imagenet_1k.json": {"Alarm clock": "analog clock; digital clock", "Banana": "banana"},
        "pytorch_to_imagenet_2012_id.json": PYTORCH,
    }
    (root / "mappings").mkdir()
    for file, content in mappings.items():
        (root / "mappings" / file).write_text(json.dumps(content))
    lines = [LINES.get(line, f"label {line}") for line in range(1000)]
    (root / "mappings" / "imagenet_to_label_2012_v2").write_text("\n".join(lines) + "\n")
    return root


def test_objectnet_is_its_overlap_with_imagenet_without_the_frame(objectnet: Path) -> None:
    for root in (objectnet, objectnet.parent, objectnet / "images"):
        images = read(root, "objectnet")
        assert images.class_names == ["Alarm clock", "Banana"]
        assert images.imagenet == [[409, 530], [954]]
        assert images.labels == [0, 1]
        assert (images.about["left_out_classes"], images.about["left_out_images"]) == (1, 2)
        image = images.images.open(0, ImageLimits(10**6))
        whole = Image.open(objectnet / "images" / "alarm_clock" / "1.png")
        assert np.array_equal(np.asarray(image), np.asarray(whole)[2:-2, 2:-2])


def test_a_class_of_objectnet_without_images_can_still_be_predicted(objectnet: Path) -> None:
    (objectnet / "images" / "banana" / "0.png").unlink()
    (objectnet / "images" / "banana").rmdir()
    images = read(objectnet, "objectnet")
    assert (images.labels, images.missing, images.keys) == ([0], ["Banana"], ["alarm_clock", None])


def test_objectnet_without_its_mappings_or_with_other_folders_is_refused(objectnet: Path) -> None:
    write_image(objectnet / "images" / "unicorn" / "1.png", 0)
    with pytest.raises(DataError, match="not classes of ObjectNet: 'unicorn'"):
        read(objectnet, "objectnet")
    overlap = objectnet / "mappings" / "objectnet_to_imagenet_1k.json"
    overlap.write_text('{"Banana": "bananna"}')
    (objectnet / "images" / "unicorn" / "1.png").unlink()
    (objectnet / "images" / "unicorn").rmdir()
    with pytest.raises(DataError, match="'bananna' of 'Banana' is not in imagenet_to_label_2012_v2"):
        read(objectnet, "objectnet")
    overlap.write_text("{")
    with pytest.raises(DataError, match=r"objectnet_to_imagenet_1k.json cannot be read"):
        read(objectnet, "objectnet")
    overlap.unlink()
    with pytest.raises(ConfigError, match="ObjectNet's mappings are missing"):
        read(objectnet, "objectnet")
