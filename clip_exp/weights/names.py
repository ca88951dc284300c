"""Conversion between our parameter names and those of other libraries: detects the layout of a state dict, and applies the families' tables.

open_clip's layout is also that of OpenAI's, FlagAI's and Chinese-CLIP's checkpoints: the image tower is under
`visual.`, and the text tower under `text.` (CustomTextCLIP) or at the top level (CLIP). transformers' CLIPModel,
SiglipModel and ChineseCLIPModel share another layout. big_vision has a third one, with slashes in the names. The
renaming table of a tower is in its family (`Tower.names`). In a file of a single tower, the names can be those of any
of its tables, also without their common prefix: `TowerLayout`.
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
# Entries of some files that are not weights: three numbers of OpenAI, and constants of early versions of open_clip and
# transformers
NOT_WEIGHTS = {"input_resolution", "context_length", "vocab_size", "attn_mask", "position_ids"}


class Layout(NamedTuple):
    """Layout of the names of a whole model in a library's files.

    Attributes:
        image: first part of the image tower's names, which identifies the layout.
        parts: first parts of all names.
        image_prefix: prefix of the image tower's names, which the families' tables leave out.
        text_prefix: prefix of the text tower's names, which the families' tables leave out.
        image_parts: further first parts of the image tower's names.
        ignored: prefixes of names that belong to neither tower.
        top: renaming table of the other names.
    """

    image: str
    parts: frozenset[str]
    image_prefix: str = ""
    text_prefix: str = ""
    image_parts: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    top: tuple[Row, ...] = TOP


# Layouts of files with both towers, by name
LAYOUTS = {
    "clip_exp": Layout("image", frozenset({*LOGITS, "image", "text"}), "image.", "text.", top=()),
    "open_clip": Layout(
        "visual",
        frozenset({*LOGITS, *NOT_WEIGHTS, "visual", "text", "transformer", "token_embedding", "positional_embedding"})
        | {"ln_final", "text_projection", "text_decoder", "bert"},
        "visual.",
        "text.",
        # CoCa's decoder, and the pooler of Chinese-CLIP's encoder, which uses the first token instead.
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


class TowerLayout(NamedTuple):
    """Possible layout of the names of a single tower in a file.

    Attributes:
        tower: image or text.
        rows: renaming table.
        omitted_prefix: prefix of all names in the table that the names in the file do not have, such as `trunk.`; may
            be empty.
        names: mapping from names in the file to names in the table, for the weights of the tower.
        branches: prefixes of names of the tower, including weights that the model does not have.
    """

    tower: str
    rows: tuple[Row, ...]
    omitted_prefix: str
    names: dict[str, str]
    branches: tuple[str, ...]

    def has(self, name: str) -> bool:
        """Return True if a name in the file belongs to the tower."""
        return name in self.names or (name.startswith(self.branches) and name.rpartition(".")[2] not in NOT_WEIGHTS)

    def to_ours(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rename the weights of the tower to our names."""
        theirs = {self.names.get(name, self.omitted_prefix + name): tensor for name, tensor in state.items()}
        return _with_prefix(f"{self.tower}.", rename(theirs, self.rows, to_theirs=False))


def tower_layouts(tower: str, config: ModelConfig, expected: Mapping[str, Tensor]) -> Iterator[TowerLayout]:
    """Yield the possible layouts of a tower's weights in a file.

    The library of a backbone saves it without the name of the attribute that contains it in the model, and
    transformers' CLIPVisionModel is saved without `vision_model.`.

    Args:
        tower: image or text.
        config: configuration of the model.
        expected: state dict of the tower, by name in the model.
    """
    bare = {
        name.removeprefix(f"{tower}."): torch.empty(tensor.shape, device="meta") for name, tensor in expected.items()
    }
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
        for omitted_prefix in dict.fromkeys(["", part]):
            branches = tuple(f"{module}.".removeprefix(omitted_prefix) for module in modules if f"{module}." != part)
            yield TowerLayout(
                tower, rows, omitted_prefix, {name.removeprefix(omitted_prefix): name for name in theirs}, branches
            )


def projections(names: Iterable[str]) -> set[str]:
    """Return the names of the weights that project a tower's output to the shared embedding space."""
    return {name for name in names if is_projection(name.partition(".")[2])}


def to_ours(
    layout: "str | TowerLayout | None", state: dict[str, Tensor], config: ModelConfig | None = None
) -> dict[str, Tensor]:
    """Rename a state dict to our names. Names that are not in the layout are unchanged.

    Args:
        layout: one of LAYOUTS; for a single tower, its layout; None: not a model's.
        state: tensors by name.
        config: configuration of the model. It is required for towers of other libraries; our own towers are recognized
            by the names.
    """
    if layout is None or layout == "clip_exp":
        return state
    if isinstance(layout, TowerLayout):
        return layout.to_ours(state)
    of = LAYOUTS[layout]
    weights = {name: tensor for name, tensor in state.items() if name.rpartition(".")[2] not in NOT_WEIGHTS}
    image, text, top = _by_tower(of, weights)
    theirs = config if config is not None and config.has_foreign_tower else None
    image_names = theirs.image.names.get(layout) if theirs else _recognized(ImageTowerConfig, layout, image, config)
    text_names = theirs.text.names.get(layout) if theirs else _recognized(TextTowerConfig, layout, text, config)
    return {
        **_with_prefix("image.", rename(image, _rows(image_names), to_theirs=False)),
        **_with_prefix("text.", rename(text, _rows(text_names), to_theirs=False)),
        **rename(top, of.top, to_theirs=False),
    }


def to_open_clip(state: dict[str, Tensor], config: ModelConfig | None = None) -> dict[str, Tensor]:
    """Convert our state dict to one that open_clip loads strictly. Tensors share memory if their shape does not change.

    Args:
        state: tensors by our names.
        config: configuration of the model; without it, our own towers are recognized by the names.

    Returns:
        Tensors by the names of open_clip's class CLIP if the text tower is CLIP's or the architecture has these names
        in open_clip; else by those of CustomTextCLIP.
    """
    image, text, top = _by_tower(LAYOUTS["clip_exp"], state)
    image_names, text_names = _names_of("open_clip", config, image, text)
    member = _member(TextTowerConfig, "clip_exp", text)
    prefix = config.text.prefix_in_open_clip(config) if config else member.open_clip_prefix if member else "text."
    return {
        **_with_prefix("visual.", rename(image, _rows(image_names), to_theirs=True)),
        **_with_prefix(prefix, rename(text, _rows(text_names), to_theirs=True)),
        **rename(top, TOP, to_theirs=True),
    }


def to_huggingface(state: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Convert our state dict to one that transformers loads strictly.

    Raises:
        ConfigError: transformers has no class for the towers.
    """
    family = transformers_class(config)
    if family is None:
        raise ConfigError(f"model={config.name} cannot be converted: transformers has no class for its towers.")
    image, text, top = _by_tower(LAYOUTS["clip_exp"], state)
    image_names, text_names = _names_of("transformers", config, image, text)
    return {
        **rename(image, _rows(image_names), to_theirs=True),
        **rename(text, _rows(text_names), to_theirs=True),
        **(rename(top, TOP, to_theirs=True) if family.scalar_logits else top),
    }


def tower_numbers(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Infer values of `ModelConfig`, by key, from the shapes of a model's weights; empty if the shapes are not those of a model."""
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
    """Split weights into those of the image tower, those of the text tower, and others, without the towers' prefixes."""
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
    """Return the tables of a model's towers, from its configuration or by our names of their weights."""
    if config is not None:
        return config.image.names.get(layout), config.text.names.get(layout)
    members = _member(ImageTowerConfig, "clip_exp", image), _member(TextTowerConfig, "clip_exp", text)
    image_names, text_names = (None if member is None else member.names.get(layout) for member in members)
    return image_names, text_names


def _rows(names: Names | None) -> tuple[Row, ...]:
    return () if names is None else names.rows


def _with_prefix(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in state.items()}


def _recognized(base: Any, layout: str, names: Iterable[str], config: ModelConfig | None) -> Names | None:
    """Return the table of the kind of tower that is recognized by names; for incomplete weights, that of the configured tower."""
    member = _member(base, layout, names)
    configured = next((tower for tower in config.towers if isinstance(tower, base)), None) if config else None
    if configured is not None and (member is None or not member.names[layout].marks):
        return configured.names.get(layout)
    return None if member is None else member.names[layout]


def _member(base: Any, layout: str, names: Iterable[str]) -> Any:
    """Return the kind of tower whose marks all occur in the names; if there are several, the one with the most marks."""
    names = list(names)
    found = [member for member in base.members() if layout in member.names and member.names[layout].answers(names)]
    return max(found, key=lambda member: len(member.names[layout].marks), default=None)
