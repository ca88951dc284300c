"""From weights to a model that has them: all of them or none, with a readable list of what does not fit."""

from pathlib import Path

import torch
from torch import Tensor, nn

from clip_exp.config.model_schema import ModelConfig
from clip_exp.errors import CheckpointError
from clip_exp.weights.differences import grouped, known_model, merged, numbers_of
from clip_exp.weights.files import listing, read_weights
from clip_exp.weights.positions import TEXT, fit_positions

BIAS = "logit_bias"
# Narrower ones go with a scale that is elsewhere.
NUMBERS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def load_weights(model: nn.Module, path: str | Path, config: ModelConfig | None = None) -> list[str]:
    """Copy a file's weights into `model`, all of them or none.

    Args:
        config: of the model; see `read_weights`.

    Returns:
        As `fit_weights`.

    Raises:
        CheckpointError: as `read_weights` and `fit_weights`.
    """
    return fit_weights(model, read_weights(path, config), str(path))


def fit_weights(model: nn.Module, state: dict[str, Tensor], source: str) -> list[str]:
    """Copy weights into `model`, all of them or none, in the model's dtype.

    Positional embeddings of another number of positions are made to fit, see `positions`. The bias of the sigmoid loss goes with
    the loss: a model that is trained with another loss than the weights were keeps its own bias, or has none.

    Args:
        state: under our names, as `read_weights` returns it.
        source: where they are from, for messages.

    Returns:
        A sentence about each weight that was changed to fit.

    Raises:
        CheckpointError: the names or shapes of the weights and of the model differ, or a weight is not finite.
    """
    own = model.state_dict()
    fitted, notes = fit_positions(state, own, causal_text=getattr(model, "shares_prefixes", False))
    fitted, notes = _fit_bias(fitted, own, notes)
    if problems := list(_problems(fitted, own)):
        hints = _hints(state, own)
        raise CheckpointError("\n".join([f"{source}: does not fit the model.", *problems, *hints]))
    if wild := [name for name, tensor in fitted.items() if not torch.isfinite(tensor.to(own[name].dtype)).all()]:
        raise CheckpointError(
            f"{source}: has values that are not finite (NaN or infinite) in {listing(wild)}. The file is damaged or its "
            "training failed: use an earlier checkpoint."
        )
    model.load_state_dict(fitted)
    return notes


def _fit_bias(
    state: dict[str, Tensor], own: dict[str, Tensor], notes: list[str]
) -> tuple[dict[str, Tensor], list[str]]:
    if BIAS in own and BIAS not in state:
        note = f"{BIAS}: the weights have none, since they were not trained with the sigmoid loss: {own[BIAS].item():g} to start with."
        return {**state, BIAS: own[BIAS]}, [*notes, note]
    if BIAS in state and BIAS not in own:
        rest = {name: tensor for name, tensor in state.items() if name != BIAS}
        return rest, [*notes, f"{BIAS}: left out, since it cancels out in the softmax loss."]
    return state, notes


def _problems(state: dict[str, Tensor], own: dict[str, Tensor]) -> list[str]:
    shapes, kinds = [], []
    for name in own.keys() & state.keys():
        if own[name].shape != state[name].shape:
            shapes.append((f"{name} {list(state[name].shape)} instead of {list(own[name].shape)}", 1))
        elif own[name].is_floating_point() and state[name].dtype not in NUMBERS:
            kinds.append((f"{name} {state[name].dtype} instead of {own[name].dtype}", 1))
    told = {
        "missing in the file": grouped(own.keys() - state.keys(), own.keys()),
        "not in the model": grouped(state.keys() - own.keys(), state.keys()),
        "of another shape": [label for label, _ in merged(shapes)],
        "of another kind": [label for label, _ in merged(kinds)],
    }
    return [f"  {what}: {listing(entries, limit=5)}" for what, entries in told.items() if entries]


def _hints(state: dict[str, Tensor], own: dict[str, Tensor]) -> list[str]:
    """What the user may have meant."""
    hints = []
    theirs, ours = numbers_of(state), numbers_of(own)
    differing = {key: value for key, value in theirs.items() if key in ours and ours[key] != value}
    if differing:
        numbers = ", ".join(f"{key}={value} instead of {ours[key]}" for key, value in differing.items())
        hints.append(f"  by its shapes the file has {numbers}.")
    only_context = differing.keys() == {"text.context_length"}
    if not only_context and (differing or theirs.keys() != ours.keys()) and (known := known_model(theirs)) is not None:
        hints.append(f"  model={known}, as it comes, has these shapes: choose it.")
    if only_context:
        hints.append(
            f"  {TEXT}: no position was trained beyond the file's {theirs['text.context_length']}, and a text tower that is "
            f"not causal needs all of them: set model.text.context_length={theirs['text.context_length']}."
        )
    return hints or ["  choose the `model` that the weights were trained as."]
