"""Checkpoint format: `model.safetensors` with plain weights, and the training state in `state.json` and `state.safetensors`.

The files are the same for all strategies, so a run can be resumed with another one, and the weights can be loaded without any. Loading
a checkpoint cannot execute code, because nothing is pickled. The state is a tree of dictionaries, lists, plain values and tensors. It
is split into JSON, where a tensor is `{"__tensor__": name}`, and a flat mapping of the tensors. Dictionaries with other keys than
strings are stored as `{"__items__": [[key, value], …]}`.
"""

import json
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.plugins.io import CheckpointIO
from safetensors.torch import load_file, save_file

from clip_exp.checkpoints.folders import EMA_WEIGHTS, RUN_COPY, STATE, TENSORS, WEIGHTS, atomic_checkpoint
from clip_exp.errors import CheckpointError, NumericError
from clip_exp.storage import read_json_object

MODEL_PREFIX = "model."
EMA_KEY = "ema_state_dict"
# Keys of a checkpoint with the weights of the loss, and their average
LOSS_STATE, EMA_OF_LOSS = "loss_state", "ema_loss_state"
# Parts of the training state that must be finite
FINITE = tuple(f"{key}/" for key in ("optimizer_states", LOSS_STATE, EMA_OF_LOSS))
TENSOR = "__tensor__"
ITEMS = "__items__"


@dataclass(frozen=True)
class Snapshot:
    """Training state that can be written while training continues: it shares no memory with the trained tensors.

    Created by `snapshot`. The files are the same whenever they are written.
    """

    tensors: dict[str, dict[str, torch.Tensor]]  # by file name; on the CPU
    texts: dict[str, str]  # by file name
    metadata: dict[str, Any]  # for the manifest

    def write(self, path: Path) -> None:
        """Write the checkpoint folder `path`, atomically.

        Raises:
            NumericError: a value is not finite. The previous checkpoint remains the newest.
            CheckpointError: the folder cannot be written.
        """
        for file, tensors in self.tensors.items():
            if broken := [name for name in tensors if not _is_valid(file, name, tensors[name])]:
                raise NumericError(
                    f"{len(broken)} tensors of {file} are not finite, such as {broken[0]}: {path.name} is not written, and the previous "
                    "checkpoint is kept. Lower optimizer.lr, increase scheduler.warmup_steps, or set precision=32-true."
                )
        size = sum(tensor.nbytes for tensors in self.tensors.values() for tensor in tensors.values())
        with atomic_checkpoint(path, self.metadata, size) as folder:
            for file, tensors in self.tensors.items():
                save_file(tensors, folder / file)
            for file, text in self.texts.items():
                (folder / file).write_text(text, encoding="utf-8")


def _is_valid(file: str, name: str, tensor: torch.Tensor) -> bool:
    """Return False for weights, averaged weights and optimizer state that are not finite; the state of callbacks may be anything."""
    if file == TENSORS and not name.startswith(FINITE):
        return True
    return bool(torch.isfinite(tensor).all())


def snapshot(checkpoint: dict[str, Any], metadata: dict[str, Any], run_copy: dict[str, Any] | None = None) -> Snapshot:
    """Copy Lightning's training state to the CPU.

    Args:
        checkpoint: the training state.
        metadata: values for the manifest.
        run_copy: copy of the run's record and configuration; None: leave it out.
    """
    state = dict(checkpoint)
    files = {WEIGHTS: _plain_weights(state.pop("state_dict"))}
    averaged = state.pop(EMA_KEY, None)
    tree, files[TENSORS] = split(state)
    if averaged is not None:
        files[EMA_WEIGHTS] = {name: _copy(value) for name, value in averaged.items()}
    texts = {} if run_copy is None else {RUN_COPY: json.dumps(run_copy)}
    return Snapshot(files, {**texts, STATE: json.dumps(tree)}, {"step": checkpoint.get("global_step"), **metadata})


@dataclass(eq=False)
class SafeCheckpointIO(CheckpointIO):
    """Lightning plugin that writes and reads checkpoint folders.

    With `asynchronous`, saving returns when the state is copied, and a thread writes it. `wait` must be called before the next save.
    """

    metadata: dict[str, Any] = field(default_factory=dict)  # for the manifest of the next checkpoint
    run_copy: dict[str, Any] | None = None  # copy of the run's record and configuration, for every checkpoint
    on_saved: Callable[[int], None] | None = None  # called with the step when a checkpoint has reached the disk
    # Returns True if a state of so many bytes is copied, and written later
    asynchronous: Callable[[int], bool] = lambda size: False
    _saving: "Future[None] | None" = field(default=None, init=False)
    _thread: ThreadPoolExecutor = field(init=False, default_factory=lambda: ThreadPoolExecutor(1, "checkpoint"))

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write Lightning's training state to the folder `path`; raise an error as `Snapshot.write` does, or in `wait`."""
        assert self._saving is None
        later = self.asynchronous(_nbytes(checkpoint))
        copied = snapshot(checkpoint, self.metadata, self.run_copy)
        if later:
            self._saving = self._thread.submit(self._write, copied, Path(path), checkpoint["global_step"])
        else:
            self._write(copied, Path(path), checkpoint["global_step"])

    def _write(self, copied: Snapshot, path: Path, step: int) -> None:
        copied.write(path)
        if self.on_saved is not None:
            self.on_saved(step)

    @property
    def is_saving(self) -> bool:
        """True if an asynchronous save has begun, and `wait` has not been called since."""
        return self._saving is not None

    def wait(self) -> None:
        """Wait for the asynchronous save in progress, if there is one; raise its error."""
        saving, self._saving = self._saving, None
        if saving is not None:
            saving.result()

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a training state for Lightning from the folder `path`; raise a CheckpointError if that fails."""
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
        raise NotImplementedError("clip_exp.training.saving.Checkpointer removes checkpoints")


def read_state(checkpoint: Path, key: str) -> dict[str, Any]:
    """Return a part of a checkpoint's state that contains no tensors, empty if it is missing; raise a CheckpointError if unreadable."""
    try:
        part = read_json_object(checkpoint / STATE).get(key, {})
    except (OSError, ValueError) as error:
        raise CheckpointError(f"the checkpoint {checkpoint} cannot be read: {error}") from error
    return part if isinstance(part, dict) else {}


def _plain_weights(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the model's weights in float32 on the CPU, under the model's own names.

    A tensor with two names is copied twice, since safetensors do not allow shared memory.
    """
    return {
        key.removeprefix(MODEL_PREFIX): _copy(value, torch.float32 if value.is_floating_point() else value.dtype)
        for key, value in state_dict.items()
        if key.startswith(MODEL_PREFIX)
    }


def _copy(value: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Return a contiguous copy on the CPU."""
    return value.detach().to("cpu", dtype or value.dtype, copy=True).contiguous()


def _nbytes(tree: Any) -> int:
    """Return the size in bytes of all tensors in a tree of dictionaries and lists."""
    if isinstance(tree, torch.Tensor):
        return tree.nbytes
    values = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list | tuple) else ()
    return sum(map(_nbytes, values))


def split(tree: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    """Split a state into a tree for JSON and tensors for safetensors; raise a TypeError for values that fit neither."""
    tensors: dict[str, torch.Tensor] = {}

    def walk(value: Any, path: str) -> Any:
        if isinstance(value, torch.Tensor):
            tensors[path] = _copy(value)
            return {TENSOR: path}
        if isinstance(value, dict):
            if all(isinstance(key, str) for key in value):
                return {key: walk(item, f"{path}/{key}" if path else key) for key, item in value.items()}
            return {ITEMS: [[key, walk(item, f"{path}/{key}")] for key, item in value.items()]}
        if isinstance(value, list | tuple):
            return [walk(item, f"{path}/{index}") for index, item in enumerate(value)]
        if value is None or isinstance(value, bool | int | float | str):
            return value
        raise TypeError(f"{path} of type {type(value).__name__} cannot be saved in a checkpoint")

    return walk(tree, ""), tensors


def join(tree: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """Invert `split`; tuples become lists."""
    if isinstance(tree, dict):
        if set(tree) == {TENSOR}:
            return tensors[tree[TENSOR]]
        if set(tree) == {ITEMS}:
            return {key: join(item, tensors) for key, item in tree[ITEMS]}
        return {key: join(item, tensors) for key, item in tree.items()}
    if isinstance(tree, list):
        return [join(item, tensors) for item in tree]
    return tree


def name_optimizer_state(state: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """Replace the numbers of parameters in an `Optimizer.state_dict()` by names, so that any strategy can load it.

    Args:
        state: state dict of an optimizer.
        names: names of its parameters, in the order of its groups.
    """
    return _relabel(state, dict(enumerate(names)))


def number_optimizer_state(named: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """Invert `name_optimizer_state`; raise a CheckpointError if the state has a parameter that is not in `names`."""
    numbers = {name: index for index, name in enumerate(names)}
    foreign = [name for group in named["param_groups"] for name in group["params"] if name not in numbers]
    if foreign:
        raise CheckpointError(
            f"the optimizer state of the checkpoint contains parameters that this model does not train: {', '.join(foreign[:5])}."
        )
    return _relabel(named, numbers)


def _relabel(state: dict[str, Any], labels: dict[Any, Any]) -> dict[str, Any]:
    groups = [{**group, "params": [labels[key] for key in group["params"]]} for group in state["param_groups"]]
    return {"state": {labels[key]: value for key, value in state["state"].items()}, "param_groups": groups}


def random_state() -> dict[str, torch.Tensor]:
    """Return the state of torch's random generators in this process: CPU, and the current GPU if one is in use."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
