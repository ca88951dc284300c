from collections.abc import Callable
from pathlib import Path

import pytest

from clip_exp.config.commands import ExportFormat
from clip_exp.config.model import ModelConfig
from clip_exp.export.write import write_export
from clip_exp.models.clip import CLIP
from tests.small_runs import nano, run_dir

__all__ = ["nano", "run_dir"]


@pytest.fixture
def export(tmp_path: Path) -> Callable[..., Path]:
    """Export a model without a run."""

    def write(model: CLIP, config: ModelConfig, chosen: str) -> Path:
        return write_export(model, config, None, tmp_path / "exported", ExportFormat(chosen)).folder

    return write
