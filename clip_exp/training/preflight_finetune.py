"""Checks of what is trained, and how fast, before weights are fetched. Torch is imported only where modules are counted."""

from collections.abc import Iterator

from clip_exp.config.model_rules import own_towers
from clip_exp.config.model_schema import Projection
from clip_exp.config.schema import FineTuneConfig, LoRAConfig, TowerTuningConfig, TrainConfig


def check_finetune(config: TrainConfig) -> Iterator[str]:
    """What makes a fine-tuning impossible, a line each."""
    tuning = config.finetune
    yield from _check_tower("image", tuning.image)
    yield from _check_tower("text", tuning.text)
    if tuning.lora is not None:
        yield from _check_lora(tuning, tuning.lora)
    elif all(tower.freeze and tower.unfrozen_blocks is None for tower in (tuning.image, tuning.text)):
        yield (
            "finetune.image.freeze and finetune.text.freeze leave nothing but the logit scale to train: "
            "leave one out, or set unfrozen_blocks."
        )
    yield from _check_start(config)
    yield from _check_probe(config)


def _check_tower(tower: str, tuning: TowerTuningConfig) -> Iterator[str]:
    key = f"finetune.{tower}"
    if not 0 < tuning.lr_factor < float("inf"):
        yield f"{key}.lr_factor={tuning.lr_factor} must be above 0; {key}.freeze=true keeps the tower as it is."
    if not 0 < tuning.layer_decay <= 1:
        yield f"{key}.layer_decay={tuning.layer_decay} must be above 0 and at most 1."
    if tuning.unfrozen_blocks is not None and tuning.unfrozen_blocks < 0:
        yield f"{key}.unfrozen_blocks={tuning.unfrozen_blocks} must not be negative; 0 trains what follows the blocks."


def _check_lora(tuning: FineTuneConfig, lora: LoRAConfig) -> Iterator[str]:
    if lora.rank < 1:
        yield f"finetune.lora.rank={lora.rank} must be above 0."
    if not 0 < lora.alpha < float("inf"):
        yield f"finetune.lora.alpha={lora.alpha} must be above 0."
    if not 0 <= lora.dropout < 1:
        yield f"finetune.lora.dropout={lora.dropout} must be at least 0 and below 1."
    if not (lora.image or lora.text):
        yield "finetune.lora.image and finetune.lora.text are both false: one tower must get adapters."
    for tower in ("image", "text"):
        if getattr(tuning, tower).freeze:
            yield (
                f"finetune.{tower}.freeze and finetune.lora exclude each other: lora freezes all weights already, "
                f"and finetune.lora.{tower}=false leaves the tower without adapters."
            )
    if tuning.linear_probe_steps:
        yield "finetune.linear_probe_steps and finetune.lora exclude each other: lora freezes the projections."


def _check_start(config: TrainConfig) -> Iterator[str]:
    """What stays as it is must come from somewhere."""
    tuning, towers = config.finetune, ("image", "text")
    begun = set(towers) if config.pretrained is not None else own_towers(config.model)
    for tower in towers:
        if tower not in begun and (getattr(tuning, tower).freeze or tuning.lora is not None):
            key = f"finetune.{tower}.freeze" if tuning.lora is None else "finetune.lora"
            yield f"{key} would keep random weights in the {tower} tower: set pretrained=…"
        elif config.pretrained is None and getattr(config.model, tower).projection is not Projection.none:
            yield from _check_projection(tower, tuning)
    if tuning.linear_probe_steps and not begun:
        yield "finetune.linear_probe_steps would fit projections to towers of random weights: set pretrained=…"


def _check_projection(tower: str, tuning: FineTuneConfig) -> Iterator[str]:
    """A tower with its own library's weights has a projection that nobody trained."""
    if tuning.lora is not None:
        yield (
            f"finetune.lora would keep the random projection of the {tower} tower: train that first "
            f"(finetune.{tower}.freeze=true finetune.{tower}.unfrozen_blocks=0), and start the adapters from that run."
        )
    elif getattr(tuning, tower).freeze and getattr(tuning, tower).unfrozen_blocks is None:
        yield (
            f"finetune.{tower}.freeze would keep the random projection of the {tower} tower: set "
            f"finetune.{tower}.unfrozen_blocks=0, which trains it."
        )


def _check_probe(config: TrainConfig) -> Iterator[str]:
    """Where the length of the run is known only from its data, it is checked when that has been read."""
    probe = config.finetune.linear_probe_steps
    if probe < 0:
        yield f"finetune.linear_probe_steps={probe} must not be negative."
    elif probe and config.max_steps is not None:
        yield from probe_problems(config, config.max_steps)


def probe_problems(config: TrainConfig, total_steps: int) -> Iterator[str]:
    """Why a run of `total_steps` has no room for its linear probe and the warm-up after it."""
    probe, warmup = config.finetune.linear_probe_steps, config.scheduler.warmup_steps or 0
    if probe >= total_steps:
        yield f"finetune.linear_probe_steps={probe} must be less than the {total_steps} steps of the run: the towers would never learn."
    elif probe and probe + warmup > total_steps:
        yield (
            f"scheduler.warmup_steps={warmup} after finetune.linear_probe_steps={probe} is longer than the run of {total_steps} steps: "
            "the towers' learning rate would never peak."
        )


def rehearse(config: TrainConfig) -> None:
    """Look for the layers that `finetune` counts or names, in a model without memory, where they may be missing.

    Args:
        config: with the architectures of its encoders noted: nothing is fetched.

    Raises:
        ConfigError: see `rehearse_layers`.
    """
    if not (config.model.has_foreign_tower or _counts_layers(config)):
        return
    from clip_exp.training.optim import rehearse_layers  # imports torch

    rehearse_layers(config.model, config.finetune)


def _counts_layers(config: TrainConfig) -> bool:
    tuning = config.finetune
    return tuning.lora is not None or any(tower.unfrozen_blocks is not None for tower in (tuning.image, tuning.text))
