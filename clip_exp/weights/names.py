"""Between our parameter names and those of other libraries: which layout a state dict has, and which tables of the families apply.

open_clip's classes are also the layout of OpenAI's, FlagAI's and Chinese-CLIP's checkpoints: the image tower is below `visual.`, the text
tower below `text.` (CustomTextCLIP) or below nothing (CLIP). transformers' CLIPModel, SiglipModel and ChineseCLIPModel have a layout of
their own, and so has big_vision, where names are written with slashes. A tower's own table is in its family (`Tower.names`).
A file of one tower may have its names in any of its tables, and also without the part that they all begin with: `Reading`.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from clip_exp.config.model import ImageTowerConfig, ModelConfig, TextTowerConfig
from clip_exp.errors import ConfigError
from clip_exp.models.depth import is_projection
from clip_exp.models.families.published import transformers_class
from clip_exp.renaming import SCALAR, Names, Row, rename

TOP = (Row("logit_scale", "logit_scale", SCALAR), Row("logit_bias", "logit_bias", SCALAR))
LOGITS = ("logit_scale", "logit_bias")
# Stored in some files, but no weights: OpenAI's three numbers, and constants of early versions of open_clip and transformers.
NOT_WEIGHTS = {"input_resolution", "context_length", "vocab_size", "attn_mask", "position_ids"}


class Layout(NamedTuple):
    """How the names of a whole model begin in a library's files."""

    image: str  # the first part of the image tower's names, by which the layout is known
    parts: frozenset[str]  # the first parts of all its names
    image_prefix: str = ""  # left out of names in the families' tables
    text_prefix: str = ""
    image_parts: tuple[str, ...] = ()  # what else the image tower's names begin with
    ignored: tuple[str, ...] = ()  # beginnings of what is in neither tower
    top: tuple[Row, ...] = TOP


LAYOUTS = {  # by name; those of files that have both towers
    "clip_exp": Layout("image", frozenset({*LOGITS, "image", "text"}), "image.", "text.", top=()),
    "open_clip": Layout(
        "visual",
        frozenset({*LOGITS, *NOT_WEIGHTS, "visual", "text", "transformer", "token_embedding", "positional_embedding"})
        | {"ln_final", "text_projection", "text_decoder", "bert"},
        "visual.",
        "text.",
        # CoCa's, and of Chinese-CLIP's encoder, which is pooled at its first token.
        ignored=("text_decoder.", "bert.pooler."),
    ),
    "transformers": Layout(
        "vision_model",
        frozenset({*LOGITS, "vision_model", "text_model", "visual_projection", "text_projection"}),
        image_parts=("visual_projection",),
    ),
    "big_vision": Layout(
        "img",
        frozenset({"img", "txt", "t", "b"}),
        "img.",
        "txt.",
        top=(Row("logit_scale", "t", SCALAR), Row("logit_bias", "b", SCALAR)),
    ),
}


class Reading(NamedTuple):
    """How a file may name the weights of one tower."""

    tower: str  # image or text
    rows: tuple[Row, ...]
    lacks: str  # what all names of the table begin with and those of the file do not, such as `trunk.`; or empty
    names: dict[str, str]  # of the file's names of the tower's weights, the table's
    branches: tuple[str, ...]  # beginnings of names of the tower, also of weights that the model does not have

    def has(self, name: str) -> bool:
        """Return whether a name in the file is one of the tower's."""
        return name in self.names or (name.startswith(self.branches) and name.rpartition(".")[2] not in NOT_WEIGHTS)

    def to_ours(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        theirs = {self.names.get(name, self.lacks + name): tensor for name, tensor in state.items()}
        return _below(f"{self.tower}.", rename(theirs, self.rows, to_theirs=False))


def readings(tower: str, config: ModelConfig, own: Mapping[str, Tensor]) -> Iterator[Reading]:
    """Yield the names that a file may have for a tower's weights.

    A backbone's own library writes them without the part of the model that holds it, and transformers' CLIPVisionModel without
    `vision_model.`.

    Args:
        tower: image or text.
        own: state dict of the tower, by name in the model.
    """
    bare = {name.removeprefix(f"{tower}."): torch.empty(tensor.shape, device="meta") for name, tensor in own.items()}
    needed = {name: tensor for name, tensor in bare.items() if not is_projection(name)}
    for rows in dict.fromkeys([(), *(names.rows for names in getattr(config, tower).names.values())]):
        theirs = rename(bare, rows, to_theirs=True)
        body = rename(needed, rows, to_theirs=True)
        common = {f"{name.partition('.')[0]}." for name in body}
        part = common.pop() if len(common) == 1 else ""
        modules = {name.rpartition(".")[0] or name for name in theirs}
        modules |= {
            part + name.removeprefix(part).partition(".")[0]
            for name in body
            if not is_projection(name.removeprefix(part))
        }
        for lacks in dict.fromkeys(["", part]):
            branches = tuple(f"{module}.".removeprefix(lacks) for module in modules if f"{module}." != part)
            yield Reading(tower, rows, lacks, {name.removeprefix(lacks): name for name in theirs}, branches)


def projections(names: Iterable[str]) -> set[str]:
    """Return those of a model's weights that map a tower's channels to the shared space."""
    return {name for name in names if is_projection(name.partition(".")[2])}


def to_ours(
    layout: "str | Reading | None", state: dict[str, Tensor], config: ModelConfig | None = None
) -> dict[str, Tensor]:
    """Return a state dict under our names; names that the layout does not have pass through.

    Args:
        layout: one of LAYOUTS; of one tower, its reading; None: no model's.
        config: of the model that the weights are for. It counts for towers of other libraries, whose names it must tell; towers of
            ours are recognized by the weights' names.
    """
    if layout is None or layout == "clip_exp":
        return state
    if isinstance(layout, Reading):
        return layout.to_ours(state)
    of = LAYOUTS[layout]
    weights = {name: tensor for name, tensor in state.items() if name.rpartition(".")[2] not in NOT_WEIGHTS}
    image, text, top = _by_tower(of, weights)
    theirs = config if config is not None and config.has_foreign_tower else None
    image_names = theirs.image.names.get(layout) if theirs else _recognized(ImageTowerConfig, layout, image, config)
    text_names = theirs.text.names.get(layout) if theirs else _recognized(TextTowerConfig, layout, text, config)
    return {
        **_below("image.", rename(image, _rows(image_names), to_theirs=False)),
        **_below("text.", rename(text, _rows(text_names), to_theirs=False)),
        **rename(top, of.top, to_theirs=False),
    }


def to_open_clip(state: dict[str, Tensor], config: ModelConfig | None = None) -> dict[str, Tensor]:
    """Return a state dict that open_clip loads strictly, from ours. Tensors are shared where the shape allows.

    Args:
        config: of the model; without one, the names tell which of our own towers they are of.

    Returns:
        CLIP's names where the text tower is CLIP's, or the architecture is one of open_clip's that has them; else
        CustomTextCLIP's.
    """
    image, text, top = _by_tower(LAYOUTS["clip_exp"], state)
    image_names, text_names = _names_of("open_clip", config, image, text)
    member = _member(TextTowerConfig, "clip_exp", text)
    prefix = config.text.prefix_in_open_clip(config) if config else member.open_clip_prefix if member else "text."
    return {
        **_below("visual.", rename(image, _rows(image_names), to_theirs=True)),
        **_below(prefix, rename(text, _rows(text_names), to_theirs=True)),
        **rename(top, TOP, to_theirs=True),
    }


def to_huggingface(state: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Return a state dict that transformers loads strictly, from ours.

    Raises:
        ConfigError: transformers has no class for these towers.
    """
    family = transformers_class(config)
    if family is None:
        raise ConfigError(f"model={config.name}: transformers has no class for its towers.")
    image, text, top = _by_tower(LAYOUTS["clip_exp"], state)
    image_names, text_names = _names_of("transformers", config, image, text)
    return {
        **rename(image, _rows(image_names), to_theirs=True),
        **rename(text, _rows(text_names), to_theirs=True),
        **(rename(top, TOP, to_theirs=True) if family.scalar_logits else top),
    }


def tower_numbers(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return what the shapes of a model's weights tell, by the keys of `ModelConfig`; nothing where they cannot be a model's."""
    image, text, _ = _by_tower(LAYOUTS["clip_exp"], state)
    found: dict[str, Any] = {}
    for tower, base, weights in (("image", ImageTowerConfig, image), ("text", TextTowerConfig, text)):
        member = _member(base, "clip_exp", weights)
        if member is None:
            continue
        try:
            numbers = member.numbers(weights)
        except (IndexError, ValueError, ZeroDivisionError):
            return {}
        if numbers and tower == "image":
            found["image.kind"] = member.model_fields["kind"].default
        found |= {key if key == "embed_dim" else f"{tower}.{key}": value for key, value in numbers.items()}
    return found


def _by_tower(layout: Layout, state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], ...]:
    """Return the image tower's weights, the text tower's, and the others, by name without the towers' prefixes."""
    image, text, top = {}, {}, {}
    for name, tensor in state.items():
        part = name.partition(".")[0]
        if name.startswith(layout.ignored):
            continue
        if part == layout.image or part in layout.image_parts:
            image[name.removeprefix(layout.image_prefix)] = tensor
        elif (
            part in LOGITS
            or any(part == row.theirs for row in layout.top)
            or (layout is LAYOUTS["clip_exp"] and part != "text")
        ):
            top[name] = tensor
        else:
            text[name.removeprefix(layout.text_prefix)] = tensor
    return image, text, top


def _names_of(
    layout: str, config: ModelConfig | None, image: Mapping[str, Tensor], text: Mapping[str, Tensor]
) -> tuple[Names | None, Names | None]:
    """Return the tables of a model's towers, from its configuration or by the names of their weights, which are ours."""
    if config is not None:
        return config.image.names.get(layout), config.text.names.get(layout)
    members = _member(ImageTowerConfig, "clip_exp", image), _member(TextTowerConfig, "clip_exp", text)
    image_names, text_names = (None if member is None else member.names.get(layout) for member in members)
    return image_names, text_names


def _rows(names: Names | None) -> tuple[Row, ...]:
    return () if names is None else names.rows


def _below(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in state.items()}


def _recognized(base: Any, layout: str, names: Iterable[str], config: ModelConfig | None) -> Names | None:
    """Return the table of the kind of tower that the names tell; of an incomplete one, which may lack its marks, the model's own."""
    member = _member(base, layout, names)
    own = next((tower for tower in config.towers if isinstance(tower, base)), None) if config else None
    if own is not None and (member is None or not member.names[layout].marks):
        return own.names.get(layout)
    return None if member is None else member.names[layout]


def _member(base: Any, layout: str, names: Iterable[str]) -> Any:
    """Return the kind of tower whose marks are all there, of several the one with the most."""
    names = list(names)
    found = [member for member in base.members() if layout in member.names and member.names[layout].answers(names)]
    return max(found, key=lambda member: len(member.names[layout].marks), default=None)
