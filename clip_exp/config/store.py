"""Making the schemas known to Hydra under the names that the defaults lists use."""

from hydra.core.config_store import ConfigStore

from clip_exp.config.evaluation_schema import EvaluateConfig
from clip_exp.config.schema import TrainConfig

SCHEMAS: dict[str, type] = {"train": TrainConfig, "evaluate": EvaluateConfig}  # by command


def register() -> None:
    store = ConfigStore.instance()
    for command, schema in SCHEMAS.items():
        store.store(name=f"{command}_schema", node=schema)
