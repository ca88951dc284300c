"""A training state as JSON and safetensors: nothing in a checkpoint can run code when it is opened.

A tree of dictionaries, lists, plain values and tensors is split into JSON, where a tensor is `{"__tensor__": name}`, and a flat
mapping of those tensors. Keys that are not strings are kept in `{"__items__": [[key, value], …]}`.
"""

from typing import Any

import torch

from clip_exp.errors import CheckpointError

TENSOR = "__tensor__"
ITEMS = "__items__"


def split(tree: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    """Separate a state into what JSON holds and what safetensors hold.

    Raises:
        TypeError: the state has a value that neither can hold.
    """
    tensors: dict[str, torch.Tensor] = {}

    def walk(value: Any, path: str) -> Any:
        if isinstance(value, torch.Tensor):
            tensors[path] = value.detach().cpu().contiguous().clone()
            return {TENSOR: path}
        if isinstance(value, dict):
            if all(isinstance(key, str) for key in value):
                return {key: walk(item, f"{path}/{key}" if path else key) for key, item in value.items()}
            return {ITEMS: [[key, walk(item, f"{path}/{key}")] for key, item in value.items()]}
        if isinstance(value, list | tuple):
            return [walk(item, f"{path}/{index}") for index, item in enumerate(value)]
        if value is None or isinstance(value, bool | int | float | str):
            return value
        raise TypeError(f"a checkpoint cannot hold {path}, a {type(value).__name__}")

    return walk(tree, ""), tensors


def join(tree: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """The inverse of `split` (tuples come back as lists)."""
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
    """Torch numbers the parameters of an optimizer's state; name them, so that any strategy can take them up.

    Args:
        state: `torch.optim.Optimizer.state_dict()`.
        names: of the parameters, in the order of the optimizer's groups.
    """
    return _relabel(state, dict(enumerate(names)))


def number_optimizer_state(named: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """The inverse of `name_optimizer_state`.

    Raises:
        CheckpointError: the state has a parameter that `names` lacks.
    """
    numbers = {name: index for index, name in enumerate(names)}
    foreign = [name for group in named["param_groups"] for name in group["params"] if name not in numbers]
    if foreign:
        raise CheckpointError(
            f"the checkpoint's optimizer knows parameters that the model does not train: {', '.join(foreign[:5])}."
        )
    return _relabel(named, numbers)


def _relabel(state: dict[str, Any], labels: dict[Any, Any]) -> dict[str, Any]:
    groups = [{**group, "params": [labels[key] for key in group["params"]]} for group in state["param_groups"]]
    return {"state": {labels[key]: value for key, value in state["state"].items()}, "param_groups": groups}


def random_state() -> dict[str, torch.Tensor]:
    """The state of torch's generators in this process: CPU, and the current GPU where one is in use."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
