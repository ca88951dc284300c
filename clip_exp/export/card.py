"""Model card of an export: architecture, origin, scores, and code that loads the model."""

import json
from functools import cache, partial
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from clip_exp._version import __version__
from clip_exp.config.commands import ExportFormat
from clip_exp.config.model import Activation, ModelConfig, ResizeMode, Tower
from clip_exp.data.images import preprocessing_of
from clip_exp.export.folder import CARD
from clip_exp.export.history import history_of
from clip_exp.export.onnx import any_length
from clip_exp.loading import ModelSource
from clip_exp.models.clip import CLIP
from clip_exp.models.families.published import transformers_class
from clip_exp.reports.html import number
from clip_exp.runs import write_text

# Libraries that load each format, by their names on the hub
LIBRARIES = {
    ExportFormat.open_clip: "open_clip",
    ExportFormat.huggingface: "transformers",
    ExportFormat.safetensors: "clip_exp",
    ExportFormat.onnx: "onnx",
}


def write_card(
    folder: Path, name: str, chosen: ExportFormat, model: CLIP, config: ModelConfig, source: ModelSource | None
) -> None:
    """Write `README.md`.

    Args:
        folder: folder to write to.
        name: final name of the folder, for the commands on the card.
        chosen: format of the export.
        model: exported model.
        config: configuration of the model.
        source: source of the weights; None: unknown.
    """
    length = config.text.context_length
    family = transformers_class(config)
    text = _environment().get_template("card.md").render(
        format=chosen.value,
        library=LIBRARIES[chosen],
        folder=name,
        title=source.run.name if source and source.run else config.name,
        family=family.prefix if family else "CLIP",
        version=__version__,
        model=config,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        facts=_facts(model, config),
        bias=None if model.logit_bias is None else model.logit_bias.item(),
        size=config.image.image_size,
        resize_mode=preprocessing_of(config.image).resize_mode.value,
        text_length=f"up to {length}" if any_length(model, config) else length,
        history=history_of(source),
    )  # fmt: skip
    write_text(folder / CARD, text)


def _facts(model: CLIP, config: ModelConfig) -> dict[str, Any]:
    """Return facts about the model's architecture and input."""
    size, mean, std, interpolation, resize_mode = preprocessing_of(config.image)
    squash = resize_mode is ResizeMode.squash
    tokenizer = "OpenAI's byte-pair encoding" if config.text.uses_openai_tokenizer else "in this folder"
    return {
        "image tower": _tower(config.image),
        "text tower": _tower(config.text),
        "shared space": f"{config.embed_dim} dimensions; features are normalized to unit norm",
        "activation": (config.activation or Activation.gelu).value,
        "images": f"RGB, {'both sides' if squash else 'shorter side'} resized to {size} ({interpolation})"
        + ("" if squash else f", center crop of {size} x {size}"),
        "mean of pixels in 0..1": ", ".join(map(str, mean)),
        "standard deviation": ", ".join(map(str, std)),
        "texts": f"at most {config.text.context_length} tokens; tokenizer: {tokenizer}",
        "logit scale": number(round(model.logit_scale.exp().item(), 4)),
        **({} if model.logit_bias is None else {"logit bias": number(round(model.logit_bias.item(), 4))}),
    }


def _tower(tower: Tower) -> str:
    name = getattr(tower, "name", None)
    parts = [tower.kind, Path(name).name if name else None]
    parts += [f"{key} {getattr(tower, key)}" for key in tower.architecture_keys]
    return ", ".join(part for part in parts if part)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("clip_exp.export"),
        # The output is Markdown; values are escaped by the filter `plain`.
        autoescape=False,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(plain=plain, number=number, quoted=partial(json.dumps, ensure_ascii=False))
    return environment


def plain(value: Any) -> str:
    """Escape a text for Markdown and HTML, also in a table."""
    text = " ".join(str(value).split())
    for character in "\\`*[]<>|":
        text = text.replace(character, {"<": "&lt;", ">": "&gt;"}.get(character, f"\\{character}"))
    return text
