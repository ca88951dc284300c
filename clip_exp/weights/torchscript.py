"""Weights out of a TorchScript archive, the form that OpenAI published CLIP in, without running the program in it.

Such an archive is a zip: `data.pkl` holds the tree of modules as a pickle, `data/` the numbers, `code/` a program. The
pickle is read by an unpickler that knows tensors and nothing else: a class of the program becomes an inert record of its
attributes, and whatever else the pickle asks for is refused. `code/` is never read.
"""

import math
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from functools import partial
from io import BytesIO
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from clip_exp.errors import CheckpointError

DTYPES = {
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "ByteStorage": torch.uint8,
    "CharStorage": torch.int8,
    "ShortStorage": torch.int16,
    "IntStorage": torch.int32,
    "LongStorage": torch.int64,
    "BoolStorage": torch.bool,
}
LISTS = ("build_intlist", "build_doublelist", "build_boollist", "build_tensorlist", "restore_type_tag")
MAX_MODULES = 100_000  # ten times those of the largest models; a pickle can claim any number in a few bytes
MAX_DEPTH = 50


def read_torchscript(path: Path) -> dict[str, Tensor]:
    """Every tensor of an archive's modules under its dotted name, in the file's dtype.

    Raises:
        CheckpointError: damaged, or its pickle holds something other than modules and tensors.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            records = _Records(archive)
            stored = _flatten(_Unpickler(records.read("data.pkl")).load())
            return {name: records.tensor(tensor) for name, tensor in stored.items()}
    except _Refused as error:
        raise CheckpointError(
            f"{path}: refused, because its pickle asks for {error}, which is no weight and could run code. "
            "Fetch the file again from where it was published."
        ) from error
    except Exception as error:  # a damaged pickle can break the unpickler in any way
        raise CheckpointError(f"{path}: not a readable TorchScript archive ({error}). Fetch it again.") from error


class _Refused(pickle.UnpicklingError):
    """The pickle names something that weights do not need."""


class _Storage(NamedTuple):
    """Where a tensor's numbers are: the record `data/<key>`."""

    key: str
    dtype: torch.dtype
    numel: int


class _Stored(NamedTuple):
    """A tensor that has not been read yet."""

    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


class _Module:
    """A module of the archive: its attributes by name, without its program."""

    attributes: Mapping[str, Any] = MappingProxyType({})

    def __setstate__(self, state: Any) -> None:
        self.attributes = state if isinstance(state, dict) else {}


def _stored(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> _Stored:
    return _Stored(storage, offset, size, stride)


def _first(value: Any, *_: Any) -> Any:
    return value


class _Unpickler(pickle._Unpickler):
    """Modules as records, tensors as where they are stored.

    Python's own form of the unpickler: in the faster one a pickle of ten bytes can ask for a table of gigabytes.
    Each name gets a class or function object of its own, since a pickle may set attributes of what it has been given.
    """

    def __init__(self, data: bytes) -> None:
        super().__init__(BytesIO(data))

    def find_class(self, module: str, name: str) -> Any:
        if module.partition(".")[0] == "__torch__":
            return type("Module", (_Module,), {})
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return partial(_stored)
        if (module, name) == ("torch._utils", "_rebuild_parameter") or (
            module == "torch.jit._pickle" and name in LISTS
        ):
            return partial(_first)
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch" and name in DTYPES:
            return DTYPES[name]
        raise _Refused(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, _device, numel = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype) or not isinstance(key, str):
            raise pickle.UnpicklingError("a reference to something other than numbers")
        return _Storage(key, dtype, int(numel))


class _Records:
    """The archive's records by name below its one top folder."""

    def __init__(self, archive: zipfile.ZipFile) -> None:
        self.archive = archive
        self.members = {info.filename.partition("/")[2]: info for info in archive.infolist()}
        self.storages: dict[_Storage, Tensor] = {}

    def read(self, name: str) -> bytes:
        info = self.members[name]
        if info.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"its record {name} is compressed, as torch never writes it")
        return self.archive.read(info)

    def tensor(self, stored: _Stored) -> Tensor:
        if stored.storage not in self.storages:
            self.storages[stored.storage] = self._storage(stored.storage)
        numbers = self.storages[stored.storage]
        # as_strided checks the bounds; without this a stride of 0 would make a tensor of any size out of one number
        if math.prod(stored.size) > len(numbers):
            raise ValueError(f"a tensor of shape {list(stored.size)} over {len(numbers)} numbers")
        return numbers.as_strided(stored.size, stored.stride, stored.offset)

    def _storage(self, storage: _Storage) -> Tensor:
        data = self.read(f"data/{storage.key}")
        if len(data) != storage.numel * storage.dtype.itemsize:
            raise ValueError(f"its record data/{storage.key} has {len(data)} bytes for {storage.numel} {storage.dtype}")
        return torch.frombuffer(bytearray(data), dtype=storage.dtype) if data else torch.empty(0, dtype=storage.dtype)


def _flatten(root: Any) -> dict[str, _Stored]:
    """The tensors of a tree of modules by their dotted names."""
    if not isinstance(root, _Module):
        raise TypeError("it holds no module")
    found: dict[str, _Stored] = {}
    waiting: list[tuple[str, _Module]] = [("", root)]
    for _ in range(MAX_MODULES):
        if not waiting:
            return found
        prefix, module = waiting.pop()
        for name, value in module.attributes.items():
            if isinstance(value, _Module):
                waiting.append((f"{prefix}{name}.", value))
            elif isinstance(value, _Stored):
                found[f"{prefix}{name}"] = value
        if prefix.count(".") > MAX_DEPTH:
            break
    raise ValueError("its modules are nested without end")
