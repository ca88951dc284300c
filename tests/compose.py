"""Configurations in tests, composed as the command line composes them."""

from omegaconf import DictConfig

from clip_exp.config import compose
from clip_exp.config.training import TrainConfig


def compose_config(*overrides: str, command: str = "train") -> DictConfig:
    """Return what Hydra composes, before the schema has judged it."""
    return compose.compose_config(command, list(overrides))


def train_config(*overrides: str) -> TrainConfig:
    return compose.compose("train", list(overrides))
