"""Class names and prompt templates: OpenAI's 80, the 7 simple ones, ImageNet's 1,000 names, or the user's own.

The published lists come from the installed `open_clip_torch` (names, templates) and `timm` (wnids); their files are
found and read without importing those packages, which would take seconds. This module imports no torch.
"""

from functools import cache

from clip_exp.errors import ConfigError
from clip_exp.evaluation.sets.texts import read_lines
from clip_exp.open_clip_files import package_folder, zero_shot_metadata

PLACEHOLDER = "{}"
NAMED_TEMPLATES = {"openai": "OPENAI_IMAGENET_TEMPLATES", "simple": "SIMPLE_IMAGENET_TEMPLATES"}


def templates(source: str | list[str], where: str = "templates") -> list[str]:
    """Prompt templates, each with `{}` in the place of the class name.

    Args:
        source: `openai` (80), `simple` (7), a list, one template, or a file: plain text with one template per line, or a
            list as YAML or JSON.
        where: the configuration key, for messages.
    Raises:
        ConfigError: no such file, no templates, or one without `{}`.
    """
    if isinstance(source, str) and source in NAMED_TEMPLATES:
        return [template(PLACEHOLDER) for template in getattr(zero_shot_metadata(), NAMED_TEMPLATES[source])]
    if isinstance(source, str) and PLACEHOLDER in source:
        source = [source]
    found = read_lines(
        source, where, "openai, simple, a list, or a file of templates (a line each, or a list as YAML or JSON)"
    )
    for template in found:
        if PLACEHOLDER not in template:
            raise ConfigError(
                f"{where}: '{template}' has no {PLACEHOLDER} for the class name, as in 'a photo of a {{}}.'."
            )
    return found


def class_prompts(class_name: str, templates: list[str]) -> list[str]:
    """The templates filled in. Not `str.format`: class names and templates may hold other braces."""
    return [template.replace(PLACEHOLDER, class_name) for template in templates]


@cache
def imagenet_classes() -> list[tuple[str, str]]:
    """ImageNet-1k's classes as (wnid, OpenAI's name), in the order of the wnids.

    1,000 entries: `missile` and `sunglasses` are each the name of two classes.
    """
    wnids = (package_folder("timm") / "data/_info/imagenet_synsets.txt").read_text(encoding="utf-8").split()
    return list(zip(wnids, zero_shot_metadata().IMAGENET_CLASSNAMES, strict=True))
