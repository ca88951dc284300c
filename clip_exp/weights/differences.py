"""How the weights of a file and of a model differ, in few words."""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator
from operator import attrgetter
from typing import Any

from torch import Tensor

from clip_exp.config.model_schema import ImageTower
from clip_exp.config.models import known_models

NUMBER = re.compile(r"(?<=\.)\d{1,6}(?=\.)")
INPUT_SIZES = {"image.image_size", "text.context_length"}  # a model may have been made for several
IMAGE_POSITIONS = ("image.positional_embedding", "image.pool.positional_embedding")  # a ResNet has them in its pooling
RESNET_STRIDE = 32  # pixels a side of what one position of a ResNet's last feature map stands for


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
        alike[NUMBER.sub("*", label)].append((label, count))
    for pattern, members in alike.items():
        yield _common(pattern, [label for label, _ in members]), sum(count for _, count in members)


def _branches(name: str) -> Iterator[str]:
    """The beginnings of a dotted name, shortest first."""
    parts = name.split(".")
    return (".".join(parts[:length]) for length in range(1, len(parts)))


def _common(pattern: str, labels: list[str]) -> str:
    if len(labels) == 1:
        return labels[0]
    numbers = sorted(int(found[0]) for label in labels if len(found := NUMBER.findall(label)) == 1)
    if numbers != list(range(numbers[0], numbers[-1] + 1) if numbers else []) or len(numbers) != len(labels):
        return pattern
    return NUMBER.sub(f"{numbers[0]}-{numbers[-1]}", labels[0])


def _with_count(label: str, count: int) -> str:
    return f"{label} ({count} weights)" if count > 1 else label


def numbers_of(state: dict[str, Tensor]) -> dict[str, Any]:
    """What the shapes of a model with towers of ours tell about it, by the keys of `ModelConfig`; less for other towers.

    Nothing where they cannot be a model's.
    """
    try:
        return _numbers_of_both(state) | _numbers_of_image(state)
    except (IndexError, ValueError, ZeroDivisionError):
        return {}


def _numbers_of_both(state: dict[str, Tensor]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for tower in ("image", "text"):
        blocks = {
            number[0] for name in state if (number := re.search(rf"^{tower}\.transformer\.blocks\.(\d+)\.", name))
        }
        if blocks:
            found[f"{tower}.layers"] = len(blocks)
    if (text := state.get("text.token_embedding.weight")) is not None:
        found["text.vocab_size"], found["text.width"] = text.shape
    if (positions := state.get("text.positional_embedding")) is not None:
        found["text.context_length"] = positions.shape[-2]
    if (projection := state.get("text.projection.weight")) is not None:
        found["embed_dim"] = projection.shape[0]
    return found


def _numbers_of_image(state: dict[str, Tensor]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    positions = next((state[name] for name in IMAGE_POSITIONS if name in state), None)
    if (stem := state.get("image.stem.conv1.weight")) is not None:
        blocks = {(int(i), j) for name in state for i, j in re.findall(r"^image\.stages\.(\d+)\.(\d+)\.", name)}
        count = Counter(stage for stage, _ in blocks)
        found = {"image.kind": ImageTower.resnet, "image.width": 2 * stem.shape[0]}
        found["image.stages"] = [count[stage] for stage in sorted(count)]
        cell = RESNET_STRIDE
    elif (patches := state.get("image.patch_embedding.weight")) is not None:
        cell = math.isqrt(patches[0].numel() // 3)
        kind = ImageTower.siglip if "image.pool.latent" in state else ImageTower.vit
        found = {"image.kind": kind, "image.width": patches.shape[0], "image.patch_size": cell}
    if found and positions is not None:
        found["image.image_size"] = math.isqrt(positions.shape[-2]) * cell
    return found


def known_model(numbers: dict[str, Any]) -> str | None:
    """The model of `conf/model/` with these numbers, or with all but the sizes of its inputs."""
    if not {"image.kind", "text.width"} <= numbers.keys():
        return None
    fits: dict[int, str] = {}
    for config in known_models():
        wrong = {key for key, value in numbers.items() if attrgetter(key)(config) != value}
        if wrong <= INPUT_SIZES:
            fits.setdefault(len(wrong), config.name)
    return fits[min(fits)] if fits else None
