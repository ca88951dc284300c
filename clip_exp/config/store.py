"""Making the schemas known to Hydra under the names that the defaults lists use."""

from hydra.core.config_store import ConfigStore

from clip_exp.config.evaluation_schema import EvaluateConfig
from clip_exp.config.open_clip import register_open_clip
from clip_exp.config.schema import TrainConfig
from clip_exp.config.use_schema import ExportConfig, ModelsConfig, PredictConfig, RankConfig, SearchConfig

SCHEMAS: dict[str, type] = {  # by command
    "train": TrainConfig,
    "evaluate": EvaluateConfig,
    "predict": PredictConfig,
    "rank": RankConfig,
    "search": SearchConfig,
    "export": ExportConfig,
    "models": ModelsConfig,
}


def register() -> None:
    register_open_clip()
    store = ConfigStore.instance()
    for command, schema in SCHEMAS.items():
        store.store(name=f"{command}_schema", node=schema)
