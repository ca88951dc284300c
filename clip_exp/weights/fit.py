"""From weights to a model that has them: all of them or none, with a readable list of what does not fit."""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clip_exp.config.model import ModelConfig
from clip_exp.config.names import known_models
from clip_exp.errors import CheckpointError
from clip_exp.models.clip import build_model
from clip_exp.weights.names import projections, tower_numbers
from clip_exp.weights.read import BIAS, POSITIONS, find_model_weights, listing

# Narrower ones go with a scale that is elsewhere.
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
TEXT_POSITIONS = "text.positional_embedding"
BLOCK_NUMBER = re.compile(r"(?<=\.)\d{1,6}(?=\.)")
INPUT_SIZES = {"image.image_size", "text.context_length"}  # a model may have been made for several


def load_weights(
    model: nn.Module,
    path: str | Path,
    config: ModelConfig | None = None,
    prefix: str | None = None,
    tower: str | None = None,
) -> list[str]:
    """Copy a file's weights into `model`, all of them or none.

    Args:
        config, prefix, tower: see `find_model_weights`.

    Returns:
        A sentence about each weight that was changed to fit, and about what else the file holds.

    Raises:
        CheckpointError: as `find_model_weights` and `fit_weights`.
    """
    weights = find_model_weights(path, config, _own(model, tower), prefix, tower=tower)
    notes = fit_weights(model, weights.state, weights.source, tower)
    return notes if weights.note is None else [weights.note, *notes]


def check_weights(
    path: str | Path, config: ModelConfig, prefix: str | None = None, tower: str | None = None
) -> set[str]:
    """Refuse a file whose names or shapes do not fit the model. Neither takes memory.

    Returns:
        The weights of the tower's projection, where the file has none and they stay random.

    Raises:
        CheckpointError: as `load_weights`.
    """
    with torch.device("meta"):
        model = build_model(config)
    weights = find_model_weights(path, config, _own(model, tower), prefix, numbers=False, tower=tower)
    _fitted(model, weights.state, weights.source, tower)
    return set() if tower is None else projections(_own(model, tower)) - weights.state.keys()


def _own(model: nn.Module, tower: str | None) -> dict[str, Tensor]:
    return {
        name: tensor for name, tensor in model.state_dict().items() if tower is None or name.startswith(f"{tower}.")
    }


def fit_weights(model: nn.Module, state: dict[str, Tensor], source: str, tower: str | None = None) -> list[str]:
    """Copy weights into `model`, all of them or none, in the model's dtype.

    Positional embeddings of another number of positions are made to fit, see `fit_positions`. The bias of the sigmoid loss goes with
    the loss: a model that is trained with another loss than the weights were keeps its own bias, or has none.

    Args:
        state: under our names, as `read_weights` returns it.
        source: where they are from, for messages.
        tower: image or text: the weights are that tower's, possibly without its projection.

    Returns:
        A sentence about each weight that was changed to fit.

    Raises:
        CheckpointError: the names or shapes of the weights and of the model differ, or a weight is not finite.
    """
    own = model.state_dict()
    fitted, notes = _fitted(model, state, source, tower)
    if wild := [name for name, tensor in fitted.items() if not torch.isfinite(tensor.to(own[name].dtype)).all()]:
        raise CheckpointError(
            f"{source}: has values that are not finite (NaN or infinite) in {listing(wild)}. The file is damaged or its "
            "training failed: use an earlier checkpoint."
        )
    model.load_state_dict({**own, **fitted})
    return notes


def _fitted(
    model: nn.Module, state: dict[str, Tensor], source: str, tower: str | None
) -> tuple[dict[str, Tensor], list[str]]:
    own = _own(model, tower)
    fitted, notes = fit_positions(state, own, causal_text=getattr(model, "shares_prefixes", False))
    fitted, notes = _fit_bias(fitted, own, notes)
    if tower is not None and (fresh := projections(own)) and not fresh & state.keys():
        fitted |= {name: own[name] for name in fresh}
        notes.append(f"{listing(grouped(fresh, own))}: not in the file, so the tower starts with a random projection.")
    if problems := list(_problems(fitted, own)):
        hints = _hints(state, own)
        raise CheckpointError("\n".join([f"{source}: does not fit the model.", *problems, *hints]))
    return fitted, notes


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


def fit_positions(
    state: dict[str, Tensor], own: dict[str, Tensor], causal_text: bool
) -> tuple[dict[str, Tensor], list[str]]:
    """The state with positional embeddings of the model's shapes, wherever only the number of positions differs.

    Args:
        state: of the file, under our names.
        own: the model's state dict.
        causal_text: a token of the text tower sees only what stands before it, and the text is pooled at its end. Then
            fewer positions are exact, for texts that fit in. More are never made up: they would need training.

    Returns:
        A new dictionary, and a sentence about each change.
    """
    fitted, notes = dict(state), []
    for name in sorted(own.keys() & state.keys()):
        old, new = state[name], own[name]
        if (
            not name.endswith(POSITIONS)
            or old.shape == new.shape
            or old.ndim != new.ndim
            or old.shape[-1] != new.shape[-1]
            or not old.is_floating_point()
        ):
            continue
        before, after = old.shape[-2], new.shape[-2]
        if name == TEXT_POSITIONS:
            if causal_text and after < before:
                fitted[name] = old[:after]
                notes.append(
                    f"{name}: the first {after} of the file's {before} positions, for texts of at most {after} tokens."
                )
        elif name.startswith("image.") and (resized := resize_grid(old, after)) is not None:
            fitted[name] = resized
            sides = [f"{side}x{side}" for side in (math.isqrt(before), math.isqrt(after))]
            notes.append(
                f"{name}: the file's grid of {sides[0]} patches is interpolated to {sides[1]} (bicubic), as the image size differs."
            )
    return fitted, notes


def resize_grid(positions_ND: Tensor, count: int) -> Tensor | None:
    """Positions of a square grid of patches, interpolated to another one as open_clip and timm do (bicubic, antialiased).

    Args:
        positions_ND: [N, D] or [1, N, D], row by row; N is a square, or one more with a class token first, which is kept.
        count: of positions wanted, with the same kind of first token.

    Returns:
        float32 [count, D] or [1, count, D]; None where N and `count` are not both such numbers.
    """
    extra = positions_ND.shape[-2] - math.isqrt(positions_ND.shape[-2]) ** 2
    side = math.isqrt(max(count - extra, 0))
    if extra > 1 or side == 0 or side**2 + extra != count:
        return None
    first_ED, grid_ND = positions_ND.float().flatten(0, -2).split([extra, positions_ND.shape[-2] - extra])
    before = math.isqrt(len(grid_ND))
    grid_1DHW = grid_ND.T.unflatten(1, (before, before)).unsqueeze(0)
    grid_1DHW = F.interpolate(grid_1DHW, size=(side, side), mode="bicubic", antialias=True, align_corners=False)
    resized_ND = torch.cat([first_ED, grid_1DHW[0].flatten(1).T])
    return resized_ND.reshape(*positions_ND.shape[:-2], count, -1)


# What does not fit, in few words.


def _problems(state: dict[str, Tensor], own: dict[str, Tensor]) -> list[str]:
    shapes, kinds = [], []
    for name in own.keys() & state.keys():
        if own[name].shape != state[name].shape:
            shapes.append((f"{name} {list(state[name].shape)} instead of {list(own[name].shape)}", 1))
        elif own[name].is_floating_point() and state[name].dtype not in DTYPES:
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
    theirs, ours = tower_numbers(state), tower_numbers(own)
    differing = {key: value for key, value in theirs.items() if key in ours and ours[key] != value}
    if differing:
        numbers = ", ".join(f"{key}={value} instead of {ours[key]}" for key, value in differing.items())
        hints.append(f"  by its shapes the file has {numbers}.")
    only_context = differing.keys() == {"text.context_length"}
    if not only_context and (differing or theirs.keys() != ours.keys()) and (known := known_model(theirs)) is not None:
        hints.append(f"  model={known}, as it comes, has these shapes: choose it.")
    if only_context:
        hints.append(
            f"  {TEXT_POSITIONS}: no position was trained beyond the file's {theirs['text.context_length']}, and a text tower that is "
            f"not causal needs all of them: set model.text.context_length={theirs['text.context_length']}."
        )
    there = own.keys() & state.keys()
    # The missing weights may be those whose shapes would have told the numbers.
    fits = state.keys() - own.keys() <= {BIAS} and all(own[name].shape == state[name].shape for name in there)
    if not hints and (fits or theirs == ours) and own.keys() - state.keys():
        return [f"  it has {len(there)} of the model's {len(own)} weights, of the same sizes: it is not complete."]
    return hints or ["  choose the `model` that the weights were trained as."]


def grouped(names: Collection[str], among: Collection[str]) -> list[str]:
    """Names in few words: whole branches as `branch.*`, and what repeats in every block once.

    Args:
        names: what to tell.
        among: all names of the file or model that they are of, which decides what a whole branch is.
    """
    meant, there = (Counter(branch for name in some for branch in _branches(name)) for some in (names, among))
    labels = Counter(
        next((f"{branch}.*" for branch in _branches(name) if 1 < meant[branch] == there[branch]), name)
        for name in names
    )
    return [_with_count(label, count) for label, count in merged(labels.items())]


def merged(labels: Iterable[tuple[str, int]]) -> Iterator[tuple[str, int]]:
    """Labels that differ in the number of a block as one, with the sum of their counts."""
    alike: dict[str, list[tuple[str, int]]] = defaultdict(list)
    for label, count in sorted(labels):
        alike[BLOCK_NUMBER.sub("*", label)].append((label, count))
    for pattern, members in alike.items():
        yield _common(pattern, [label for label, _ in members]), sum(count for _, count in members)


def _branches(name: str) -> Iterator[str]:
    """The beginnings of a dotted name, shortest first."""
    parts = name.split(".")
    return (".".join(parts[:length]) for length in range(1, len(parts)))


def _common(pattern: str, labels: list[str]) -> str:
    if len(labels) == 1:
        return labels[0]
    numbers = sorted(int(found[0]) for label in labels if len(found := BLOCK_NUMBER.findall(label)) == 1)
    if numbers != list(range(numbers[0], numbers[-1] + 1) if numbers else []) or len(numbers) != len(labels):
        return pattern
    return BLOCK_NUMBER.sub(f"{numbers[0]}-{numbers[-1]}", labels[0])


def _with_count(label: str, count: int) -> str:
    return f"{label} ({count} weights)" if count > 1 else label


def _value(config: ModelConfig, key: str) -> Any:
    """Return a value of a configuration; None where the tower has no such key."""
    tower, _, name = key.rpartition(".")
    return getattr(getattr(config, tower) if tower else config, name, None)


def known_model(numbers: dict[str, Any]) -> str | None:
    """The model of `conf/model/` with these numbers, or with all but the sizes of its inputs."""
    if not {"image.kind", "text.width"} <= numbers.keys():
        return None
    fits: dict[int, str] = {}
    for config in known_models():
        wrong = {key for key, value in numbers.items() if _value(config, key) != value}
        if wrong <= INPUT_SIZES:
            fits.setdefault(len(wrong), config.name)
    return fits[min(fits)] if fits else None
