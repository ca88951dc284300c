"""Reading of weights from TorchScript archives, the format of OpenAI's CLIP, without executing the program in them.

An archive is a zip file: `data.pkl` contains the tree of modules as a pickle, `data/` the values, and `code/` a
program. The pickle is read by an unpickler that supports only tensors: a class of the program becomes a record of its
attributes, and all other objects are refused. `code/` is never read.
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
# Ten times the number of modules in the largest models; a pickle of a few bytes can expand to any number
MAX_MODULES = 100_000
MAX_DEPTH = 50


def read_torchscript(path: Path) -> dict[str, Tensor]:
    """Read all tensors of an archive's modules by their dotted names, in the file's dtype.

    Raises:
        CheckpointError: the archive is damaged, or its pickle contains objects other than modules and tensors.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            records = _Records(archive)
            stored = _flatten(_Unpickler(records.read("data.pkl")).load())
            return {name: records.tensor(tensor) for name, tensor in stored.items()}
    except _Refused as error:
        raise CheckpointError(
            f"{path} is unsafe: its pickle loads {error}, which could execute code. "
            "Download the file again from its publisher."
        ) from error
    except Exception as error:
        # A damaged pickle can cause any exception.
        raise CheckpointError(f"{path} is not a valid TorchScript archive ({error}). Download it again.") from error


class _Refused(pickle.UnpicklingError):
    """Error raised when the pickle contains an object that weights do not need."""


class _Storage(NamedTuple):
    """Storage of tensors: the record `data/<key>`."""

    key: str
    dtype: torch.dtype
    numel: int


class _Stored(NamedTuple):
    """Tensor that has not been read yet."""

    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


class _Module:
    """Module of the archive: its attributes by name, without its program."""

    attributes: Mapping[str, Any] = MappingProxyType({})

    def __setstate__(self, state: Any) -> None:
        self.attributes = state if isinstance(state, dict) else {}


def _stored(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> _Stored:
    return _Stored(storage, offset, size, stride)


def _first(value: Any, *_: Any) -> Any:
    return value


class _Unpickler(pickle._Unpickler):
    """Unpickler that creates records for modules, and references to storages for tensors.

    It is based on the Python implementation of the unpickler: in the faster C implementation, a pickle of ten bytes can
    allocate gigabytes. Every name gets a new class or function object, since a pickle may set attributes of objects.
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
            raise pickle.UnpicklingError("a reference to something other than a storage")
        return _Storage(key, dtype, int(numel))


class _Records:
    """Records of an archive by name under its top folder."""

    def __init__(self, archive: zipfile.ZipFile) -> None:
        self.archive = archive
        self.members = {info.filename.partition("/")[2]: info for info in archive.infolist()}
        self.storages: dict[_Storage, Tensor] = {}

    def read(self, name: str) -> bytes:
        info = self.members[name]
        if info.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"the record {name} is compressed, which torch does not do")
        return self.archive.read(info)

    def tensor(self, stored: _Stored) -> Tensor:
        if stored.storage not in self.storages:
            self.storages[stored.storage] = self._storage(stored.storage)
        numbers = self.storages[stored.storage]
        # as_strided checks the bounds, but with a stride of 0, a tensor of any size would fit.
        if math.prod(stored.size) > len(numbers):
            raise ValueError(f"a tensor of shape {list(stored.size)} in a storage of {len(numbers)} values")
        return numbers.as_strided(stored.size, stored.stride, stored.offset)

    def _storage(self, storage: _Storage) -> Tensor:
        data = self.read(f"data/{storage.key}")
        if len(data) != storage.numel * storage.dtype.itemsize:
            raise ValueError(f"the record data/{storage.key} has {len(data)} bytes for {storage.numel} {storage.dtype}")
        return torch.frombuffer(bytearray(data), dtype=storage.dtype) if data else torch.empty(0, dtype=storage.dtype)


def _flatten(root: Any) -> dict[str, _Stored]:
    """Return the tensors of a tree of modules by their dotted names."""
    if not isinstance(root, _Module):
        raise TypeError("it contains no module")
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
    raise ValueError("its modules are nested too deeply")
