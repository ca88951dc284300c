"""Keys without effect: which keys the chosen options do not use. One table, for training, models and tasks.

A key that was set and is not used is refused: the run would be another one than was requested. A key counts as set where its
value is not the schema's default, wherever that value comes from, or where it stands on the command line; null and false ask
for nothing. A default that is written out, as in the `config.yaml` of a run, is never refused.

To add a key, add a line to a table. `tests/training/test_every_key.py` and `tests/evaluation/test_every_key.py` change every key
of the schema, and fail for one that neither has an effect nor is refused.
"""

import dataclasses
from collections.abc import Callable, Collection, Iterable, Iterator
from operator import attrgetter
from typing import Any, NamedTuple

from clip_exp.config.data_schema import GenerateConfig, Generator, Shuffle
from clip_exp.config.evaluation_schema import (
    EvaluateConfig,
    LabeledDataConfig,
    LinearProbeTaskConfig,
    RobustnessTaskConfig,
)
from clip_exp.config.model_rules import backbone_of, has_encoder, uses_activation, uses_openai
from clip_exp.config.model_schema import ImageTower, ModelConfig, TextTower
from clip_exp.config.schema import LossName, StrategyName, TrainConfig


class Idle(NamedTuple):
    """Keys that have no effect under a condition.

    Attributes:
        keys: below the configuration that the table is for, separated by blanks.
        when: the condition, of that configuration.
        why: what follows "has no effect"; `{c.name}` is a value of the configuration, `{at}` the beginning of the full keys.
        fix: what to do instead.
        typed_only: refused on the command line only, since a file of `conf/` may set it for other options than were chosen.
    """

    keys: str
    when: Callable[[Any], bool]
    why: str
    fix: str = "leave it out"
    typed_only: bool = False


# ----------------------------------------------------------------------------------------------------------- models

# The kinds of towers that use a key; keys that are not here are used by all.
_OWN_IMAGE, _OWN_TEXT = (ImageTower.vit, ImageTower.siglip), (TextTower.clip, TextTower.siglip)
IMAGE_KEYS: dict[str, tuple[ImageTower, ...]] = {
    "patch_size": _OWN_IMAGE,
    "width": (*_OWN_IMAGE, ImageTower.resnet),
    "layers": _OWN_IMAGE,
    "stages": (ImageTower.resnet,),
    "heads": (*_OWN_IMAGE, ImageTower.resnet),
    "mlp_ratio": _OWN_IMAGE,
    "name": (ImageTower.timm,),
    "projection": (ImageTower.timm,),
}
TEXT_KEYS: dict[str, tuple[TextTower, ...]] = {
    "vocab_size": (*_OWN_TEXT, TextTower.open_clip),
    "width": _OWN_TEXT,
    "layers": _OWN_TEXT,
    "heads": _OWN_TEXT,
    "mlp_ratio": _OWN_TEXT,
    "architecture": (TextTower.huggingface, TextTower.open_clip),
    "pooler": (TextTower.huggingface,),
    "projection": (TextTower.huggingface,),
    "trim": (TextTower.clip, TextTower.huggingface, TextTower.open_clip),
}


def _of_kinds(tower: str, uses: dict[str, Any]) -> Iterator[Idle]:
    for key, kinds in uses.items():
        yield Idle(f"{tower}.{key}", _is_other(tower, kinds), f"on {tower} towers of kind={{c.{tower}.kind}}")


def _is_other(tower: str, kinds: tuple[Any, ...]) -> Callable[[Any], bool]:
    return lambda model: getattr(model, tower).kind not in kinds


MODEL = (
    *_of_kinds("image", IMAGE_KEYS),
    *_of_kinds("text", TEXT_KEYS),
    Idle(
        "image.pretrained",
        lambda model: backbone_of(model) is None,
        "on image towers of kind={c.image.kind} without a backbone of timm",
        "weights of a whole model are pretrained=…",
    ),
    Idle(
        "text.name text.pretrained",
        lambda model: not has_encoder(model),
        "on a text tower without an encoder of Hugging Face's",
    ),
    Idle(
        "text.cleaning text.strip_sep_token",
        lambda model: uses_openai(model.text),
        "on OpenAI's tokenizer",
        "leave it out, or set {at}text.tokenizer",
    ),
    Idle(
        "activation",
        lambda model: not uses_activation(model),
        "on towers of kind={c.image.kind} and kind={c.text.kind}, which have their own",
    ),
)

# --------------------------------------------------------------------------------------------------------- training


def _has_val(config: TrainConfig) -> bool:
    return config.data.generate is not None or bool(config.data.val)


def _shuffles_rows(config: TrainConfig) -> bool:
    """Return whether no source is shuffled by blocks, as shards are unless `data.shuffle` says otherwise."""
    shuffle = config.data.shuffle
    return shuffle is Shuffle.full or (shuffle is None and ".tar" not in str(config.data.train))


def _of_tower(tower: str) -> tuple[Idle, ...]:
    at = f"finetune.{tower}"
    of = attrgetter(at)
    rates = f"{at}.lr_factor {at}.layer_decay"
    return (
        Idle(
            f"{at}.unfrozen_blocks",
            lambda c: not of(c).freeze,
            f"without {at}.freeze=true",
            "set that, or leave this out",
        ),
        Idle(
            rates,
            lambda c: of(c).freeze and of(c).unfrozen_blocks is None,
            f"under {at}.freeze=true without unfrozen_blocks",
        ),
        Idle(
            rates,
            lambda c: c.finetune.lora is not None and not getattr(c.finetune.lora, tower),
            f"since finetune.lora.{tower}=false keeps the tower as it is",
        ),
    )


GENERATE = (
    Idle("image_size", lambda c: c.kind is Generator.digits, "on kind=digits, whose images are 8 pixels a side"),
)

TRAIN = (
    Idle(
        "loss.init_logit_scale",
        lambda c: c.pretrained is not None,
        "with pretrained={c.pretrained}, whose weights have a scale",
        typed_only=True,
    ),
    Idle(
        "loss.init_logit_bias loss.chunk_size",
        lambda c: c.loss.name == LossName.softmax,
        "on the softmax loss",
        "use loss=sigmoid, or leave it out",
    ),
    Idle(
        "scheduler.final_factor",
        lambda c: c.scheduler._target_ == "clip_exp.training.schedule.constant",
        "on a constant learning rate",
        typed_only=True,
    ),
    Idle(
        "strategy.stage strategy.offload strategy.config",
        lambda c: c.strategy.name != StrategyName.deepspeed,
        "with strategy={c.strategy.name}",
        "choose an option of DeepSpeed (strategy=deepspeed_stage_2), or leave it out",
    ),
    Idle(
        "model.image.pretrained model.text.pretrained",
        lambda c: c.pretrained is not None,
        "with pretrained={c.pretrained}, which has the weights of both towers",
        typed_only=True,
    ),
    *_of_tower("image"),
    *_of_tower("text"),
    Idle(
        "callbacks.ema_every_n_steps",
        lambda c: c.callbacks.ema_decay is None,
        "without callbacks.ema_decay",
        "set that (callbacks=ema), or leave this out",
    ),
    Idle(
        "patience monitor_mode",
        lambda c: c.monitor is None,
        "without a metric to watch",
        "set monitor (monitor=val/loss), or leave this out",
    ),
    Idle("task_every_n_steps", lambda c: not c.task, "without a task", "choose one (task=imagenet), or leave this out"),
    Idle(
        "val_every_n_steps",
        lambda c: not _has_val(c),
        "without validation data",
        "set data.val, or leave this out",
        typed_only=True,
    ),
    Idle("data.label_key", lambda c: not _has_val(c), "without validation data", "set data.val, or leave this out"),
    Idle(
        "data.templates",
        lambda c: c.data.label_key is None or not _has_val(c),
        "without validation data that have labels",
        "set data.val and data.label_key, or leave this out",
        typed_only=True,
    ),
    Idle(
        "data.image_root data.image_key data.caption_key",
        lambda c: c.data.generate is not None,
        "with data={c.data.name}, which clip_exp generates",
    ),
    Idle(
        "data.shuffle_block data.shuffle_window",
        _shuffles_rows,
        "on a full shuffle",
        "set data.shuffle=block, or leave this out",
    ),
    Idle(
        "data.max_bad_fraction",
        lambda c: c.data.on_bad_row == c.data.on_bad_image == "error",
        "where data.on_bad_row and data.on_bad_image are error, which stops at the first",
    ),
    Idle(
        "data.augmentation.color_jitter_prob",
        lambda c: c.data.augmentation.color_jitter is None,
        "without data.augmentation.color_jitter",
        "set that, or leave this out",
        typed_only=True,
    ),
    Idle(
        "data.augmentation.gaussian_blur_sigma",
        lambda c: c.data.augmentation.gaussian_blur_prob == 0,
        "with data.augmentation.gaussian_blur_prob=0",
        "raise that, or leave this out",
    ),
)

# ------------------------------------------------------------------------------------------------------- evaluation

EVALUATE = (
    Idle(
        "model.dropout model.image.patch_dropout model.image.pretrained model.text.pretrained",
        lambda c: c.model is not None,
        "on a model that is trained already",
        typed_only=True,
    ),
)

LABELED = (
    Idle(
        "image_root allow_outside_root",
        lambda data: data.table is None,
        "without {at}table",
    ),
    Idle(
        "image_key label_key separator encoding on_bad_row filter",
        lambda data: data.table is None and data.generate is None,
        "without {at}table",
    ),
    Idle(
        "ground_truth",
        lambda data: data.root is None or data.torchvision is not None or data.classes == "objectnet",
        "without flat images in {at}root",
    ),
    Idle("download", lambda data: data.torchvision is None, "without {at}torchvision"),
    Idle(
        "split",
        lambda data: data.torchvision is None and data.generate is None,
        "without {at}torchvision or {at}generate",
    ),
)
LINEAR_PROBE = (
    Idle(
        "val_fraction seed", lambda task: task.c is not None and len(task.c) == 1, "where {at}c={c.c} leaves no choice"
    ),
)
ROBUSTNESS = (Idle("baseline_weights", lambda task: task.baseline is None, "without {at}baseline"),)

TABLES: dict[type, tuple[Idle, ...]] = {
    TrainConfig: TRAIN,
    ModelConfig: MODEL,
    GenerateConfig: GENERATE,
    EvaluateConfig: EVALUATE,
    LabeledDataConfig: LABELED,
    LinearProbeTaskConfig: LINEAR_PROBE,
    RobustnessTaskConfig: ROBUSTNESS,
}

# --------------------------------------------------------------------------------------------------------------------


def typed_keys(arguments: Iterable[str]) -> set[str]:
    """Return the keys that stand on a command line, as `+key=value` and `++key=value` too."""
    return {argument.partition("=")[0].lstrip("+") for argument in arguments if "=" in argument}


def idle_problems(config: Any, typed: Collection[str] = (), at: str = "") -> Iterator[str]:
    """Yield a sentence for every key that is set and has no effect, in a configuration and those in it.

    Args:
        config: a dataclass of the schema.
        typed: full keys that stand on the command line; see `typed_keys`.
        at: the beginning of the configuration's full keys, as `model.`; empty for that of a command.
    """
    for cls in type(config).__mro__:
        for idle in TABLES.get(cls, ()):
            if idle.when(config):
                yield from _refused(idle, config, typed, at)
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from idle_problems(value, typed, f"{at}{field.name}.")


def _refused(idle: Idle, config: Any, typed: Collection[str], at: str) -> Iterator[str]:
    for key in idle.keys.split():
        node, _, name = key.rpartition(".")
        parent = attrgetter(node)(config) if node else config
        value = getattr(parent, name)
        asks_for_nothing = value is None or value is False or value in ([], {})
        is_set = f"{at}{key}" in typed or (not idle.typed_only and value != _default(parent, name))
        if is_set and not asks_for_nothing:
            why, fix = idle.why.format(c=config, at=at), idle.fix.format(at=at)
            shown = str(value).lower() if isinstance(value, bool) else value
            yield f"{at}{key}={shown} has no effect {why}: {fix}."


def _default(parent: Any, name: str) -> Any:
    field = next(field for field in dataclasses.fields(parent) if field.name == name)
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
