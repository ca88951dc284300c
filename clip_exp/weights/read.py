"""Reading weights from files and folders. Nothing that a file holds is ever executed."""

import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from clip_exp.config.model import ModelConfig
from clip_exp.errors import CheckpointError
from clip_exp.weights.inspect import Format, format_of, weight_files
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
        path: `.safetensors`, what `torch.save` wrote (`.pt`, `.bin`, `.ckpt`), or a TorchScript archive such as OpenAI's; a folder
            as Hugging Face's and open_clip's `save_pretrained`, or DeepSpeed, write, also in parts. Names are ours, or those of
            open_clip, OpenAI, FlagAI, or transformers' CLIPModel and SiglipModel; for where in the file they are see `search`.
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
        content |= _read(file, numbers)
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


def _read(path: Path, numbers: bool) -> dict[Any, Any]:
    match format_of(path):
        case Format.safetensors:
            return _read_safetensors(path)
        case Format.torchscript:
            return dict(read_torchscript(path))
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


def _read_torch(path: Path, numbers: bool) -> Any:
    ignored: list[Any] = [(_Ignored, name) for name in NUMPY]
    try:
        # an open file, because torch reads a path by its ending
        with path.open("rb") as file, torch.serialization.safe_globals(ignored):
            return torch.load(file, map_location="cpu" if numbers else "meta", weights_only=True)
    except pickle.UnpicklingError as error:
        if named := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise CheckpointError(
                f"{path}: refused, because its pickle asks for {named[1]}, which is no weight and could run code. "
                "Fetch the file again, or convert it to safetensors where you trust it."
            ) from error
        raise CheckpointError(
            f"{path}: refused, because torch finds no weights in this pickle. Fetch or write the file again."
        ) from error
    except Exception as error:  # a damaged file can break the unpickler in any way
        # Behind the first sentence is advice, also bad one.
        reason = (str(error) or type(error).__name__).splitlines()[0].partition(". ")[0]
        raise CheckpointError(f"{path}: not a readable torch file ({reason}). Fetch or write it again.") from error


def _dense(tensor: Tensor, numbers: bool) -> bool:
    plain = tensor.layout is torch.strided and not tensor.is_nested and not tensor.is_quantized
    return plain and (tensor.device.type == "cpu" or not numbers)
