"""Reading weights from files. Nothing that a file holds is ever executed."""

import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from clip_exp.errors import CheckpointError
from clip_exp.weights.open_clip import from_open_clip, is_open_clip


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The weights of a file under our names, on the CPU, in the file's dtype.

    Args:
        path: a `model.safetensors` of ours, or weights in open_clip's layout: `.safetensors`, or anything that
            `torch.load` reads without executing it, such as `.pt` and `.bin`, possibly nested under `state_dict`.

    Raises:
        CheckpointError: no such file, not readable, or it holds something other than weights.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file of weights. Give a .safetensors, .pt or .bin file.")
    state = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    return from_open_clip(state) if is_open_clip(state) else state


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a readable safetensors file ({error}). Fetch or write it again.") from error


def _read_torch(path: Path) -> dict[str, Tensor]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: refused, because torch finds no weights in it or more than weights, and loading that could run "
            "code. Fetch the file again, or convert it to safetensors where you trust it."
        ) from error
    except Exception as error:  # a damaged file can break the unpickler in any way
        raise CheckpointError(f"{path}: not a readable torch file ({error}). Fetch or write it again.") from error
    return _only_tensors(content, path)


def _only_tensors(content: Any, path: Path) -> dict[str, Tensor]:
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict) or not content:
        raise CheckpointError(f"{path}: holds no dictionary of weights, nor one under `state_dict`.")
    wrong = [key for key, value in content.items() if not isinstance(value, Tensor)]
    if wrong:
        raise CheckpointError(f"{path}: not weights: {_listing(map(str, wrong))}")
    return content


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Copy a file's weights into `model`, all of them or none.

    Raises:
        CheckpointError: as `read_weights`, or the file and the model differ in names or shapes.
    """
    state, own = read_weights(path), model.state_dict()
    shapes = {
        key: f"{key} {list(state[key].shape)} instead of {list(own[key].shape)}"
        for key in own.keys() & state.keys()
        if own[key].shape != state[key].shape
    }
    problems = [
        f"  {what}: {_listing(names)}"
        for what, names in [
            ("missing in the file", sorted(own.keys() - state.keys())),
            ("not in the model", sorted(state.keys() - own.keys())),
            ("of another shape", [shapes[key] for key in sorted(shapes)]),
        ]
        if names
    ]
    if problems:
        raise CheckpointError(
            "\n".join([f"{path}: does not fit the model. Choose the `model` that it was trained as.", *problems])
        )
    model.load_state_dict(state)


def _listing(names: Any, limit: int = 10) -> str:
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
