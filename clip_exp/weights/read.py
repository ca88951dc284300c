"""Reading weights from files and folders. Nothing that a file holds is ever executed."""

import math
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from shlex import quote
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from clip_exp.config.model import ModelConfig
from clip_exp.errors import CheckpointError
from clip_exp.weights.inspect import Format, format_of, npz_members, weight_files
from clip_exp.weights.names import to_ours
from clip_exp.weights.search import KEY, listing, search
from clip_exp.weights.torchscript import read_torchscript


class _Ignored:
    """What a pickle gets in place of a number or an array of numpy: nothing of numpy runs, and no model needs them."""

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


NUMPY = [
    *(f"numpy.{module}.multiarray.{name}" for module in ("core", "_core") for name in ("scalar", "_reconstruct")),
    "numpy.dtype",
    "numpy.ndarray",
]


OPTIMIZER, FLAX_MODEL = "opt/", "opt/target/"  # of big_vision's files; of older ones of Flax's, where the model is
BFLOAT16 = np.dtype("V2")  # NumPy has none of its own
NUMPY_DTYPES = {
    np.dtype("float64"): torch.float64,
    np.dtype("float32"): torch.float32,
    np.dtype("float16"): torch.float16,
    BFLOAT16: torch.bfloat16,
    np.dtype("int64"): torch.int64,
    np.dtype("int32"): torch.int32,
}
HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


class UnsafePickle(CheckpointError):
    """A torch file whose pickle asks for something other than weights."""


class _Pickled(Exception):
    """An array of objects; its message is the array's name."""


class Weights(NamedTuple):
    """A model's weights out of a file."""

    state: dict[str, Tensor]  # under our names
    source: str  # where they are, for messages
    note: str | None  # on what else the file holds


def read_weights(path: str | Path, config: ModelConfig | None = None) -> dict[str, Tensor]:
    """Return the weights of any model, under our names; see `find_model_weights`."""
    return find_model_weights(path, config).state


def find_model_weights(
    path: str | Path,
    config: ModelConfig | None = None,
    own: Mapping[str, Tensor] | None = None,
    prefix: str | None = None,
    *,
    numbers: bool = True,
    tower: str | None = None,
) -> Weights:
    """Find the model's weights in a file or folder, on the CPU, in the file's dtype.

    Args:
        path: `.safetensors`, what `torch.save` wrote (`.pt`, `.bin`, `.ckpt`), or a TorchScript archive such as OpenAI's, or
            big_vision's `.npz`; a folder as Hugging Face's and open_clip's `save_pretrained`, or DeepSpeed, write, also in parts.
            Names are ours, or those of open_clip, OpenAI, FlagAI, cn-clip, big_vision, or transformers' CLIPModel, SiglipModel and
            ChineseCLIPModel; for where in the file they are see `search`.
        config: of the model that they are for, see `to_ours`.
        own: state dict of that model; None: any with both towers.
        prefix: `pretrained_prefix`, where several fit.
        numbers: False: names and shapes alone, without memory.
        tower: image or text: the weights of that tower alone, out of a file of one tower or of a model; `own` is then that tower's.

    Raises:
        CheckpointError: no such file, not readable, or it holds something other than weights; see `search`.
    """
    path = Path(path).expanduser()
    content: dict[Any, Any] = {}
    for file in weight_files(path):
        content |= read_content(file, numbers)
    if not content:
        raise CheckpointError(f"{path}: holds no weights. Fetch or write it again.")
    place, averaged = search(content, path, own, config, prefix, tower)
    if wrong := [name for name, tensor in place.weights.items() if not _dense(tensor, numbers)]:
        raise CheckpointError(
            f"{path}: holds sparse, nested or quantized tensors, which no model here takes: {listing(wrong)}"
        )
    source = f"{path} ({listing([place.label])})" if place.label else str(path)
    left = place.left_over(content)
    note = f"{source} is read; left out is {listing(left)}." if left else None
    if averaged:
        note = f"{note} An averaged copy is read by {KEY}={listing(averaged)}."
    try:
        return Weights(to_ours(place.layout, place.weights, config), source, note)
    except (RuntimeError, ValueError, IndexError) as error:  # a reshape that a weight does not allow
        raise CheckpointError(f"{path}: holds weights of shapes that their names do not have ({error}).") from error


def read_content(path: Path, numbers: bool = True) -> dict[Any, Any]:
    """Return what a file holds: tensors, in nested dictionaries if it is torch's.

    Args:
        numbers: see `find_model_weights`.

    Raises:
        UnsafePickle: reading it would need code in it.
        CheckpointError: not readable, or no dictionary.
    """
    match format_of(path):
        case Format.safetensors:
            return _read_safetensors(path)
        case Format.torchscript:
            return dict(read_torchscript(path))
        case Format.npz:
            return dict(_read_npz(path, numbers))
        case Format.torch:
            content = _read_torch(path, numbers)
            if not isinstance(content, dict) or not content:
                raise CheckpointError(
                    f"{path}: holds no dictionary of weights, nor one under state_dict, module, model or another key."
                )
            return content


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a readable safetensors file ({error}). Fetch or write it again.") from error


def _read_npz(path: Path, numbers: bool) -> dict[str, Tensor]:
    """Return the arrays of big_vision's files, with dots for the slashes in their names, and each block's weights apart.

    Left out are what its optimizer keeps, and arrays that are not of numbers.
    """
    found: dict[str, Tensor] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for info in npz_members(path):
                name = info.filename.removesuffix(".npy")
                if name.startswith(OPTIMIZER) and not name.startswith(FLAX_MODEL):
                    continue
                with archive.open(info) as file:
                    tensor = _array(file, info, numbers)
                if tensor is None:
                    continue
                before, stacked, after = name.partition("/encoderblock/")
                if stacked and tensor.ndim:  # along the first axis: all blocks were one loop
                    each = {f"{before}/encoderblock_{i}/{after}": part for i, part in enumerate(tensor.unbind())}
                else:
                    each = {name: tensor}
                found |= {part.replace("/", "."): value for part, value in each.items()}
    except _Pickled as error:
        raise CheckpointError(
            f"{path}: refused, because its array {error} is a pickle, which is no weight and could run code. Fetch the file again."
        ) from error
    except Exception as error:  # a damaged array can break its reader in any way
        raise CheckpointError(f"{path}: not a readable file of NumPy's ({error}). Fetch or write it again.") from error
    return found


def _array(file: IO[bytes], info: zipfile.ZipInfo, numbers: bool) -> Tensor | None:
    read_header = HEADERS.get(np.lib.format.read_magic(file))
    if read_header is None:
        raise ValueError(f"{info.filename}: unknown version")
    shape, _, dtype = read_header(file)
    if dtype.hasobject:
        raise _Pickled(info.filename)
    kind = BFLOAT16 if dtype == BFLOAT16 else dtype.newbyteorder("=")
    if kind not in NUMPY_DTYPES:
        return None
    if math.prod(shape) * dtype.itemsize != info.file_size - file.tell():  # before memory is taken for it
        raise ValueError(f"{info.filename}: its header tells another size")
    if not numbers:
        return torch.empty(shape, dtype=NUMPY_DTYPES[kind], device="meta")
    file.seek(0)
    array = np.lib.format.read_array(file, allow_pickle=False)
    if kind is BFLOAT16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array.astype(kind, copy=False)).contiguous()


def _read_torch(path: Path, numbers: bool) -> Any:
    ignored: list[Any] = [(_Ignored, name) for name in NUMPY]
    try:
        # an open file, because torch reads a path by its ending
        with path.open("rb") as file, torch.serialization.safe_globals(ignored):
            return torch.load(file, map_location="cpu" if numbers else "meta", weights_only=True)
    except pickle.UnpicklingError as error:
        if named := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise UnsafePickle(
                f"{path}: refused, because its pickle asks for {named[1]}, which is no weight and could run code. Fetch the file "
                f"again, or rewrite it where you trust its author: clip-exp convert {quote(str(path))} output={quote(path.stem)}.safetensors "
                "trust_pickle=true"
            ) from error
        raise UnsafePickle(
            f"{path}: refused, because torch finds no weights in this pickle. Fetch or write the file again."
        ) from error
    except Exception as error:  # a damaged file can break the unpickler in any way
        # Behind the first sentence is advice, also bad one.
        reason = (str(error) or type(error).__name__).splitlines()[0].partition(". ")[0]
        raise CheckpointError(f"{path}: not a readable torch file ({reason}). Fetch or write it again.") from error


def _dense(tensor: Tensor, numbers: bool) -> bool:
    plain = tensor.layout is torch.strided and not tensor.is_nested and not tensor.is_quantized
    return plain and (tensor.device.type == "cpu" or not numbers)
