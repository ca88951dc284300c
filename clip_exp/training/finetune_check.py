"""What only a tower's modules tell, looked at before weights are fetched. Imports torch where there is such a thing."""

from clip_exp.config.schema import TrainConfig


def rehearse(config: TrainConfig) -> None:
    """Build the model without memory, and look for the layers that `finetune` counts or names, where either may not fit.

    Args:
        config: with the architectures of its encoders noted: nothing is fetched.

    Raises:
        ConfigError: see `build_model`, `freeze` and `check_adapted`.
    """
    if not (config.model.has_foreign_tower or _counts_layers(config)):
        return
    import torch

    from clip_exp.models.build import build_model
    from clip_exp.training.finetune import check_adapted, prepare

    with torch.device("meta"):
        model = build_model(config.model)
    if config.finetune.lora is None:
        prepare(model, config.finetune, config.model)
    else:  # encoders of transformers do not run without memory
        check_adapted(model, config.finetune.lora)


def _counts_layers(config: TrainConfig) -> bool:
    tuning = config.finetune
    return tuning.lora is not None or any(tower.unfrozen_blocks is not None for tower in (tuning.image, tuning.text))
