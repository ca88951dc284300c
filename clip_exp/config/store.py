"""Making the schemas known to Hydra under the names that the defaults lists use."""

from hydra.core.config_store import ConfigStore

from clip_exp.config.evaluation_schema import EvaluateConfig
from clip_exp.config.schema import TrainConfig
from clip_exp.config.use_schema import PredictConfig, RankConfig, SearchConfig

SCHEMAS: dict[str, type] = {  # by command
    "train": TrainConfig,
    "evaluate": EvaluateConfig,
    "predict": PredictConfig,
    "rank": RankConfig,
    "search": SearchConfig,
}


def register() -> None:
    store = ConfigStore.instance()
    for command, schema in SCHEMAS.items():
        store.store(name=f"{command}_schema", node=schema)
