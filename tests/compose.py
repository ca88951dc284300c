"""Configurations in tests, composed as the command line composes them."""

from functools import cache

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from clip_exp.config.load import load_train
from clip_exp.config.paths import conf_dir
from clip_exp.config.schema import TrainConfig
from clip_exp.config.store import config_name, register

register_once = cache(register)


def compose_config(*overrides: str, command: str = "train") -> DictConfig:
    register_once()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return compose(config_name(command), overrides=list(overrides))


def train_config(*overrides: str) -> TrainConfig:
    return load_train(compose_config(*overrides))
