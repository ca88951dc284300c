"""Command `clip-exp models`: available models with their sizes and published weights."""

from functools import cache
from typing import Any

import clip_exp.open_clip_files as open_clip_files
from clip_exp.config.commands import ModelsConfig
from clip_exp.config.files import options
from clip_exp.config.model import ModelConfig
from clip_exp.config.names import ADAPTER, QUICK_GELU, named_model
from clip_exp.inference.outputs import Report, check_output, write
from clip_exp.weights.inspect import activation_of_entry

OVERVIEW = ("name", "open_clip_name", "image_tower", "image_size", "parameters_millions", "tags")
ONE = ("tag", "activation", "images", "mean", "std", "from")
SHOWN_TAGS = 3


def models(config: ModelsConfig) -> int:
    """Print or write the list of models, or the weights of one model; return the exit code.

    Raises:
        ConfigError: the model is unknown, or `output` is not a valid file.
        CheckpointError: the file cannot be written.
    """
    check_output(config)
    write(_overview(config.all) if config.name is None else _one(config.name), config)
    return 0


def _overview(everything: bool) -> Report:
    documents = [_described(named_model(name)) for name in options("model") if name != ADAPTER]
    if everything:
        documents += [_of_open_clip(name) for name in open_clip_files.configurations() if _is_another(name, documents)]
    rows = [
        (
            document["name"],
            document["open_clip_name"] or "",
            document["image_tower"],
            document["image_size"],
            "" if document["parameters"] is None else document["parameters"] / 1e6,
            _first(document["tags"]),
        )
        for document in documents
    ]
    return Report(OVERVIEW, rows, {"models": documents})


def _first(tags: list[str]) -> str:
    """Return the first tags for a table; `name=…` and the other formats show all."""
    more = f" and {len(tags) - SHOWN_TAGS} more" if len(tags) > SHOWN_TAGS else ""
    return ", ".join(tags[:SHOWN_TAGS]) + more


def _one(name: str) -> Report:
    model = named_model(name)
    found = [open_clip_files.entry(model.open_clip_name, tag) for tag in open_clip_files.tags(model.open_clip_name)]
    weights = [_published(entry, model) for entry in found if entry is not None]
    rows = [
        (
            one["tag"],
            one["activation"],
            f"{one['resize_mode']}, {one['interpolation']}",
            _numbers(one["mean"]),
            _numbers(one["std"]),
            one["hub"] or one["url"],
        )
        for one in weights
    ]
    document = _of_open_clip(model.name) if model.name == model.open_clip_name else _described(model)
    return Report(ONE, rows, {**document, "weights": weights})


def _described(model: ModelConfig) -> dict[str, Any]:
    return {
        "name": model.name,
        "open_clip_name": model.open_clip_name,
        "image_tower": str(model.image.kind),
        "text_tower": str(model.text.kind),
        "image_size": model.image.image_size,
        "embed_dim": model.embed_dim,
        "parameters": _count(model.name),
        "tags": open_clip_files.tags(model.open_clip_name),
    }


def _of_open_clip(name: str) -> dict[str, Any]:
    """Return a configuration of open_clip; its number of parameters is unknown without building the model."""
    values = open_clip_files.configuration(name)
    return {
        "name": name,
        "open_clip_name": name,
        "image_tower": ADAPTER,
        "text_tower": ADAPTER,
        "image_size": values["vision_cfg"].get("image_size"),
        "embed_dim": values.get("embed_dim"),
        "parameters": None,
        "tags": open_clip_files.tags(name),
    }


def _is_another(open_clip_name: str, ours: list[dict[str, Any]]) -> bool:
    """Return True for a configuration of images and texts that clip_exp does not implement itself."""
    known = {document["open_clip_name"] for document in ours}
    return open_clip_name.removesuffix(QUICK_GELU) not in known and "vision_cfg" in open_clip_files.configuration(
        open_clip_name
    )


def _published(entry: open_clip_files.Entry, model: ModelConfig) -> dict[str, Any]:
    return {
        "tag": entry.tag,
        "activation": str(activation_of_entry(entry, model) or model.activation or "its own"),
        "mean": entry.mean,
        "std": entry.std,
        "interpolation": str(entry.interpolation),
        "resize_mode": str(entry.resize_mode),
        "hub": None if entry.hub is None else "/".join(filter(None, (entry.hub, entry.hub_file))),
        "url": entry.url,
        "sha256": entry.sha256,
    }


@cache
def _count(name: str) -> int:
    """Return the number of parameters of a model of clip_exp, without allocating them."""
    # Torch takes seconds to import, so it is imported only after the checks.
    import torch

    from clip_exp.models.clip import build_model

    model = named_model(name)
    has_bias = model.text.sigmoid
    with torch.device("meta"):
        built = build_model(model, init_logit_bias=0.0 if has_bias else None)
    return sum(parameter.numel() for parameter in built.parameters())


def _numbers(values: list[float]) -> str:
    return " ".join(f"{value:.3g}" for value in values)
