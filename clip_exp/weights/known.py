"""The models of `conf/model/` by their configurations, without torch."""

from collections.abc import Iterator
from typing import Any

from omegaconf import MISSING, OmegaConf

from clip_exp.config.load import strict_dataclass
from clip_exp.config.model_schema import ModelConfig
from clip_exp.config.paths import conf_dir, options


def known_models() -> Iterator[ModelConfig]:
    """Those that are complete: not the ones that take the name of an architecture."""
    for option in options("model"):
        values: Any = OmegaConf.to_container(OmegaConf.load(conf_dir() / "model" / f"{option}.yaml"))
        if values["name"] != MISSING:
            yield strict_dataclass(ModelConfig, values, "model")
