"""A run's own copy of its tokenizer, so that its folder can be used where the original is not. Imports no torch."""

from dataclasses import replace
from pathlib import Path

from clip_exp.config.model_schema import ModelConfig, TextTower, TextTowerConfig
from clip_exp.errors import CheckpointError
from clip_exp.storage import atomic_folder, system_error

FOLDER = "tokenizer"  # in a run folder


def source_of(text: TextTowerConfig) -> str | None:
    """Return where a tower's tokenizer comes from: a folder or a name on the hub; None for OpenAI's, which the package carries."""
    return text.tokenizer or (text.name if text.kind is TextTower.huggingface else None)


def check_tokenizer(model: ModelConfig) -> None:
    """Refuse a model whose tokenizer cannot be had.

    Raises:
        ConfigError: so it is, or it does not fit the text tower.
    """
    if source_of(model.text) is not None:
        from clip_exp.text.huggingface import HuggingFaceTokenizer  # imports torch

        HuggingFaceTokenizer.of(model.text)


def save_tokenizer(model: ModelConfig, run_dir: Path) -> None:
    """Copy the model's tokenizer into a run folder, unless it is there already.

    Raises:
        ConfigError: it cannot be had.
        CheckpointError: the disk is full, or the folder cannot be written.
    """
    source, folder = source_of(model.text), run_dir / FOLDER
    if source is None or folder.is_dir():
        return
    from clip_exp.text.huggingface import save  # imports torch

    try:
        with atomic_folder(folder) as temporary:
            save(source, temporary)
    except Exception as error:
        problem = system_error(error)
        if problem is None:
            raise
        raise CheckpointError(f"{folder} cannot be written: {problem.strerror or problem}.") from error


def with_saved_tokenizer(model: ModelConfig, run_dir: Path) -> ModelConfig:
    """The configuration of a run's model, with the run's own copy of the tokenizer if it has one."""
    folder = run_dir / FOLDER
    return replace(model, text=replace(model.text, tokenizer=str(folder))) if folder.is_dir() else model
