"""Safe reader for the original files of CIFAR-10 and CIFAR-100, which are pickles. Does not import torch.

A pickle can call any function. torchvision loads only files with known checksums. This reader also reads subsets and
repacked copies, because it restricts a pickle to arrays, strings, numbers and collections.
"""

import pickle
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

SIDE = 32  # pixels
LABELS = ("labels", "fine_labels")
_ALLOWED = {
    ("_codecs", "encode"),
    ("numpy", "dtype"),
    ("numpy", "ndarray"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy.core.multiarray", "scalar"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "scalar"),
}


class CifarPart(NamedTuple):
    """Images and labels of one or more files."""

    pixels: np.ndarray  # uint8 [N, 32, 32, 3]
    labels: list[int]
    classes: list[str]


class CifarImages:
    """Data set like those of torchvision: an item is an image and its label."""

    def __init__(self, part: CifarPart, folder: Path) -> None:
        self.pixels, self.targets, self.classes = part
        self.folder = str(folder)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.pixels[index]), self.targets[index]


def read_cifar(files: list[Path], meta: Path, classes_key: str) -> CifarPart:
    """Read images, labels and class names.

    Args:
        files: pickled dictionaries with `data`, uint8 [n, 3072], and `labels` or `fine_labels`.
        meta: pickled dictionary with the list of class names.
        classes_key: key of that list.
    Raises:
        ValueError: a file has another content, or its pickle calls a function; the message names the file.
        OSError: a file cannot be read.
    """
    names = _read(meta).get(classes_key)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{meta} has no list {classes_key!r}")
    pixels: list[np.ndarray] = []
    labels: list[int] = []
    for file in files:
        content = _read(file)
        data = content.get("data")
        if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.shape[1:] != (3 * SIDE * SIDE,):
            raise ValueError(f"{file} has no uint8 array 'data' of shape [n, {3 * SIDE * SIDE}]")
        label_N = np.asarray(next((content[key] for key in LABELS if key in content), None))
        is_whole = label_N.shape == (len(data),) and label_N.dtype.kind in "iu"
        if not is_whole or not np.isin(label_N, range(len(names))).all():
            raise ValueError(f"{file} must have a label from 0 to {len(names) - 1} for each of its {len(data)} images")
        pixels.append(np.ascontiguousarray(data.reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1)))
        labels += label_N.tolist()
    return CifarPart(np.concatenate(pixels), labels, names)


def _read(file: Path) -> dict[str, Any]:
    with open(file, "rb") as stream:
        try:
            content = _Restricted(stream, encoding="latin1").load()
        except OSError:
            raise
        except Exception as error:  # a damaged pickle may raise anything
            raise ValueError(f"{file} cannot be read: {error or type(error).__name__}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} does not contain a dictionary")
    return content


class _Restricted(pickle._Unpickler):
    """Unpickler for arrays, strings, numbers and collections that refuses every other function and class.

    It extends the unpickler written in Python, because in the C version, ten bytes can allocate a table of gigabytes.
    """

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise ValueError(f"the pickle calls {module}.{name}, which is not allowed")
        return super().find_class(module, name)
