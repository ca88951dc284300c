"""A command's configuration from overrides, as the command line composes it, without the command line."""

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from omegaconf import DictConfig

from clip_exp.config.models import translate
from clip_exp.config.overrides import MULTIRUN_FLAGS, check_arguments, explain, quote
from clip_exp.config.paths import conf_dir
from clip_exp.config.store import config_name, register
from clip_exp.errors import ConfigError


def compose(command: str, overrides: list[str]) -> DictConfig:
    """The configuration of `command` (train, evaluate, …); values that Hydra cannot read are quoted.

    Raises:
        ConfigError: an unknown key or option, a wrong type, an override that cannot be read, or a flag such as `-m`.
    """
    flags = [text for text in overrides if text.startswith("-")]
    if flags:
        what = "a sweep is for the command line" if MULTIRUN_FLAGS & set(flags) else "flags are for the command line"
        raise ConfigError(f"{flags[0]}: {what}; give key=value.")
    register()
    overrides = translate(overrides)
    check_arguments(overrides)
    try:
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            return hydra_compose(config_name(command), overrides=quote(overrides))
    except Exception as error:
        message = explain(error)
        if message is None:
            raise
        raise ConfigError(message) from error
