"""Lightning's training state in our format: `model.safetensors` with plain weights, `state.json` and `state.safetensors` beside it.

The same files whatever the strategy: a run can go on under another one, and the weights open in one process without it.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.plugins.io import CheckpointIO
from safetensors.torch import load_file, save_file

from clip_exp.checkpoints.state import join, split
from clip_exp.checkpoints.writer import EMA_WEIGHTS, RUN_COPY, STATE, TENSORS, WEIGHTS, atomic_checkpoint
from clip_exp.errors import CheckpointError, NumericError
from clip_exp.storage import read_json_object

MODEL_PREFIX = "model."
EMA_KEY = "ema_state_dict"


class SafeCheckpointIO(CheckpointIO):
    """Writes and reads checkpoint folders.

    Attributes:
        metadata: for the manifest of the next checkpoint written.
        run_copy: what every checkpoint keeps of its run, or None.
        on_saved: called with the step of a checkpoint that is on the disk.
    """

    def __init__(self) -> None:
        self.metadata: dict[str, Any] = {}
        self.run_copy: dict[str, Any] | None = None
        self.on_saved: Callable[[int], None] | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a state as Lightning dumps it into the folder `path`, whole or not at all.

        Raises:
            NumericError: a weight is not finite; what was saved before stays the newest.
            CheckpointError: the folder cannot be written.
        """
        state = dict(checkpoint)
        weights = _plain_weights(state.pop("state_dict"))
        _require_finite(weights, Path(path))
        averaged = state.pop(EMA_KEY, None)
        tree, tensors = split(state)
        size = sum(tensor.nbytes for part in (weights, tensors, averaged or {}) for tensor in part.values())
        with atomic_checkpoint(Path(path), {"step": checkpoint.get("global_step"), **self.metadata}, size) as folder:
            save_file(weights, folder / WEIGHTS)
            save_file(tensors, folder / TENSORS)
            if averaged is not None:
                save_file({key: value.contiguous() for key, value in averaged.items()}, folder / EMA_WEIGHTS)
            if self.run_copy is not None:
                (folder / RUN_COPY).write_text(json.dumps(self.run_copy), encoding="utf-8")
            (folder / STATE).write_text(json.dumps(tree), encoding="utf-8")
        if self.on_saved is not None:
            self.on_saved(checkpoint["global_step"])

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read the folder `path` back into a state as Lightning expects it.

        Raises:
            CheckpointError: a file is missing or cannot be read.
        """
        folder = Path(path)
        try:
            state = join(read_json_object(folder / STATE), load_file(folder / TENSORS))
            weights = load_file(folder / WEIGHTS)
            if (folder / EMA_WEIGHTS).is_file():
                state[EMA_KEY] = load_file(folder / EMA_WEIGHTS)
        except Exception as error:
            raise CheckpointError(f"the checkpoint {folder} cannot be read: {error}") from error
        state["state_dict"] = {f"{MODEL_PREFIX}{key}": value for key, value in weights.items()}
        return state

    def remove_checkpoint(self, path: str | Path) -> None:
        raise NotImplementedError("clip_exp.training.callbacks.Checkpointer removes checkpoints")


def read_state(checkpoint: Path, key: str) -> dict[str, Any]:
    """A part of a checkpoint's state that has no tensors; empty where there is none.

    Raises:
        CheckpointError: the state cannot be read.
    """
    try:
        part = read_json_object(checkpoint / STATE).get(key, {})
    except (OSError, ValueError) as error:
        raise CheckpointError(f"the checkpoint {checkpoint} cannot be read: {error}") from error
    return part if isinstance(part, dict) else {}


def _plain_weights(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The model's own weights, float32 on the CPU, under its own names; those of two names twice, as safetensors need them."""
    plain: dict[str, torch.Tensor] = {}
    seen: set[int] = set()  # addresses
    for key, value in state_dict.items():
        if key.startswith(MODEL_PREFIX):
            dtype = torch.float32 if value.is_floating_point() else value.dtype
            value = value.detach().to("cpu", dtype).contiguous()
            plain[key.removeprefix(MODEL_PREFIX)] = value.clone() if value.data_ptr() in seen else value
            seen.add(value.data_ptr())
    return plain


def _require_finite(weights: dict[str, torch.Tensor], path: Path) -> None:
    broken = [name for name, value in weights.items() if not torch.isfinite(value).all()]
    if broken:
        raise NumericError(
            f"{len(broken)} weights are not finite, {broken[0]} first: {path.name} is not written, and the checkpoint before it stays. "
            "Lower optimizer.lr, lengthen scheduler.warmup_steps, or train in precision=32-true."
        )
