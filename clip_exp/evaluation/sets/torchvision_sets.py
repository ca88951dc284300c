"""Classification datasets of torchvision by name: `torchvision: CIFAR10`. Torch is imported only to load one."""

import ast
import hashlib
import inspect
import logging
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from clip_exp.config.evaluation import LabeledDataConfig
from clip_exp.data.cifar import CifarImages, read_cifar
from clip_exp.data.image_sets import TorchvisionImages
from clip_exp.errors import ConfigError, DataError, nearest
from clip_exp.evaluation.sets.labeled import LabeledImages, match
from clip_exp.open_clip_files import package_folder
from clip_exp.progress import progress

log = logging.getLogger(__name__)

# Name of the test split where it is not `test`. The test images of CLEVR have no labels.
HELD_OUT = {
    "CLEVRClassification": "val", "EMNIST": "balanced", "Imagenette": "val", "ImageNet": "val", "INaturalist": "2021_valid",
    "Places365": "val",
}  # fmt: skip
# Modules of torchvision.datasets whose items are not images with one label each.
OTHERS = (
    "_optical_flow", "_stereo_matching", "celeba", "cityscapes", "coco", "fakedata", "flickr", "folder", "hmdb51", "kinetics",
    "kitti", "lsun", "moving_mnist", "phototour", "sbd", "sbu", "ucf101", "vision", "voc", "widerface",
)  # fmt: skip
SPLIT_KEYS = ("split", "version")  # parameters of the classes for the split
LABELS = ("targets", "_labels", "labels", "y")  # attributes of the classes with labels
SAMPLES = ("_samples", "samples")  # attributes with tuples that end with a label
NAMES = ("classes", "categories")  # attributes with class names


def from_torchvision(data: LabeledDataConfig, where: str, split: str | None = None) -> LabeledImages:
    """Return a classification dataset of torchvision in `data.root`.

    Class names are those of torchvision with `_` as a space; custom names are in the order of the labels.

    Args:
        data: configuration of the data.
        where: key of the data, for messages.
        split: split to use if `data.split` is None: "train", or None for the test split.
    """
    given, known = str(data.torchvision), _all_names()
    if given.lower() not in known:
        raise ConfigError(
            f"{where}.torchvision={given} is not a classification dataset of torchvision.datasets: {nearest(given.lower(), known)}"
        )
    name = known[given.lower()]
    if data.root is None:
        raise ConfigError(f"{where}.root has no value: give the folder of {name}, or the folder to download it to.")
    root = Path(data.root).expanduser().resolve()
    if not root.is_dir() and not data.download:
        raise ConfigError(f"{where}.root={root}: no such folder. To download {name} into it: {where}.download=true.")
    import torchvision.datasets

    cls = getattr(torchvision.datasets, name)
    arguments, part = _arguments(cls, data.split, split, where)
    dataset, about = _make(cls, {"root": str(root), **arguments}, part, data.download, where)
    # Two datasets list files in the order of the file system, which differs between machines.
    if name == "SUN397":
        pairs = sorted(zip(dataset._image_files, dataset._labels, strict=True))
        dataset._image_files, dataset._labels = [path for path, _ in pairs], [label for _, label in pairs]
    elif name == "INaturalist":
        dataset.index.sort()
    title = f"{name}/{part}" if part else name
    labels = _labels(dataset, title, where)
    keys, names = _classes(dataset, labels, data, where)
    data_name = f"torchvision's {title} in {root}"
    matched = match(list(keys.values()), names, data.classes, data_name, where)
    return LabeledImages(
        TorchvisionImages(dataset, title, root),
        [matched.position[keys[label]] for label in labels],
        matched.names,
        data_name,
        matched.keys,
        imagenet=matched.imagenet,
        about={"split": part, "torchvision": torchvision.__version__, **about},
    )


@cache
def _all_names() -> dict[str, str]:
    """Return the classification datasets of torchvision.datasets by lowercase name, without importing it."""
    source = (package_folder("torchvision") / "datasets/__init__.py").read_text(encoding="utf-8")
    imports = [
        node for node in ast.parse(source).body if isinstance(node, ast.ImportFrom) and node.module not in OTHERS
    ]
    names = [alias.name for node in imports for alias in node.names if alias.name != "LFWPairs"]
    return {name.lower(): name for name in names}


def _parameters(cls: type) -> dict[str, inspect.Parameter]:
    """Return the parameters of the constructor, and of the base constructors that get its keyword arguments."""
    found: dict[str, inspect.Parameter] = {}
    for base in cls.__mro__:
        if "__init__" in vars(base):
            own = inspect.signature(base.__init__).parameters  # type: ignore[misc] # of this class only
            found = {**own, **found}
            if not any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in own.values()):
                break
    return found


def _arguments(cls: type, requested: str | None, default: str | None, where: str) -> tuple[dict[str, Any], str | None]:
    """Return the arguments that select a split, and its name for messages; None if the dataset has no splits."""
    parameters = _parameters(cls)
    key = next((key for key in SPLIT_KEYS if key in parameters), None)
    training = default == "train"
    if key is not None:
        own = parameters[key].default
        train = own if isinstance(own, str) and "train" in own else "train"
        held_out = HELD_OUT.get(cls.__name__, "test")
        divided_otherwise = "train" in parameters  # `split` of EMNIST is one of its variants
        part = requested or (train if training and not divided_otherwise else held_out)
        arguments: dict[str, Any] = {key: part}
        if divided_otherwise:
            arguments["train"] = training
            part = f"{part}/{'train' if training else 'test'}"
    elif "train" in parameters:
        part = requested or ("train" if training else "test")
        if part not in ("train", "test"):
            raise ConfigError(f"{where}.split={part} must be train or test for {cls.__name__}.")
        arguments = {"train": part == "train"}
    elif requested or training:
        raise ConfigError(f"{where}: torchvision's {cls.__name__} has no splits, such as {requested or default}.")
    else:
        return {}, None
    return arguments, part


def _make(
    cls: type, arguments: dict[str, Any], part: str | None, download: bool, where: str
) -> tuple[Any, dict[str, Any]]:
    """Return the dataset and evaluation settings about its files. Existing files are not downloaded again."""
    name, root, can_fetch = cls.__name__, arguments["root"], "download" in _parameters(cls)
    try:
        return cls(**arguments, **({"download": False} if can_fetch else {})), {}
    except (RuntimeError, OSError) as error:
        problem = " ".join(str(error).split()).partition(" You can use download=True")[0].rstrip(".")
    except Exception as error:  # the classes raise various errors for damaged files
        if isinstance(error, ValueError) and str(error).startswith("Unknown value"):
            raise ConfigError(f"{where}.split={part}: {error}") from error
        raise DataError(f"{where}: {name} in {root} cannot be read ({type(error).__name__}: {error}).") from error
    if not download:
        if (repacked := _repacked(cls, arguments, where)) is not None:
            return repacked
        fetch = f"To download it: {where}.download=true." if can_fetch else "torchvision cannot download it."
        raise ConfigError(f"{where}.root={root}: torchvision does not find {name} there ({problem}). {fetch}")
    if not can_fetch:
        raise ConfigError(f"{where}.download: torchvision cannot download {name} ({problem}).")
    try:
        return cls(**arguments, download=True), {}
    except Exception as error:  # errors of the network, the archive or the disk
        raise DataError(
            f"{where}: {name} could not be downloaded to {root} ({type(error).__name__}: {error})."
        ) from error


def _repacked(cls: Any, arguments: dict[str, Any], where: str) -> tuple[Any, dict[str, Any]] | None:
    """Return CIFAR from files with other checksums, read by `data.cifar`; None if the files do not exist."""
    if cls.__name__ not in ("CIFAR10", "CIFAR100"):
        return None
    folder = Path(arguments["root"]) / cls.base_folder
    known = dict(cls.train_list if arguments["train"] else cls.test_list)
    meta = folder / cls.meta["filename"]
    if not all((folder / file).is_file() for file in known) or not meta.is_file():
        return None
    try:
        part = read_cifar([folder / file for file in known], meta, cls.meta["key"])
        changed = []
        for file, md5 in known.items():
            with open(folder / file, "rb") as stream:
                found = hashlib.file_digest(stream, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
            changed += [file] if found != md5 else []
    except (ValueError, OSError) as error:
        raise DataError(f"{where}: {error}. To download {cls.__name__} again: {where}.download=true.") from error
    if changed:
        log.warning(
            "%s: files in %s have other checksums than in torchvision: only images and labels are read.", where, folder
        )
    return CifarImages(part, folder), ({"files_with_other_checksum": changed} if changed else {})


def _labels(dataset: Any, title: str, where: str) -> list[int]:
    """Return the labels, from an attribute of the dataset if possible, else by reading every item."""
    refused = f"{where}: items of torchvision's {title} are not images with one label each"
    if not len(dataset):
        raise DataError(f"{where}: torchvision's {title} has no images.")
    found = [getattr(dataset, name) for name in LABELS if hasattr(dataset, name)]
    found += [[sample[-1] for sample in getattr(dataset, name)] for name in SAMPLES if hasattr(dataset, name)]
    for labels in map(np.asarray, found):
        if labels.shape == (len(dataset),) and labels.dtype.kind in "iu":
            return labels.tolist()
    labels_read: list[int] = []
    with progress(len(dataset), f"{title}: labels") as advance:
        for index in range(len(dataset)):
            try:
                image, label = dataset[index]
                image.close()  # some classes open the file without decoding it
                labels_read.append(int(label))
            except Exception as error:  # items may have any form
                raise DataError(
                    f"{refused} ({type(error).__name__}: {error}). Choose another split or dataset."
                ) from error
            advance(1)
    return labels_read


def _classes(dataset: Any, labels: list[int], data: LabeledDataConfig, where: str) -> tuple[dict[int, str], list[str]]:
    """Return the key of each label, and the class names in the order of the labels."""
    own = next((getattr(dataset, name) for name in NAMES if hasattr(dataset, name)), None)
    if own is None:
        numbers = {label: str(label) for label in sorted(set(labels))}
        if data.classes == "labels":
            raise ConfigError(
                f"{where}: torchvision has no names for the {len(numbers)} classes of {data.torchvision}: give names in "
                f"the order of the labels, {where}.classes=[…]."
            )
        return numbers, list(numbers.values())
    own = list(own)
    if min(labels) < 0 or max(labels) >= len(own):
        raise DataError(f"{where}: {data.torchvision} has images without a label. Choose another split.")
    index_of = getattr(dataset, "class_to_idx", {})
    if wrong := [name for index, name in enumerate(own) if index_of.get(name, index) != index]:
        raise DataError(f"{where}: {data.torchvision} has contradictory labels for {wrong[0]}.")
    names = [name if isinstance(name, str) else name[0] for name in own]  # ImageNet has several names per class
    keys = [str(key) for key in getattr(dataset, "wnids", names)]
    return dict(enumerate(keys)), [name.replace("_", " ") for name in names]
