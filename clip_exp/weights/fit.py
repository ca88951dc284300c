"""Copying of weights into a model, all of them or none, with readable messages about weights that do not fit."""

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

# Narrower types need a separate scale.
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
TEXT_POSITIONS = "text.positional_embedding"
BLOCK_NUMBER = re.compile(r"(?<=\.)\d{1,6}(?=\.)")
# Values that may differ between weights of the same architecture
INPUT_SIZES = {"image.image_size", "text.context_length"}


def load_weights(
    model: nn.Module,
    path: str | Path,
    config: ModelConfig | None = None,
    prefix: str | None = None,
    tower: str | None = None,
) -> list[str]:
    """Load the weights of a file into `model`, all of them or none.

    Args:
        model: model to change.
        path, config, prefix, tower: see `find_model_weights`.

    Returns:
        Messages about other contents of the file and about weights that were changed to fit.

    Raises:
        CheckpointError: see `find_model_weights` and `fit_weights`.
    """
    weights = find_model_weights(path, config, _expected(model, tower), prefix, tower=tower)
    notes = fit_weights(model, weights.state, weights.source, tower)
    return notes if weights.note is None else [weights.note, *notes]


def check_weights(
    path: str | Path, config: ModelConfig, prefix: str | None = None, tower: str | None = None
) -> set[str]:
    """Check that the names and shapes of a file's weights fit a model, without allocating memory for either.

    Args:
        path, config, prefix, tower: see `find_model_weights`.

    Returns:
        Names of the weights of the tower's projection that would be random, since the file does not have them.

    Raises:
        CheckpointError: see `load_weights`.
    """
    with torch.device("meta"):
        model = build_model(config)
    weights = find_model_weights(path, config, _expected(model, tower), prefix, with_values=False, tower=tower)
    _fitted(model, weights.state, weights.source, tower)
    return set() if tower is None else projections(_expected(model, tower)) - weights.state.keys()


def _expected(model: nn.Module, tower: str | None) -> dict[str, Tensor]:
    return {
        name: tensor for name, tensor in model.state_dict().items() if tower is None or name.startswith(f"{tower}.")
    }


def fit_weights(model: nn.Module, state: dict[str, Tensor], source: str, tower: str | None = None) -> list[str]:
    """Copy weights into `model`, all of them or none, in the model's dtype.

    Position embeddings with another number of positions are resized, see `fit_positions`. The bias of the sigmoid loss
    depends on the loss: if the weights were trained with another loss than the model's, the model's bias is unchanged,
    or the bias of the weights is left out.

    Args:
        model: model to change.
        state: weights by our names, as `read_weights` returns them.
        source: location of the weights, for messages.
        tower: image or text, if the weights are those of this tower only, with or without its projection.

    Returns:
        Messages about weights that were changed to fit.

    Raises:
        CheckpointError: the names or shapes of the weights and of the model differ, or a weight is not finite.
    """
    expected = model.state_dict()
    fitted, notes = _fitted(model, state, source, tower)
    if not_finite := [
        name for name, tensor in fitted.items() if not torch.isfinite(tensor.to(expected[name].dtype)).all()
    ]:
        raise CheckpointError(
            f"{source} has values that are not finite (NaN or infinite) in {listing(not_finite)}. The file is damaged, or its training "
            "diverged: use an earlier checkpoint."
        )
    model.load_state_dict({**expected, **fitted})
    return notes


def _fitted(
    model: nn.Module, state: dict[str, Tensor], source: str, tower: str | None
) -> tuple[dict[str, Tensor], list[str]]:
    expected = _expected(model, tower)
    fitted, notes = fit_positions(state, expected, causal_text=getattr(model, "shares_prefixes", False))
    fitted, notes = _fit_bias(fitted, expected, notes)
    if tower is not None and (fresh := projections(expected)) and not fresh & state.keys():
        fitted |= {name: expected[name] for name in fresh}
        notes.append(
            f"{listing(grouped(fresh, expected))}: not in the file, so the tower starts with a random projection."
        )
    if problems := list(_problems(fitted, expected)):
        hints = _hints(state, expected)
        raise CheckpointError("\n".join([f"{source} does not fit the model.", *problems, *hints]))
    return fitted, notes


def _fit_bias(
    state: dict[str, Tensor], expected: dict[str, Tensor], notes: list[str]
) -> tuple[dict[str, Tensor], list[str]]:
    if BIAS in expected and BIAS not in state:
        note = f"{BIAS}: not in the file, since its weights were not trained with the sigmoid loss; it starts at {expected[BIAS].item():g}."
        return {**state, BIAS: expected[BIAS]}, [*notes, note]
    if BIAS in state and BIAS not in expected:
        rest = {name: tensor for name, tensor in state.items() if name != BIAS}
        return rest, [*notes, f"{BIAS}: left out, since it has no effect in the softmax loss."]
    return state, notes


def fit_positions(
    state: dict[str, Tensor], expected: dict[str, Tensor], causal_text: bool
) -> tuple[dict[str, Tensor], list[str]]:
    """Resize position embeddings to the model's shapes, where only the number of positions differs.

    Args:
        state: weights of the file by our names.
        expected: state dict of the model.
        causal_text: the text tower is causal and pools at the end of the text. Then, truncating its positions does not
            change features of texts that fit. Positions are never added, since they would need training.

    Returns:
        A new dictionary, and a message about each change.
    """
    fitted, notes = dict(state), []
    for name in sorted(expected.keys() & state.keys()):
        old, new = state[name], expected[name]
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
                    f"{name}: truncated from {before} to {after} positions, for texts of at most {after} tokens."
                )
        elif name.startswith("image.") and (resized := resize_grid(old, after)) is not None:
            fitted[name] = resized
            sides = [f"{side}x{side}" for side in (math.isqrt(before), math.isqrt(after))]
            notes.append(
                f"{name}: interpolated (bicubic) from a grid of {sides[0]} patches to {sides[1]}, since the image size differs."
            )
    return fitted, notes


def resize_grid(positions_ND: Tensor, count: int) -> Tensor | None:
    """Interpolate the position embeddings of a square grid of patches to another size, as open_clip and timm do (bicubic, antialiased).

    Args:
        positions_ND: position embeddings, [N, D] or [1, N, D], in row-major order; N is a square number, plus one if
            there is a class token, which comes first and is not changed.
        count: requested number of positions, including the class token if there is one.

    Returns:
        float32 [count, D] or [1, count, D]; None if N or `count` is not the size of a square grid.
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


# Messages about weights that do not fit


def _problems(state: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    shapes, kinds = [], []
    for name in expected.keys() & state.keys():
        if expected[name].shape != state[name].shape:
            shapes.append((f"{name} {list(state[name].shape)} instead of {list(expected[name].shape)}", 1))
        elif expected[name].is_floating_point() and state[name].dtype not in DTYPES:
            kinds.append((f"{name} {state[name].dtype} instead of {expected[name].dtype}", 1))
    found = {
        "missing in the file": grouped(expected.keys() - state.keys(), expected.keys()),
        "not in the model": grouped(state.keys() - expected.keys(), state.keys()),
        "different shape": [label for label, _ in merged(shapes)],
        "different dtype": [label for label, _ in merged(kinds)],
    }
    return [f"  {what}: {listing(entries, limit=5)}" for what, entries in found.items() if entries]


def _hints(state: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    """Return suggestions for weights that do not fit."""
    hints = []
    theirs, ours = tower_numbers(state), tower_numbers(expected)
    differing = {key: value for key, value in theirs.items() if key in ours and ours[key] != value}
    if differing:
        numbers = ", ".join(f"{key}={value} instead of {ours[key]}" for key, value in differing.items())
        hints.append(f"  according to its shapes, the file has {numbers}.")
    only_context = differing.keys() == {"text.context_length"}
    if not only_context and (differing or theirs.keys() != ours.keys()) and (known := known_model(theirs)) is not None:
        hints.append(f"  model={known} has these shapes: select it.")
    if only_context:
        hints.append(
            f"  {TEXT_POSITIONS}: the file has {theirs['text.context_length']} positions. More would be untrained, and a text tower "
            f"that is not causal needs all of them: set model.text.context_length={theirs['text.context_length']}."
        )
    there = expected.keys() & state.keys()
    # The missing weights may be those whose shapes would show the values.
    fits = state.keys() - expected.keys() <= {BIAS} and all(expected[name].shape == state[name].shape for name in there)
    if not hints and (fits or theirs == ours) and expected.keys() - state.keys():
        return [f"  the file is incomplete: it has {len(there)} of the model's {len(expected)} weights."]
    return hints or ["  select the model that the weights belong to."]


def grouped(names: Collection[str], among: Collection[str]) -> list[str]:
    """Shorten a list of names: complete branches become `branch.*`, and names that differ only in the number of the block become one.

    Args:
        names: names to list.
        among: all names of the file or model, which determine the complete branches.
    """
    meant, there = (Counter(branch for name in some for branch in _branches(name)) for some in (names, among))
    labels = Counter(
        next((f"{branch}.*" for branch in _branches(name) if 1 < meant[branch] == there[branch]), name)
        for name in names
    )
    return [_with_count(label, count) for label, count in merged(labels.items())]


def merged(labels: Iterable[tuple[str, int]]) -> Iterator[tuple[str, int]]:
    """Yield labels and counts, with labels that differ only in the number of a block merged and their counts added."""
    alike: dict[str, list[tuple[str, int]]] = defaultdict(list)
    for label, count in sorted(labels):
        alike[BLOCK_NUMBER.sub("*", label)].append((label, count))
    for pattern, members in alike.items():
        yield _common(pattern, [label for label, _ in members]), sum(count for _, count in members)


def _branches(name: str) -> Iterator[str]:
    """Return the prefixes of a dotted name, shortest first."""
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
    """Return a value of a configuration; None if the tower has no such key."""
    tower, _, name = key.rpartition(".")
    return getattr(getattr(config, tower) if tower else config, name, None)


def known_model(numbers: dict[str, Any]) -> str | None:
    """Return the name of the model in `conf/model/` with these values; input sizes may differ if no model has all of them."""
    if not {"image.kind", "text.width"} <= numbers.keys():
        return None
    fits: dict[int, str] = {}
    for config in known_models():
        wrong = {key for key, value in numbers.items() if _value(config, key) != value}
        if wrong <= INPUT_SIZES:
            fits.setdefault(len(wrong), config.name)
    return fits[min(fits)] if fits else None
