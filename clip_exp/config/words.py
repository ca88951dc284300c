"""Words of other frameworks: their keys, flags and options, and the overrides that do the same here.

Messages about unknown keys, flags and options use these tables, and the pages docs/coming_from_*.md are tested against
them. To add a word, add a line. Imports neither torch nor Hydra.
"""

import re
import shlex
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

VALUE = "{value}"
# Number of devices in the example of a message
DEVICES = 8


class Answer(NamedTuple):
    """Overrides to type instead of a word.

    Attributes:
        overrides: alternatives; `{value}` stands for the value of the word. An alternative may have several overrides,
            separated by spaces. A message names only those that its command accepts.
        note: further sentences.
        per_device: the value of the word is for one device, that of the override for all devices.
    """

    overrides: tuple[str, ...] = ()
    note: str = ""
    per_device: bool = False


def use(*overrides: str, note: str = "", per_device: bool = False) -> Answer:
    """Return an answer; an override without `=` is a key that takes the value of the word."""
    return Answer(tuple(each if "=" in each else f"{each}={VALUE}" for each in overrides), note, per_device)


BATCH = use(
    "global_batch_size", note="It counts the samples of all devices: batch size per device x devices.", per_device=True
)
WORKERS = use("data.num_workers", "num_workers")
ON_DEVICES = use("trainer.devices", "devices")
RATE, DECAY = use("optimizer.lr"), use("optimizer.weight_decay")
IN_STEPS = "It counts optimizer steps."
A_TENTH = f"{IN_STEPS[:-1]}; null, the default, is a tenth of the run."
WARMUP = use("scheduler.warmup_steps", note=A_TENTH)
WARMUP_EPOCHS = use("scheduler.warmup_steps=…", note=A_TENTH)
VALIDATE = use("val_every_n_steps=…", note=IN_STEPS)
SAVE = use("checkpoint_every_n_steps=…", note=IN_STEPS)
KEPT = use("keep_checkpoints", note="The one that is best in `monitor` is kept as well.")
CLIPPING = use("trainer.gradient_clip_val")
CONTINUE = use("resume", "ckpt")
START = use(
    "resume", "pretrained", "ckpt", note="resume= continues that run; pretrained= starts a new run from its weights."
)
SMALLER = use("micro_batch_size=…", note="A smaller value needs less memory and computes the same gradients.")
ACCUMULATION = use(
    note="accumulating the loss over small batches gives a contrastive loss no additional negatives. Increase global_batch_size and "
    "set micro_batch_size instead: this needs as little memory and computes the gradient of the whole batch."
)
BF16, FP16 = use("precision=bf16-mixed"), use("precision=16-mixed")
WANDB = use("logger=wandb")
BETAS = use("optimizer.betas=[0.9,0.98]")
IMAGENET = use("task=imagenet task.imagenet.root={value}")
SOURCES = use("data.train=[{{path: a.csv, weight: 2}}, {{path: b.csv, weight: 1}}]")
STAGE_2, STAGE_3 = use("strategy=deepspeed_stage_2"), use("strategy=deepspeed_stage_3")
DEEPSPEED_FILE = use(
    "strategy=deepspeed_stage_2",
    note="DeepSpeed's JSON files are not read: give their keys as strategy.config.<key>=….",
)
DETECTED = use(note="This is detected: leave it out.")
NO_MINIMUM = use("max_steps=…", "epochs=…", note="Only patience ends a run earlier.")
NO_TEST = use(note="Tasks are scored on all of their data (task=imagenet): leave it out.")
ALWAYS = use(note="This is always the case: leave it out.")
OF_LAUNCHER = use(note="The launcher and the strategy determine this: leave it out.")
DISTILLATION = use(
    note="The teacher belongs to a custom loss: loss=custom loss._target_=… (examples/extending/distillation.py)."
)
NOTHING = use(note="There is no equivalent: leave it out.")
NUMBER_OF_RESULTS = use("top_k")

LIGHTNING = {
    "trainer.max_epochs": use("epochs"),
    "trainer.max_steps": use("max_steps"),
    "trainer.precision": use("precision"),
    "trainer.strategy": use("strategy"),
    "trainer.logger": use("logger"),
    "trainer.callbacks": use("callbacks.extra={{mine: {{_target_: …}}}}"),
    "trainer.plugins": use(note="The keys precision and strategy choose the plugins: leave it out."),
    "trainer.terminate_on_nan": use("max_skipped_steps=0"),
    "trainer.min_epochs": NO_MINIMUM,
    "trainer.min_steps": NO_MINIMUM,
    "trainer.accumulate_grad_batches": ACCUMULATION,
    "trainer.val_check_interval": use("val_every_n_steps", note=IN_STEPS),
    "trainer.check_val_every_n_epoch": VALIDATE,
    "trainer.log_every_n_steps": use("log_every_n_steps"),
    "trainer.limit_train_batches": use("max_steps", "data.max_rows=…"),
    "trainer.limit_test_batches": NO_TEST,
    "trainer.limit_predict_batches": NO_TEST,
    "trainer.fast_dev_run": use("debug=fdr"),
    "trainer.overfit_batches": use("debug=overfit"),
    "trainer.default_root_dir": use("output_dir"),
    "trainer.enable_progress_bar": use("callbacks.progress=bar", "callbacks.progress=none"),
    "trainer.enable_checkpointing": ALWAYS,
    "trainer.inference_mode": use(note="Validation computes no gradients: leave it out."),
    "trainer.use_distributed_sampler": use(note="Each device gets its part of every global batch: leave it out."),
    "trainer.reload_dataloaders_every_n_epochs": use(note="The data of a run is one stream of samples: leave it out."),
    "trainer.barebones": use("callbacks.progress=none", note="A run always writes its checkpoints and metrics.csv."),
    "trainer.enable_autolog_hparams": use(note="Loggers get the whole configuration: leave it out."),
    "trainer.model_registry": use(note="Copy the folder of clip-exp export to the registry instead: leave it out."),
    "trainer.gpus": ON_DEVICES,
    "trainer.resume_from_checkpoint": CONTINUE,
    "gpus": ON_DEVICES,
    "devices": ON_DEVICES,
    "accelerator": use("trainer.accelerator", "accelerator"),
    "gradient_clip_val": CLIPPING,
    "num_nodes": use("trainer.num_nodes"),
    "seed_everything": use("seed"),
    "early_stopping_patience": use("patience"),
}
TEMPLATE = {
    "train": use("data.train"),
    "test": use("task=auto", note="Tasks are scored at the end of the training."),
    "ckpt_path": START,
    "task_name": use("name"),
    "tags": use("logger=wandb logger.wandb.tags={value}"),
    "optimized_metric": use("monitor"),
    "paths.output_dir": use("output_dir"),
    "paths.log_dir": use("output_dir"),
    "paths.data_dir": use("data.train"),
    "data.data_dir": use("data.train"),
    "data.batch_size": BATCH,
    "data.train_batch_size": BATCH,
    "data.pin_memory": ALWAYS,
    "data.sampler": SOURCES,
    "model.optimizer.lr": RATE,
    "model.optimizer.weight_decay": DECAY,
    "model.compile": use("compile"),
    "callbacks.early_stopping": use("monitor=val/loss patience=3"),
    "callbacks.model_checkpoint": use("monitor=val/loss", "checkpoint_every_n_steps=…"),
    "callbacks.rich_progress_bar": use("callbacks.progress=bar"),
    "callbacks.model_summary": use("trainer.enable_model_summary=true"),
    "callbacks.learning_rate_monitor": ALWAYS,
    "callbacks.early_stopping.patience": use("patience"),
    "callbacks.early_stopping.monitor": use("monitor"),
    "callbacks.early_stopping.mode": use("monitor_mode"),
    "callbacks.early_stopping.min_delta": use("min_delta"),
    "callbacks.model_checkpoint.monitor": use("monitor"),
    "callbacks.model_checkpoint.mode": use("monitor_mode"),
    "callbacks.model_checkpoint.every_n_train_steps": use("checkpoint_every_n_steps"),
    "callbacks.model_checkpoint.every_n_epochs": SAVE,
    "callbacks.model_checkpoint.save_top_k": use(
        "keep_checkpoints=…", note="It counts the last checkpoints; the one that is best in `monitor` is kept as well."
    ),
    "callbacks.model_checkpoint.save_last": ALWAYS,
    "callbacks.model_checkpoint.dirpath": use("output_dir"),
    "callbacks.model_checkpoint.filename": use(note="Checkpoints are named by their step: leave it out."),
    "logger.project": use("logger=wandb logger.wandb.project={value}"),
    "logger.entity": use("logger=wandb logger.wandb.entity={value}"),
    "logger.group": use("logger=wandb logger.wandb.group={value}"),
    "logger.tags": use("logger=wandb logger.wandb.tags={value}"),
    "logger.mode": use("logger=wandb logger.wandb.mode={value}"),
    "logger.wandb.name": use("name"),
    "optimizer.image_lr": use("finetune.image.lr_factor=…", note="It is a factor of optimizer.lr."),
    "optimizer.text_lr": use("finetune.text.lr_factor=…", note="It is a factor of optimizer.lr."),
    "hparams_search": use(note="Give the values of each key, separated by commas, and -m: optimizer.lr=1e-3,3e-4 -m."),
}
OPEN_CLIP = {
    "train_data": use("data.train"),
    "val_data": use("data.val"),
    "train_num_samples": DETECTED,
    "val_num_samples": DETECTED,
    "train_data_upsampling_factors": SOURCES,
    "dataset_type": DETECTED,
    "dataset_resampled": use(note="Each sample is used once per epoch, and resuming is exact: leave it out."),
    "csv_separator": use("data.separator"),
    "csv_img_key": use("data.image_key"),
    "csv_caption_key": use("data.caption_key"),
    "max_image_pixels": use("data.max_image_pixels"),
    "imagenet_val": IMAGENET,
    "imagenet_v2": use("task=imagenet_v2 task.imagenet_v2.root={value}"),
    "workers": WORKERS,
    "batch_size": BATCH,
    "accum_freq": SMALLER,
    "grad_checkpointing": SMALLER,
    "lr": RATE,
    "wd": DECAY,
    "beta1": BETAS,
    "beta2": BETAS,
    "eps": use("optimizer.eps"),
    "momentum": use("optimizer=sgd optimizer.momentum={value}"),
    "opt": use("optimizer"),
    "warmup": WARMUP,
    "lr_scheduler": use("scheduler"),
    "skip_scheduler": use("scheduler=constant scheduler.warmup_steps=0"),
    "grad_clip_norm": CLIPPING,
    "save_frequency": SAVE,
    "save_most_recent": ALWAYS,
    "delete_previous_checkpoint": use("keep_checkpoints=…", note="The last two are kept by default."),
    "val_frequency": VALIDATE,
    "zeroshot_frequency": use("task_every_n_steps=…", note=IN_STEPS),
    "logs": use("output_dir"),
    "report_to": use("logger"),
    "wandb_project_name": use("logger=wandb logger.wandb.project={value}"),
    "pretrained_image": use("pretrained_image", "model/image=timm model.image.name=… model.image.pretrained=true"),
    "force_image_size": use("model.image.image_size"),
    "force_context_length": use("model.text.context_length"),
    "force_patch_dropout": use("model.image.patch_dropout"),
    "force_quick_gelu": use("model.activation=quick_gelu", note="Weights determine it, so it is rarely needed."),
    "force_custom_text": DETECTED,
    "image_mean": use("model.image.mean"),
    "image_std": use("model.image.std"),
    "image_interpolation": use("model.image.interpolation"),
    "image_resize_mode": use("model.image.resize_mode"),
    "aug_cfg": use("data/augmentation=strong", note="The keys of --aug-cfg are keys of data.augmentation."),
    "lock_image": use("finetune.image.freeze=true"),
    "lock_text": use("finetune.text.freeze=true"),
    "lock_image_unlocked_groups": use("finetune.image.unfrozen_blocks"),
    "lock_text_unlocked_layers": use("finetune.text.unfrozen_blocks"),
    "use_bn_sync": use("trainer.sync_batchnorm=true"),
    "lock_image_freeze_bn_stats": ALWAYS,
    "lock_text_freeze_layer_norm": ALWAYS,
    "image_layer_decay": use("finetune.image.layer_decay"),
    "text_layer_decay": use("finetune.text.layer_decay"),
    "siglip": use("loss=sigmoid"),
    "loss_dist_impl": ALWAYS,
    "local_loss": ALWAYS,
    "gather_with_grad": ALWAYS,
    "torchcompile": use("compile=true"),
    "fsdp": STAGE_3,
    "device": use("trainer.accelerator", "accelerator"),
    "dist_url": OF_LAUNCHER,
    "dist_backend": OF_LAUNCHER,
    "ddp_static_graph": OF_LAUNCHER,
    "no_set_device_rank": OF_LAUNCHER,
    "opt_kwargs": use(note="Its keys are keys of `optimizer`: type optimizer.<key>=…."),
    "wandb_notes": use(note="Set the environment variable WANDB_NOTES."),
    "distill_model": DISTILLATION,
    "distill_pretrained": DISTILLATION,
    "coca_caption_loss_weight": NOTHING,
    "coca_contrastive_loss_weight": NOTHING,
    "remote_sync": NOTHING,
    "copy_codebase": NOTHING,
    "val_retrieval_chunk_size": NOTHING,
    "cache_dir": use(note="Set the environment variable CLIP_EXP_CACHE, or HF_HOME for the Hugging Face hub."),
}
FLAGAI = {
    "env_type": use("strategy"),
    "num_gpus": ON_DEVICES,
    "deepspeed_config": DEEPSPEED_FILE,
    "hostfile": use(note="Start the command on every node with torchrun --nnodes=… (docs/training.md)."),
    "master_ip": use(note="Start the command on every node with torchrun --nnodes=… (docs/training.md)."),
    "gradient_accumulation_steps": ACCUMULATION,
    "weight_decay": DECAY,
    "warm_up": WARMUP,
    "clip_grad": CLIPPING,
    "fp16": FP16,
    "checkpoint_activations": SMALLER,
    "log_interval": use("log_every_n_steps"),
    "eval_interval": use("val_every_n_steps", note=IN_STEPS),
    "save_interval": use("checkpoint_every_n_steps"),
    "save_dir": use("output_dir"),
    "experiment_name": use("name"),
    "load_dir": use("resume", "run"),
    "load_optim": ALWAYS,
    "load_rng": ALWAYS,
    "tensorboard_dir": use("logger=tensorboard"),
    "img_dir": use("data.image_root"),
    "img_key": use("data.image_key"),
    "caption_key": use("data.caption_key"),
    "sep": use("data.separator"),
}
HUGGING_FACE = {
    "learning_rate": RATE,
    "per_device_train_batch_size": BATCH,
    "train_batch_size": BATCH,
    "num_train_epochs": use("epochs"),
    "num_epochs": use("epochs"),
    "warmup_steps": WARMUP,
    "warmup_ratio": WARMUP,
    "lr_scheduler_type": use("scheduler"),
    "optim": use("optimizer"),
    "adam_beta1": BETAS,
    "adam_beta2": BETAS,
    "adam_epsilon": use("optimizer.eps"),
    "max_grad_norm": CLIPPING,
    "bf16": BF16,
    "gradient_checkpointing": SMALLER,
    "torch_compile": use("compile=true"),
    "deepspeed": DEEPSPEED_FILE,
    "dataloader_num_workers": WORKERS,
    "logging_steps": use("log_every_n_steps"),
    "eval_steps": use("val_every_n_steps", note=IN_STEPS),
    "save_steps": use("checkpoint_every_n_steps"),
    "save_total_limit": KEPT,
    "metric_for_best_model": use("monitor"),
    "load_best_model_at_end": use("monitor=val/loss"),
    "greater_is_better": use("monitor_mode=max", "monitor_mode=min"),
    "early_stopping_patience": use("patience"),
    "early_stopping_threshold": use("min_delta"),
    "resume_from_checkpoint": CONTINUE,
    "run_name": use("name"),
    "train_file": use("data.train"),
    "validation_file": use("data.val"),
    "image_column": use("data.image_key"),
    "caption_column": use("data.caption_key"),
    "max_train_samples": use("data.max_rows"),
    "max_seq_length": use("model.text.context_length"),
    "model_name_or_path": use("model"),
    "freeze_vision_model": use("finetune.image.freeze=true"),
    "freeze_text_model": use("finetune.text.freeze=true"),
    "ddp_timeout": use("strategy.timeout_s"),
    "top": NUMBER_OF_RESULTS,
    "k": NUMBER_OF_RESULTS,
    "keep": NUMBER_OF_RESULTS,
}
TIMM = {
    "opt_eps": use("optimizer.eps"),
    "opt_betas": use("optimizer.betas"),
    "sched": use("scheduler"),
    "warmup_epochs": WARMUP_EPOCHS,
    "amp": FP16,
    "img_size": use("model.image.image_size"),
    "initial_checkpoint": use("pretrained"),
    "layer_decay": use("finetune.image.layer_decay", "finetune.text.layer_decay"),
    "drop": use("model.dropout"),
    "hflip": use("data.augmentation.horizontal_flip"),
    "model_ema": use("callbacks=ema"),
    "model_ema_decay": use("callbacks.ema_decay"),
    "grad_accum_steps": ACCUMULATION,
    "eval_metric": use("monitor"),
    "patience_epochs": use("patience"),
    "checkpoint_hist": KEPT,
    "sync_bn": use("trainer.sync_batchnorm=true"),
    "data_dir": use("data.train"),
}
OTHERS = {
    "num_workers": WORKERS,
    "max_epochs": use("epochs"),
    "max_iters": use("max_steps"),
    "image_size": use("model.image.image_size"),
    "augmentation": use("data/augmentation"),
    "image_tower": use("model/image"),
    "text_tower": use("model/text"),
    "image_encoder": use("model/image"),
    "text_encoder": use("model/text"),
    "total_steps": use("max_steps"),
    "num_steps": use("max_steps"),
    "accumulate_grad_batches": ACCUMULATION,
    "val_check_interval": use("val_every_n_steps", note=IN_STEPS),
    "wandb": WANDB,
    "use_wandb": WANDB,
    "wandb_project": use("logger=wandb logger.wandb.project={value}"),
    "tensorboard": use("logger=tensorboard"),
    "zero_stage": use("strategy=deepspeed_stage_{value}"),
    "train_micro_batch_size_per_gpu": BATCH,
    "checkpoint": START,
    "init_checkpoint": use("pretrained"),
    "init_weights": use("pretrained"),
    "temperature": use("loss.init_logit_scale=…", note="It is the natural logarithm of 1 / temperature."),
    "data.train": use("table"),
    "table": use("data.train"),
    # Arguments of clip-retrieval's inference, and of img2dataset
    "input_dataset": use("table"),
    "output_folder": use("output"),
    "write_batch_size": use("rows_per_file"),
    "wds_image_key": use("image_key"),
    "wds_caption_key": use("caption_key"),
    "number_sample_per_shard": use("shard_size"),
    # Keys of older versions
    "linear_probe_steps": use("finetune.freeze_towers_steps"),
}
FRAMEWORKS: dict[str, Mapping[str, Answer]] = {
    "Lightning": LIGHTNING,
    "lightning-hydra-template": TEMPLATE,
    "OpenCLIP": OPEN_CLIP,
    "FlagAI": FLAGAI,
    "Hugging Face Trainer": HUGGING_FACE,
    "timm": TIMM,
    "": OTHERS,
}
# Values of existing keys and groups: the value to type, or the overrides, which contain `=`
_FP16, _BF16, _FP32 = "16-mixed", "bf16-mixed", "32-true"
_CUSTOM = "optimizer=custom optimizer.lr=… optimizer._target_=torch.optim"
VALUES: dict[str, dict[str, str]] = {
    "precision": {
        "bf16": _BF16, "amp_bf16": _BF16, "amp_bfloat16": _BF16, "bfloat16": _BF16, "pure_bf16": _BF16, "bf16-true": _BF16,
        "amp": _FP16, "fp16": _FP16, "16": _FP16, "float16": _FP16, "half": _FP16, "pure_fp16": _FP16, "16-true": _FP16,
        "fp32": _FP32, "32": _FP32, "float32": _FP32, "full": _FP32, "no": _FP32,
    },
    "loss": {
        "siglip": "loss=sigmoid", "clip": "loss=softmax", "infonce": "loss=softmax", "contrastive": "loss=softmax",
        "cross_entropy": "loss=softmax",
    },
    "resume": {"latest": "auto", "last": "auto", "true": "auto", "false": "never", "no": "never", "none": "never"},
    "optimizer": {
        "adamw_torch": "adamw", "adamw_torch_fused": "adamw", "fused_adamw": "adamw", "torch.optim.AdamW": "adamw", "momentum": "sgd",
        "radam": f"{_CUSTOM}.RAdam", "nadam": f"{_CUSTOM}.NAdam", "nadamw": f"{_CUSTOM}.NAdam", "rmsprop": f"{_CUSTOM}.RMSprop",
        "adagrad": f"{_CUSTOM}.Adagrad", "adafactor": f"{_CUSTOM}.Adafactor",
    },
    "scheduler": {
        "const": "constant", "none": "constant", "constant_with_warmup": "constant", "cosine_with_warmup": "cosine",
        "cosine_annealing": "cosine", "CosineAnnealingLR": "cosine", "linear_with_warmup": "linear", "WarmupDecayLR": "linear",
    },
    "strategy": {
        "pytorch": "auto", "single_device": "auto", "pytorchDDP": "ddp", "ddp_spawn": "ddp", "ddp_find_unused_parameters_true": "ddp",
        "ddp_find_unused_parameters_false": "ddp", "fsdp": "deepspeed_stage_3", "fsdp2": "deepspeed_stage_3",
        "deepspeed": "deepspeed_stage_2", "zero1": "deepspeed_stage_1", "zero2": "deepspeed_stage_2", "zero3": "deepspeed_stage_3",
    },
    "logger": {
        "tb": "tensorboard", "all": "[wandb,tensorboard]", "wandb,tensorboard": "[wandb,tensorboard]", "none": "csv", "false": "csv",
        "many_loggers": "[wandb,tensorboard]", "aim": "logger.extra.aim={_target_: aim.pytorch_lightning.AimLogger}",
    },
    "trainer": {
        "gpu": "trainer.accelerator=gpu", "cpu": "trainer.accelerator=cpu", "ddp": "strategy=ddp",
        "ddp_sim": "strategy=ddp trainer.accelerator=cpu trainer.devices=2",
    },
    "callbacks": {"early_stopping": "monitor=val/loss patience=3", "model_checkpoint": "monitor=val/loss"},
    "debug": {"fast_dev_run": "fdr"},
    "data": {
        "webdataset": "csv", "wds": "csv", "tsv": "csv", "parquet": "csv", "jsonl": "csv", "json": "csv", "table": "csv",
        "synthetic": "shapes", "mnist": "digits",
    },
    "experiment": {"finetune_linear_probe": "finetune_lp_ft"},
}  # fmt: skip
# Options without a single equivalent, with the end of a sentence
EXPLAINED = {
    "finetune=linear_probe": (
        "set finetune=lp_ft to train the projections first (LP-FT), or task=linear_probe to evaluate frozen features."
    ),
    "hydra/launcher=joblib": (
        "Hydra's plugin hydra-joblib-launcher is not installed. Jobs of a sweep run one after another: leave it out."
    ),
    "hydra/sweeper=optuna": (
        "Hydra's plugin hydra-optuna-sweeper is not installed. A sweep runs every combination of values: optimizer.lr=1e-3,3e-4 -m."
    ),
}


def fold(word: str) -> str:
    """Return a name without differences of case, `-` and `_`: `DeepSpeed-Stage-2` and `deepspeed_stage_2` are the same."""
    return re.sub(r"[-_]", "", word).casefold()


def answer(key: str, value: Any, roots: Collection[str]) -> str | None:
    """Return what to type instead of a word, as the end of a sentence; None if the word is unknown or means nothing to the command.

    Args:
        key: full key or name of a flag; `trainer.max_epochs` is found as itself, then as `max_epochs`.
        value: value of the word, as plain values; None: it has none, or it is unknown.
        roots: first parts of the keys that the command accepts.
    """
    found = _find(key)
    if found is None:
        return None
    valid = [each for each in found.overrides if all(_root(part) in roots for part in _parts(each))]
    if found.overrides and not valid:
        return None
    if valid and value is False and not any(VALUE in each for each in valid):
        return "leave it out."
    if not valid:
        return found.note[0].lower() + found.note[1:]
    if found.per_device and str(value).isdecimal():
        many = int(value) * DEVICES
        return f"type global_batch_size={value} on one device, global_batch_size={many} on {DEVICES}. {found.note}"
    typed = " or ".join(dict.fromkeys(_filled(each, value) for each in valid))
    # A note is about the first override.
    return f"type {typed}. {found.note if found.overrides[0] in valid else ''}".rstrip()


def of_value(key: str, value: Any) -> str | None:
    """Return what to type instead of another framework's value of a key or group, as the end of a sentence; None if it is unknown."""
    text = as_typed(value)
    translated = _translated(key, text)
    return EXPLAINED.get(f"{key}={text}") if translated is None else f"type {in_shell(translated)}."


def as_typed(value: Any) -> str:
    """Return a plain value as it is typed on a command line, without quotes for the shell."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return f"[{','.join(map(as_typed, value))}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {as_typed(item)}" for key, item in value.items()) + "}"
    return str(value)


def _find(key: str) -> Answer | None:
    parts = [fold(part) for part in key.split(".")]
    return next((_WORDS[name] for i in range(len(parts)) if (name := ".".join(parts[i:])) in _WORDS), None)


def _folded() -> Iterator[tuple[str, Answer]]:
    for words in FRAMEWORKS.values():
        for word, meaning in words.items():
            full = ".".join(map(fold, word.split(".")))
            yield full, meaning
            if full.startswith("trainer."):
                yield full.removeprefix("trainer."), meaning


_WORDS = dict(_folded())


def _parts(overrides: str) -> list[str]:
    """Return the overrides of an alternative: spaces in brackets do not separate."""
    return re.split(r" (?=[\w./]+=)", overrides)


def _root(override: str) -> str:
    return re.split(r"[./=]", override, maxsplit=1)[0]


def _filled(overrides: str, value: Any) -> str:
    """Return the overrides of an alternative with the value of the word, translated if its key has other values here."""
    filled = []
    for part in _parts(overrides):
        key, _, template = part.partition("=")
        text = "…" if value is None or (key.endswith("_steps") and not _is_count(value)) else as_typed(value)
        if template == VALUE and value is not None and (translated := _translated(key, text)) is not None:
            filled.append(translated)
        else:
            filled.append(f"{key}={template.format(value=text)}")
    return " ".join(map(in_shell, filled))


def _is_count(value: Any) -> bool:
    """Return False for a fraction of the run or of an epoch, or a time, as some frameworks give lengths and intervals."""
    return not isinstance(value, dict) and re.fullmatch(r"\d*\.\d+|1\.0*", str(value)) is None


def _translated(key: str, text: str) -> str | None:
    """Return the override for another framework's value of a key; None if the value is unknown."""
    found = {fold(name): value for name, value in VALUES.get(key, {}).items()}.get(fold(text))
    return None if found is None else found if "=" in found else f"{key}={found}"


def in_shell(overrides: str) -> str:
    """Return overrides with quotes where the shell needs them."""
    return " ".join(part if re.fullmatch(r"[\w./=@+,:…-]*", part) else shlex.quote(part) for part in _parts(overrides))
