"""Making the schemas known to Hydra under the names that the defaults lists use."""

from hydra.core.config_store import ConfigStore

from clip_exp.config.check_schema import CheckDataConfig
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
    "check-data": CheckDataConfig,
}


def config_name(command: str) -> str:
    """The name of a command's file in `conf/`, without its ending."""
    return command.replace("-", "_")


def register() -> None:
    register_open_clip()
    store = ConfigStore.instance()
    for command, schema in SCHEMAS.items():
        store.store(name=f"{config_name(command)}_schema", node=schema)
