"""Reading weights from files and folders. Nothing that a file holds is ever executed."""

import pickle
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from clip_exp.config.model import ModelConfig
from clip_exp.errors import CheckpointError
from clip_exp.weights.inspect import Format, format_of, weight_files
from clip_exp.weights.names import from_huggingface, from_open_clip, is_huggingface, is_open_clip
from clip_exp.weights.torchscript import read_torchscript

# Where trainers put the weights, beside an epoch, an optimizer and the like: open_clip and Lightning, DeepSpeed and FlagAI, others.
NESTS = ("state_dict", "module", "model")
# What wrappers put before every name: DistributedDataParallel, torch.compile, a LightningModule's attribute.
PREFIXES = ("module.", "_orig_mod.", "model.")


def read_weights(path: str | Path, config: ModelConfig | None = None) -> dict[str, Tensor]:
    """The weights of a file or folder under our names, on the CPU, in the file's dtype.

    Args:
        path: `.safetensors`, what `torch.save` wrote (`.pt`, `.bin`), or a TorchScript archive such as OpenAI's; a folder
            as Hugging Face's and open_clip's `save_pretrained` write, also in parts. Names are ours, or those of
            open_clip, OpenAI, FlagAI, or transformers' CLIPModel and SiglipModel. A trainer's file may nest them under
            `state_dict`, `module` or `model`; its averaged weights are not read.
        config: of the model that they are for. It counts for towers of other libraries, whose names it must tell; towers of
            ours are told by the weights' names.

    Raises:
        CheckpointError: no such file, not readable, or it holds something other than weights.
    """
    state: dict[str, Tensor] = {}
    for file in weight_files(Path(path).expanduser()):
        state |= _read(file)
    try:
        return _under_our_names(state, config)
    except (RuntimeError, ValueError, IndexError) as error:  # a reshape that a weight does not allow
        raise CheckpointError(f"{path}: holds weights of shapes that their names do not have ({error}).") from error


def _read(path: Path) -> dict[str, Tensor]:
    match format_of(path):
        case Format.safetensors:
            state = _read_safetensors(path)
        case Format.torchscript:
            state = read_torchscript(path)
        case Format.torch:
            state = _weights_in(_read_torch(path), path)
    if not state:
        raise CheckpointError(f"{path}: holds no weights. Fetch or write it again.")
    if wrong := [name for name, tensor in state.items() if not _dense(tensor)]:
        raise CheckpointError(
            f"{path}: holds sparse, nested or quantized tensors, which no model here takes: {listing(wrong)}"
        )
    return state


def _under_our_names(state: dict[str, Tensor], config: ModelConfig | None) -> dict[str, Tensor]:
    while prefix := next((prefix for prefix in PREFIXES if all(name.startswith(prefix) for name in state)), None):
        state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    if is_open_clip(state):
        return from_open_clip(state, config if config is not None and config.has_foreign_tower else None)
    return from_huggingface(state) if is_huggingface(state) else state


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a readable safetensors file ({error}). Fetch or write it again.") from error


def _read_torch(path: Path) -> Any:
    try:
        with path.open("rb") as file:  # an open file, because torch reads a path by its ending
            return torch.load(file, map_location="cpu", weights_only=True)
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


def _weights_in(content: Any, path: Path) -> dict[str, Tensor]:
    """The dictionary of weights in what a torch file holds, which may be a trainer's."""
    seen = 0
    while isinstance(content, dict) and seen < len(NESTS):
        nest = next((key for key in NESTS if isinstance(content.get(key), dict)), None)
        if nest is None:
            break
        content, seen = content[nest], seen + 1
    if not isinstance(content, dict) or not content:
        raise CheckpointError(f"{path}: holds no dictionary of weights, nor one under {', '.join(NESTS)}.")
    if wrong := [key for key, value in content.items() if not isinstance(key, str) or not isinstance(value, Tensor)]:
        raise CheckpointError(f"{path}: not weights: {listing(map(str, wrong))}")
    return content


def _dense(tensor: Tensor) -> bool:
    plain = tensor.layout is torch.strided and not tensor.is_nested and not tensor.is_quantized
    return plain and tensor.device.type == "cpu"


def listing(names: Iterable[str], limit: int = 10) -> str:
    """The first names, and how many more there are. A file can name its weights anything, and a terminal obeys some of it."""
    names = [name if name.isprintable() and len(name) <= 200 else f"{name[:100]!r}…" for name in names]
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
