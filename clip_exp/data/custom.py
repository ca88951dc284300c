"""A user's Dataset as the source of training or validation pairs.

The object that `data._target_` names has `__len__` and `__getitem__`, as PyTorch's map-style data sets. An item is a
mapping, dataclass or named tuple with the fields `image`, `caption` or `captions`, and optionally `label` and those of
`data.columns`; or a tuple (image, caption) or (image, caption, label). Every item is checked when it is read, and
errors of the user's code are reported with the index and the user's line.

An item is read once per sample. The global random generators of Python, NumPy and PyTorch are seeded for the time of
the call by (seed, epoch, row), so random numbers in `__getitem__` do not depend on workers, ranks and restarts.

This module imports torch only when it reads an item.
"""

import dataclasses
import hashlib
import json
import logging
import multiprocessing
import os
import pickle
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from clip_exp.config.base import Target
from clip_exp.config.data import Captions
from clip_exp.config.targets import failure, instantiate, locate, parameters_of
from clip_exp.data.files import (
    CANNOT_OPEN,
    EMPTY_FILE,
    NOT_AN_IMAGE,
    TOO_MANY_BYTES,
    TOO_MANY_PIXELS,
    BadImage,
    ImageLimits,
    bad_image,
    read_file,
    reason_of,
    unopened,
)
from clip_exp.data.pairs import Item, Pair, RawImage, bytes_of, caption_number, int64_hash
from clip_exp.data.randomness import hash64, seeded
from clip_exp.data.tables.features import Shape, describe, numbers_of
from clip_exp.data.tables.table import Part
from clip_exp.errors import ClipExpError, ConfigError, DataError, SampleError

log = logging.getLogger(__name__)

TRIED = 20  # items, to find one that can be read
EXPECTED = (
    "a mapping with the keys image and caption (or captions), or a tuple (image, caption) or (image, caption, label)"
)
IMAGES = (
    "a PIL image, a path, the bytes of an image file, a uint8 tensor [3, H, W] or a uint8 array [H, W, 3], before any "
    "normalization"
)
GUIDE = "docs/extending.md describes what a data set returns."
# Multiplied by the index of an image, so that captions have distinct numbers although images may have any number.
_MAX_CAPTIONS = 1 << 24
# First integers of random keys, so that different uses of one seed are independent.
_ITEM, _VALIDATION = 15, 16


class ItemError(SampleError):
    """Error raised for an item of a user's data set that is not valid, or that could not be created."""


class Content(NamedTuple):
    """Checked item."""

    image: RawImage
    captions: list[str]
    label: Any
    fields: Mapping[str, Any]  # all fields by name; empty for a tuple


def open_dataset(
    node: Target,
    where: str,
    *,
    max_items: int | None = None,
    shared: Mapping[str, Any] | None = None,
    num_workers: int | None = None,
) -> "UserDataset":
    """Create a user's data set and check what can be checked without reading an item.

    Args:
        node: class and arguments.
        where: key of the node, `data` or `data.val`, for messages.
        max_items: number of items to use, from the start; None: all.
        shared: values for required parameters that the node does not set.
        num_workers: `data.num_workers`.

    Raises:
        ConfigError: the object cannot be created, is not a map-style data set, is empty, cannot be sent to worker
            processes, or has an invalid `fingerprint` or `classes`.
    """
    name = node.target
    parameters = parameters_of(locate(name, where)) or {}
    required = {key for key, parameter in parameters.items() if parameter.default is parameter.empty}
    optional = {key: value for key, value in (shared or {}).items() if key in required}
    dataset = _of_data_module(instantiate(node, where, optional=optional), name, where)
    _require_map_style(dataset, name, where)
    opened = UserDataset(dataset, name, where, max_items)
    if num_workers != 0 and multiprocessing.get_start_method() != "fork":
        try:
            pickle.dumps(dataset)
        except Exception as error:
            raise ConfigError(
                f"{where}._target_={name} cannot be pickled for worker processes ({reason_of(error)}): open files and connections in "
                "__getitem__ instead of __init__, or set data.num_workers=0."
            ) from error
    return opened


def _of_data_module(created: Any, name: str, where: str) -> Any:
    """Return the data set of a LightningDataModule's loader, and warn about what is not used; other objects unchanged.

    Raises: ConfigError if the module fails, or its loader has no single data set.
    """
    # By name, because Lightning has two packages with this class.
    if not any(base.__name__ == "LightningDataModule" for base in type(created).__mro__):
        return created
    loader_name = "val_dataloader" if where == "data.val" else "train_dataloader"
    try:
        created.prepare_data()
        created.setup("fit")
        loader = getattr(created, loader_name)()
    except (ClipExpError, MemoryError):
        raise
    except Exception as error:
        raise ConfigError(f"{where}._target_={name}: the LightningDataModule failed: {failure(error)}") from error
    if not hasattr(loader, "dataset"):
        raise ConfigError(
            f"{where}._target_={name}: {loader_name} returned {_kind(loader)}, but a DataLoader with one data set is needed: name the "
            "Dataset itself."
        )
    log.warning(
        "%s._target_=%s is a LightningDataModule: the data set of its %s is read in the order of clip_exp's own stream. Its sampler, batch "
        "size, collate function and hooks are not used.",
        where,
        name,
        loader_name,
    )
    return loader.dataset


def _require_map_style(dataset: Any, name: str, where: str) -> None:
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(dataset, torch.utils.data.IterableDataset):
        raise ConfigError(
            f"{where}._target_={name} is an IterableDataset. A stream without positions can neither be resumed at the same sample nor "
            "divided among ranks and workers: write its samples to shards and read them (data=csv data.train=shards.tar), or give it "
            "__len__ and __getitem__ as a map-style Dataset."
        )
    if not (hasattr(type(dataset), "__len__") and hasattr(type(dataset), "__getitem__")):
        raise ConfigError(
            f"{where}._target_={name} creates {_kind(dataset)}, which has no __len__ or no __getitem__: name a map-style "
            "Dataset, or add these methods."
        )


class UserDataset:
    """A user's data set, as the origin of a run's pairs.

    Args:
        dataset: object with `__len__` and `__getitem__`.
        name: full name of its class or function.
        where: its key, for messages.
        max_items: number of items to use, from the start; None: all.

    Raises:
        ConfigError: the data set is empty, or its `fingerprint` is not a JSON value.
    """

    parts: tuple[Part, ...] = ()
    skipped = 0
    empty_captions = 0

    def __init__(self, dataset: Any, name: str, where: str, max_items: int | None = None) -> None:
        self.dataset, self.name, self.where = dataset, name, where
        items = self._ask("__len__", lambda: len(dataset))
        if items < 1:
            raise ConfigError(f"{where}._target_={name} has no items (len() is {items}): check its arguments.")
        self._items = min(items, max_items or items)
        content = getattr(dataset, "fingerprint", None)
        content = self._ask("fingerprint", content) if callable(content) else content
        self.verified = content is not None
        try:
            text = json.dumps([items, content], sort_keys=True, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"{where}._target_={name}: fingerprint is not a value that JSON can represent ({error}): return texts, numbers, "
                "lists or dictionaries."
            ) from error
        self._fingerprint = {name: {"rows": self._items, "digest": hashlib.sha256(text.encode()).hexdigest()}}

    def __len__(self) -> int:
        return self._items

    @property
    def source(self) -> str:
        return f"{self.name} and its arguments ({self.where})"

    def read(self, index: int, key: tuple[int, ...], limits: ImageLimits) -> Content:
        """Read and check an item.

        Args:
            index: position of the item.
            key: integers that the random numbers of the user's code depend on.
            limits: allowed sizes of images.

        Raises:
            BadImage: the image cannot be used: it is missing, too large, or the user's code raised an OSError.
            ItemError: the item is not valid, or the user's code raised another exception.
        """
        with seeded(hash64(_ITEM, *key)):
            try:
                item = self.dataset[index]
            except (BadImage, MemoryError):
                raise
            except Image.UnidentifiedImageError as error:
                raise BadImage(NOT_AN_IMAGE) from error
            except Image.DecompressionBombError as error:
                raise BadImage(f"{TOO_MANY_PIXELS}: {reason_of(error)}") from error
            except OSError as error:
                text = unopened(error) if error.errno is not None else f"{CANNOT_OPEN}: {reason_of(error)}"
                raise BadImage(text) from error
            except Exception as error:
                raise ItemError(f"{self._at(index)} failed: {failure(error)}") from error
        fields = _named_fields(item)
        image, captions, label = self._parts(index, item, fields)
        return Content(self._image(index, image, limits), self._captions(index, captions), label, fields or {})

    def captions_of(self, index: int) -> int:
        """Return the number of captions of an item, from the method `num_captions`.

        Raises: ConfigError if there is no such method, or it does not return a number of at least 1.
        """
        method = getattr(self.dataset, "num_captions", None)
        if method is None:
            raise ConfigError(
                f"data.captions=all needs the number of captions of each item before it is read: add the method num_captions(index) to "
                f"{self.name}, or use data.captions=random."
            )
        count = self._ask("num_captions", lambda: method(index))
        if not isinstance(count, int | np.integer) or count < 1:
            raise ConfigError(f"{self.name}.num_captions({index}) returned {count!r}: return an integer of at least 1.")
        return int(count)

    def read_image(self, row: int, limits: ImageLimits) -> RawImage:
        return self.read(row, (0, 0, row), limits).image

    def location(self, row: int) -> str:
        return self._at(row)

    def remedy(self, row: int, reason: str) -> str:
        return f"Check the arguments of {self.name}. Relative paths start from the working directory, {os.getcwd()}."

    def unreadable(self, row: int, reason: str, setting: str) -> str:
        return f"The image of {self._at(row)} cannot be read: {reason}. Repair it, or continue without such images: {setting}."

    def fingerprint(self) -> dict[str, dict[str, Any]]:
        """Return `rows` and `digest` of the data set by its name.

        The digest is that of the length and of what the data set's `fingerprint` returns, not of the items.
        """
        return self._fingerprint

    def fraction_in(self, other: object) -> float:
        """Return 1 if another data set has the same class and `fingerprint`, else 0: items are not compared."""
        same = isinstance(other, UserDataset) and self.verified and other._fingerprint == self._fingerprint
        return float(same)

    def _at(self, index: int) -> str:
        return f"{self.name}[{index}]"

    def _ask(self, method: str, call: Any) -> Any:
        try:
            return call()
        except MemoryError:
            raise
        except Exception as error:
            raise ConfigError(f"{self.where}._target_={self.name}: {method} failed: {failure(error)}") from error

    def column(self, index: int, name: str, fields: Mapping[str, Any]) -> str | np.ndarray:
        """Return the value of a further field of an item: a text, or float32 numbers.

        Raises: ItemError if the item has no such field, or its value is neither a text nor numbers.
        """
        if name not in fields:
            found = ", ".join(map(str, fields)) or "none, as it is a tuple"
            raise ItemError(f"{self._at(index)} has no field {name!r} (data.columns): its fields are {found}. {GUIDE}")
        value = fields[name]
        if isinstance(value, str):
            return str(value)
        try:
            return numbers_of(value.detach().cpu().numpy() if hasattr(value, "detach") else value)
        except (TypeError, ValueError) as error:
            raise ItemError(
                f"{self._at(index)}: {name!r} (data.columns) is {error}, but it must be a string, a finite number, or numbers."
            ) from error

    def _parts(self, index: int, item: Any, fields: Mapping[str, Any] | None) -> tuple[Any, Any, Any]:
        """Return the image, the captions and the label of an item."""
        if fields is None:
            if isinstance(item, tuple | list) and len(item) in (2, 3):
                image, captions, *label = item
                return image, captions, label[0] if label else None
            raise ItemError(f"{self._at(index)} returned {_kind(item)}, but an item must be {EXPECTED}. {GUIDE}")
        captions = [key for key in ("caption", "captions") if key in fields]
        if "image" not in fields or len(captions) != 1:
            keys = ", ".join(map(str, fields)) or "none"
            raise ItemError(f"{self._at(index)} has the keys {keys}, but an item must be {EXPECTED}. {GUIDE}")
        return fields["image"], fields[captions[0]], fields.get("label")

    def _captions(self, index: int, captions: Any) -> list[str]:
        texts = [captions] if isinstance(captions, str) else captions
        if not isinstance(texts, list | tuple) or not texts or not all(isinstance(text, str) for text in texts):
            found = "an empty list" if isinstance(texts, list | tuple) and not texts else _kind(captions)
            raise ItemError(
                f"{self._at(index)} has {found} as caption, but it must be a string or a list of strings. {GUIDE}"
            )
        return list(texts)

    def _image(self, index: int, image: Any, limits: ImageLimits) -> RawImage:
        """Return an image in a form that can be decoded."""
        if isinstance(image, str | os.PathLike):
            return read_file(os.fspath(image), limits)
        if isinstance(image, bytes | bytearray | memoryview):
            data = bytearray(image)
            if not data:
                raise BadImage(EMPTY_FILE)
            if len(data) > limits.max_bytes:
                raise BadImage(f"{TOO_MANY_BYTES}: {len(data)}, more than max_image_bytes={limits.max_bytes}")
            return data
        if isinstance(image, Image.Image):
            _check_pixels(*image.size, limits)
            try:
                image.load()
            except Exception as error:
                raise bad_image(error) from error
            return image
        torch = sys.modules.get("torch")
        pixels_HWC = image
        if torch is not None and isinstance(image, torch.Tensor):
            pixels_HWC = (
                image.permute(1, 2, 0).cpu().numpy() if image.ndim == 3 and image.dtype == torch.uint8 else None
            )
        if not isinstance(pixels_HWC, np.ndarray) or pixels_HWC.dtype != np.uint8 or pixels_HWC.shape[2:] != (3,):
            raise ItemError(f"{self._at(index)} has {_kind(image)} as image, but it must be {IMAGES}. {GUIDE}")
        _check_pixels(pixels_HWC.shape[1], pixels_HWC.shape[0], limits)
        return pixels_HWC


class DatasetRows:
    """Items of a user's data set in the training stream.

    With `captions=random`, every item is a row, and one of its captions is drawn in each epoch. With `all`, every
    caption is a row.

    Args:
        origin: the data set.
        captions: `data.captions`.
        columns: names of the further fields of items for the loss. The first item that can be read decides about their
            kinds and shapes.

    Raises:
        ConfigError: the number of captions is needed and not available (`UserDataset.captions_of`).
        ItemError: the first item is not valid.
    """

    in_shards = False

    def __init__(self, origin: UserDataset, captions: Captions, columns: Sequence[str] = ()) -> None:
        self.origin, self.images = origin, len(origin)
        self.shapes: dict[str, Shape] = {}
        if columns:
            index, fields = self._first()
            self.shapes = {name: _shape(origin.column(index, name, fields)) for name in columns}
        # Number of captions up to and including each item; None: an item is a row
        self._ends: np.ndarray | None = None
        if captions is Captions.all:
            self._ends = np.cumsum([origin.captions_of(index) for index in range(len(origin))], dtype=np.int64)

    def __len__(self) -> int:
        return self.images if self._ends is None else int(self._ends[-1])

    def load(self, row: int, seed: int, epoch: int, limits: ImageLimits) -> Pair:
        index = self._index(row)
        content = self.origin.read(index, (seed, epoch, row), limits)
        captions = content.captions
        if self._ends is None:
            number = caption_number(row, seed, epoch, len(captions))
        else:
            first = int(self._ends[index - 1]) if index else 0
            number, expected = row - first, int(self._ends[index]) - first
            if len(captions) != expected:
                raise ItemError(
                    f"{self.image_name(row)} has {len(captions)} captions, but num_captions({index}) returned {expected}: "
                    "return the number of captions of the item."
                )
        columns = {name: self._column(index, name, content.fields) for name in self.shapes}
        return Pair(content.image, captions[number], image_id(content.image), columns)

    def caption(self, row: int, seed: int, epoch: int) -> None:
        """Return None: an item has its caption and its image."""

    def image_name(self, row: int) -> str:
        return self.origin.location(self._index(row))

    def unreadable(self, row: int, reason: str, setting: str) -> str:
        return self.origin.unreadable(self._index(row), reason, setting)

    def _column(self, index: int, name: str, fields: Mapping[str, Any]) -> str | np.ndarray:
        value = self.origin.column(index, name, fields)
        if _shape(value) != self.shapes[name]:
            raise ItemError(
                f"{self.origin.location(index)}: {name!r} (data.columns) has {describe(_shape(value))}, but the first item has "
                f"{describe(self.shapes[name])}: return values of one kind and shape."
            )
        return value

    def _first(self) -> tuple[int, Mapping[str, Any]]:
        """Return the first item that can be read, and its fields."""
        for index in range(min(TRIED, len(self.origin))):
            with suppress(BadImage):
                return index, self.origin.read(index, (0, 0, index), ImageLimits()).fields
        raise DataError(
            f"data.columns: none of the first {TRIED} items of {self.origin.name} can be read: check its arguments."
        )

    def _index(self, row: int) -> int:
        return row if self._ends is None else int(np.searchsorted(self._ends, row, side="right"))


class DatasetItems:
    """Items of a user's data set as validation images.

    The names of the classes are the attribute `classes` of the data set, and the label of an item is one of these names
    or its position. Without `classes`, labels are ignored.

    Raises: ConfigError if `classes` is not a sequence of distinct strings.
    """

    def __init__(self, origin: UserDataset) -> None:
        self.origin, self.origins = origin, [origin]
        names = getattr(origin.dataset, "classes", None)
        names = [] if names is None else list(names)
        if not all(isinstance(name, str) for name in names) or len(set(names)) < len(names):
            raise ConfigError(
                f"{origin.where}._target_={origin.name}: classes must be a list of distinct class names, for example "
                '["cat", "dog"].'
            )
        self.class_names: list[str] = names
        self._position = {name: position for position, name in enumerate(names)}

    def __len__(self) -> int:
        return len(self.origin)

    def load(self, index: int, limits: ImageLimits) -> Item:
        content = self.origin.read(index, (_VALIDATION, 0, index), limits)
        captions = content.captions
        first = index * _MAX_CAPTIONS
        return Item(content.image, captions, [*range(first, first + len(captions))], self._label(index, content.label))

    def image_name(self, index: int) -> str:
        return self.origin.location(index)

    def unreadable(self, index: int, reason: str, setting: str) -> str:
        return self.origin.unreadable(index, reason, setting)

    def _label(self, index: int, label: Any) -> int:
        """Return the class of an item, -1 for none."""
        if label is None or not self.class_names:
            return -1
        if isinstance(label, str):
            position = self._position.get(label, -1 if not label.strip() else None)
        else:
            number = label.item() if hasattr(label, "item") and getattr(label, "ndim", 0) == 0 else label
            position = number if isinstance(number, int) and -1 <= number < len(self.class_names) else None
        if position is None:
            raise ItemError(
                f"{self.origin.location(index)} has the label {label!r}, but it must be one of the {len(self.class_names)} names in "
                f"{self.origin.name}.classes, or a position in it; -1 or null for no class."
            )
        return position


def image_id(image: RawImage) -> int:
    """Return an int64 that is equal for images with equal content."""
    if isinstance(image, Image.Image):
        # The pixels of a palette image are positions in its palette.
        form: tuple[Any, ...] = (image.mode, image.size, image.getpalette() if image.mode == "P" else None)
    else:
        form = image.shape if isinstance(image, np.ndarray) else ()
    return int64_hash(repr(form).encode(), bytes_of(image))


def _shape(value: str | np.ndarray) -> Shape:
    return None if isinstance(value, str) else value.shape


def _named_fields(item: Any) -> Mapping[str, Any] | None:
    """Return the fields of a mapping, a dataclass or a named tuple with a field `image`; None for other items."""
    if isinstance(item, Mapping):
        return item
    if dataclasses.is_dataclass(item) and not isinstance(item, type):
        return {field.name: getattr(item, field.name) for field in dataclasses.fields(item)}
    if isinstance(item, tuple) and "image" in (names := getattr(item, "_fields", ())):
        return dict(zip(names, item, strict=True))
    return None


def _check_pixels(width: int, height: int, limits: ImageLimits) -> None:
    if not width * height:
        raise BadImage(f"{EMPTY_FILE}: {width} x {height} pixels")
    if width * height > limits.max_pixels:
        raise BadImage(f"{TOO_MANY_PIXELS}: {width} x {height} pixels, more than max_image_pixels={limits.max_pixels}")


def _kind(value: Any) -> str:
    """Return the type of a value, with what tells why it is not valid."""
    if value is None:
        return "None"
    name = type(value).__name__
    if isinstance(value, tuple | list):
        inner = ", ".join(type(each).__name__ for each in value[:4]) + (", …" if len(value) > 4 else "")
        return f"a {name} of {len(value)} values ({inner})" if value else f"an empty {name}"
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        return f"a {str(value.dtype).removeprefix('torch.')} {name} {list(value.shape)}"
    return f"a value of type {name}"
