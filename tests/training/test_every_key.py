"""Every key of training does something, is refused, or is listed here with the reason why it is none of the run's result.

A new key fails the first test until it has a line: in `CHANGES` with a value that changes the run, or in `NOT_THE_RESULT`. A key
that the chosen options do not use needs a line in the `unused` of its model as well, unless a union's other member has it.
"""

import csv
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from safetensors.torch import load_file

from clip_exp.checkpoints.folders import latest
from clip_exp.config.compose import compose
from clip_exp.config.training import TrainConfig
from clip_exp.errors import ClipExpError
from clip_exp.training.launch import train_here
from tests.encoders import write_encoder
from tests.exhaustive import repeat_beyond
from tests.keys import Changes, leaf_keys, without_expectation
from tests.runs import Finished

MODELS = {
    "vit": ("model=vit_nano", "model.image.layers=2"),
    "resnet": (
        "model=rn50", "model.image.image_size=32", "model.image.stages=[1,1,1,1]", "model.image.width=8",
        "model.image.heads=4", "model.embed_dim=64",
    ),
}  # fmt: skip
BASE = (
    "model.text.width=32", "model.text.heads=2", "model.text.layers=2", "model.text.context_length=16",
    "data=csv", "data.train=<train>", "data.val=<val>", "data.label_key=label",
    "data.num_workers=0", "global_batch_size=8", "max_steps=3", "log_every_n_steps=1", "optimizer.lr=1e-3", "precision=32-true",
    "trainer.accelerator=cpu", "callbacks.progress=none", "name=run", "resume=never",
)  # fmt: skip
BOTH = tuple(MODELS)
TIMM = ("model/image=timm", "model.image.name=test_resnet", "model.image.image_size=64")
BERT = ("model/text=huggingface", "model.text.name=<bert>")
OWN = {  # keys of towers of ours, which others do not have
    TIMM[0]: {f"model.image.{key}" for key in ("width", "layers", "heads", "stages")},
    BERT[0]: {f"model.text.{key}" for key in ("width", "layers", "heads")},
}
SHAPES = (
    "data=shapes", "data.train=null", "data.val=null", "data.label_key=null", "data.generate.rows=24", "data.generate.val_rows=8",
)  # fmt: skip
SOURCE = ("data.train={path: <train>}",)
VAL = ("data.val={path: <val>}",)
TWO = "caption_key: [title, other_title]"
BLOCKS = ("data.shuffle=block", "data.shuffle_block=2", "data.shuffle_window=2")
START = ("pretrained=<start>",)
LORA = (*START, "finetune=lora", "finetune.lora.image=false")  # a resnet has no linear layers in its blocks
WATCHED = ("monitor=val/loss", "val_every_n_steps=1")

CHANGES: dict[str, Changes] = {
    "model.embed_dim": Changes("48"),
    "model.image.kind": Changes("siglip", refused=("resnet",)),
    "model.image.image_size": Changes("64"),
    "model.image.patch_size": Changes("16", refused=("resnet",)),
    "model.image.width": Changes("16"),
    "model.image.layers": Changes("1", refused=("resnet",)),
    "model.image.stages": Changes("[2,1,1,1]", refused=("vit",)),
    "model.image.heads": Changes("8"),
    "model.image.mlp_ratio": Changes("2", refused=("resnet",)),
    "model.image.patch_dropout": Changes("0.5", refused=("resnet",)),
    "model.image.name": Changes("test_vit", given=TIMM),
    "model.image.pretrained": Changes("true", refused=BOTH),
    "model.image.projection": Changes("mlp", given=TIMM),
    "model.image.mean": Changes("[0.1,0.2,0.3]"),
    "model.image.std": Changes("[0.1,0.2,0.3]"),
    "model.image.interpolation": Changes("bilinear"),
    "model.image.resize_mode": Changes("squash"),
    "model.text.kind": Changes("siglip", refused=BOTH),  # without a tokenizer
    "model.text.context_length": Changes("8"),
    "model.text.vocab_size": Changes("50000"),
    "model.text.width": Changes("48"),
    "model.text.layers": Changes("1"),
    "model.text.heads": Changes("4"),
    "model.text.mlp_ratio": Changes("2"),
    "model.text.name": Changes("<other_bert>", given=BERT),
    "model.text.pretrained": Changes("false", given=BERT),
    "model.text.architecture": Changes("{model_type: bert}", refused=BOTH),
    "model.text.pooler": Changes("cls", given=BERT),
    "model.text.projection": Changes("linear", given=BERT),
    "model.text.tokenizer": Changes("<other_bert>", given=BERT),
    "model.text.cleaning": Changes("canonicalize", given=BERT),
    "model.text.strip_sep_token": Changes("true", given=BERT),
    "model.activation": Changes("quick_gelu"),
    "model.dropout": Changes("0.3"),
    "data.train": Changes("<other>"),
    "data.train.image_root": Changes("<other_root>", given=SOURCE),
    "data.train.image_key": Changes("other_path", given=SOURCE),
    "data.train.caption_key": Changes("other_title", given=SOURCE),
    "data.train.caption_weights": Changes("[9,1]", given=(f"data.train={{path: <train>, {TWO}}}",)),
    "data.train.filter": Changes("'score > 1'", given=SOURCE),
    "data.val": Changes("<other>"),
    "data.val.weight": Changes("2", given=VAL, refused=BOTH),
    "data.val.image_root": Changes("<other_root>", given=VAL),
    "data.val.image_key": Changes("other_path", given=VAL),
    "data.val.caption_key": Changes("other_title", given=VAL),
    "data.val.caption_weights": Changes("[9,1]", given=VAL, refused=BOTH),
    "data.val.filter": Changes("'score > 1'", given=VAL),
    "data.val_fraction": Changes("0.2", also=("data.val=null",)),
    "data.val_seed": Changes("1", given=("data.val=null", "data.val_fraction=0.2")),
    "data._target_": Changes("tests.datasets.Pairs", also=("data.train=null",)),
    "data.generate.kind": Changes("digits", given=SHAPES),
    "data.generate.rows": Changes("16", given=SHAPES),
    "data.generate.val_rows": Changes("6", given=SHAPES),
    "data.generate.image_size": Changes("32", given=SHAPES),
    "data.generate.seed": Changes("1", given=SHAPES),
    "data.filter": Changes("'score > 1'"),
    "data.image_root": Changes("<other_root>"),
    "data.image_key": Changes("other_path"),
    "data.caption_key": Changes("other_title"),
    "data.caption_weights": Changes("[9,1]", given=("data.caption_key=[title,other_title]",)),
    "data.header": Changes("[a,b]", refused=BOTH),
    "data.label_key": Changes("other_label"),
    "data.templates": Changes(f"['{'word ' * 80}{{}}']"),  # all classes are the same text, cut
    "data.separator": Changes("'|'", refused=BOTH),  # which the table does not have
    "data.encoding": Changes("utf-16", refused=BOTH),
    "data.captions": Changes("all"),
    "data.shuffle": Changes("block", also=BLOCKS[1:]),
    "data.shuffle_block": Changes("1", given=BLOCKS),
    "data.shuffle_window": Changes("1", given=BLOCKS),
    "data.same_caption": Changes("positive"),
    "data.max_rows": Changes("16"),
    "data.max_image_pixels": Changes("100", refused=BOTH),  # all are larger
    "data.max_image_bytes": Changes("100", refused=BOTH),
    "data.image_formats": Changes("[JPEG]", refused=BOTH),  # all are PNG
    "data.augmentation.scale": Changes("[0.3,0.5]"),
    "data.augmentation.ratio": Changes("[0.9,1.1]"),
    "data.augmentation.horizontal_flip": Changes("0.5"),
    "data.augmentation.color_jitter": Changes("[0.4,0.4,0.4,0.1]"),
    "data.augmentation.color_jitter_prob": Changes("0.5", given=("data.augmentation.color_jitter=[0.4,0.4,0.4,0.1]",)),
    "data.augmentation.gray_scale_prob": Changes("0.5"),
    "data.augmentation.gaussian_blur_prob": Changes("0.5"),
    "data.augmentation.gaussian_blur_sigma": Changes("[1.0,3.0]", given=("data.augmentation.gaussian_blur_prob=1",)),
    "loss.name": Changes("sigmoid"),
    "loss.same_caption": Changes("positive"),
    "loss.same_image": Changes("positive"),
    "loss.init_logit_scale": Changes("3.5"),
    "loss.max_logit_scale": Changes("2.0", given=START),
    "loss.init_logit_bias": Changes("-5", given=("loss=sigmoid",)),
    "optimizer._target_": Changes("torch.optim.Adam"),
    "optimizer.lr": Changes("3e-3"),
    "optimizer.weight_decay": Changes("0"),
    "optimizer.betas": Changes("[0.5,0.9]"),
    "optimizer.eps": Changes("1e-2"),
    "optimizer.momentum": Changes("0.5", given=("optimizer=sgd",)),
    "optimizer.nesterov": Changes("true", given=("optimizer=sgd",)),
    "scheduler._target_": Changes("clip_exp.training.schedule.linear"),
    "scheduler.warmup_steps": Changes("2"),
    "scheduler.final_factor": Changes("0.5"),
    "strategy.stage": Changes("2", refused=BOTH),
    "strategy.offload": Changes("true", refused=BOTH),
    "strategy.config": Changes("{communication_data_type: bf16}", refused=BOTH),
    "trainer.gradient_clip_val": Changes("1e-3"),
    "trainer.gradient_clip_algorithm": Changes("value", also=("trainer.gradient_clip_val=1e-3",)),
    "trainer.limit_val_batches": Changes("0"),
    **{
        f"finetune.{tower}.{key}": change
        for tower in ("image", "text")
        for key, change in {
            "freeze": Changes("true", given=START),
            "unfrozen_blocks": Changes("1", given=(*START, f"finetune.{tower}.freeze=true")),
            "lr_factor": Changes("0.5"),
            "layer_decay": Changes("0.5"),
        }.items()
    },
    "finetune.lora.rank": Changes("2", given=LORA),
    "finetune.lora.alpha": Changes("5", given=LORA),
    "finetune.lora.dropout": Changes("0.5", given=LORA),
    "finetune.lora.image": Changes("true", given=LORA, refused=("resnet",)),
    "finetune.lora.text": Changes("false", given=LORA[:2], refused=("resnet",)),
    "finetune.lora.targets": Changes("[mlp.fc]", given=LORA),
    "finetune.freeze_towers_steps": Changes("1", given=START),
    "callbacks.ema_decay": Changes("0.5"),
    "callbacks.ema_every_n_steps": Changes("2", given=("callbacks.ema_decay=0.5",)),
    "seed": Changes("1"),
    "pretrained": Changes("<start>"),
    "pretrained_image": Changes("<start>"),
    "pretrained_text": Changes("<start>"),
    "pretrained_prefix": Changes("state_dict_ema", given=("pretrained=<averaged>",)),
    "max_steps": Changes("2"),
    "epochs": Changes("1", also=("max_steps=null",)),
    "global_batch_size": Changes("4"),
    "precision": Changes("bf16-mixed"),
    "monitor": Changes("val/loss", also=("monitor_mode=max", "patience=1", "val_every_n_steps=1")),
    "monitor_mode": Changes("max", given=(*WATCHED, "patience=1")),
    "patience": Changes("1", given=(*WATCHED, "monitor_mode=max")),
    "min_delta": Changes("100", given=(*WATCHED, "patience=1")),
}

NOT_THE_RESULT = {
    "model.image._target_": "of a user's code (tests/extending)",
    "model.text._target_": "of a user's code (tests/extending)",
    "data.transform._target_": "of a user's code (tests/extending)",
    "loss._target_": "of a user's code (tests/extending)",
    "loss.gather": "how a user's code is called (tests/extending)",
    "allow_targets": "which code of others may run (tests/extending)",
    "model.name": "a label, and the run's name unless that is set",
    "model.open_clip_name": "the name under which `pretrained` knows tags",
    "model.text.trim": "saves time: the features are the same (tests/text, tests/models/test_text.py)",
    "data.train.caption_list": "of captions that are lists (tests/data/tables/test_layouts.py)",
    "data.train.caption_lines": "of captions of several lines (tests/data/tables/test_layouts.py)",
    "data.train.format": "of another layout (tests/data/tables/test_layouts.py)",
    "data.train.header": "of a table without a header (tests/data/tables/test_layouts.py)",
    "data.val.path": "what `data.val` is where it has no other keys",
    "data.val.caption_list": "of captions that are lists (tests/data/tables/test_layouts.py)",
    "data.val.caption_lines": "of captions of several lines (tests/data/tables/test_layouts.py)",
    "data.val.format": "of another layout (tests/data/tables/test_layouts.py)",
    "data.val.header": "of a table without a header (tests/data/tables/test_layouts.py)",
    "data.val.separator": "as `data.train.separator`",
    "data.val.encoding": "as `data.train.encoding`",
    "data.caption_list": "of captions that are lists (tests/data/tables/test_layouts.py)",
    "data.caption_lines": "of captions of several lines (tests/data/tables/test_layouts.py)",
    "data.format": "of another layout (tests/data/tables/test_layouts.py)",
    "data.train.path": "what `data.train` is where it has no other keys",
    "data.train.weight": "of several sources, which no key of one reaches (tests/data/test_stream_sources.py)",
    "data.train.separator": "of another file than `data.separator` is of (tests/data/test_stream_sources.py)",
    "data.train.encoding": "of another file than `data.encoding` is of (tests/data/test_stream_sources.py)",
    "data.val._target_": "what `data.val` is where it is a Dataset (tests/data/test_custom_dataset.py)",
    "data.name": "a label, and the run's name unless that is set",
    "data.num_workers": "samples do not depend on the worker (tests/data/test_datamodule.py)",
    "data.timeout_s": "when a run that hangs ends (tests/training/test_hangs.py)",
    "data.columns": "read for losses that use them (tests/data/test_further_columns.py)",
    "data.on_bad_row": "acts on bad rows alone (tests/data/tables)",
    "data.on_bad_image": "acts on bad images alone (tests/data/test_bad_samples.py)",
    "data.max_bad_fraction": "when a run stops (tests/data/test_bad_samples.py)",
    "data.max_empty_caption_fraction": "when a run is refused (tests/checks/test_planted.py)",
    "data.allow_outside_root": "acts on paths that leave the root alone (tests/data/test_files.py)",
    "data.allow_changed": "acts on a run that is resumed (tests/training/test_changed_data.py)",
    "loss.chunk_size": "memory, not the loss (tests/losses/test_losses.py); refused for softmax",
    "optimizer.fused": "the kernel of the step",
    "strategy.name": "the curve is the same (tests/training/test_equivalence.py)",
    "strategy.timeout_s": "when a lost rank ends the run",
    "trainer.accelerator": "where it runs",
    "trainer.devices": "where it runs (tests/training/test_equivalence.py)",
    "trainer.num_nodes": "where it runs",
    "trainer.deterministic": "which kernels it runs",
    "trainer.benchmark": "which kernels it runs",
    "trainer.sync_batchnorm": "statistics of several GPUs (tests/training/test_trainer_arguments.py)",
    "trainer.detect_anomaly": "how a failure is reported (tests/training/test_trainer_arguments.py)",
    "trainer.max_time": "when it pauses (tests/training/test_trainer_arguments.py)",
    "trainer.num_sanity_val_steps": "a check before the first step (tests/training/test_trainer_arguments.py)",
    "trainer.enable_model_summary": "what is shown of it",
    "trainer.profiler": "what is measured of it",
    "callbacks.progress": "what is shown of it",
    "callbacks.save_retry_s": "how long a save is retried",
    "callbacks.extra": "classes of others",
    "logger": "what is logged of it",
    "name": "where it is written",
    "output_dir": "where it is written",
    "resume": "which run is continued",
    "micro_batch_size": "memory, not the gradient of transformers (tests/training/test_equivalence.py); batch norms see smaller batches",
    "compile": "how it computes (tests/training/test_train_command.py)",
    "checkpoint_async": "when it is written (tests/checkpoints/test_io.py)",
    "max_skipped_steps": "when it ends with an error (tests/training/test_skipped_steps.py)",
    "log_every_n_steps": "how often it is logged",
    "val_every_n_steps": "how often it is validated",
    "checkpoint_every_n_steps": "how often it is saved",
    "hang_timeout_s": "when a run that hangs ends (tests/training/test_hangs.py)",
    "keep_checkpoints": "how many checkpoints stay (tests/training/test_saving.py)",
    "keep_every_n_steps": "which checkpoints stay (tests/training/test_saving.py)",
    "task": "what is scored beside it (tests/training/test_tasks.py)",
    "task_every_n_steps": "how often that is scored (tests/training/test_tasks.py)",
}
KEYS = list(leaf_keys(TrainConfig))
# One of each part of a run, in `make test`.
PROMISED = {
    ("resnet", "model.image.mlp_ratio"), ("resnet", "model.activation"), ("vit", "strategy.offload"), ("vit", "loss.same_image"),
    ("vit", "callbacks.ema_every_n_steps"), ("vit", "patience"),
}  # fmt: skip


def test_of_every_key_something_is_expected() -> None:
    assert without_expectation(KEYS, CHANGES, NOT_THE_RESULT) == []
    assert set(CHANGES) <= set(KEYS)


# Of unequal frequency: where a model that answers the same for all images comes to another answer, its score is another one.
LABELS = (0, 3, 2, 0, 0, 2, 0, 3, 1, 3, 4, 5)


def write_pairs(folder: Path, name: str, seed: int) -> str:
    """Write a table of 12 images with two captions each, some of them equal; return its path."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    rows = []
    for i in range(12):
        pixels = random.integers(0, 256, (5, 7, 3), dtype=np.uint8)
        paths = [f"images/{name}{i}.png", f"images/{name}{i}b.png"]
        for path, image in zip(paths, (pixels, pixels[::-1]), strict=True):
            Image.fromarray(image).resize((70, 50)).save(folder / path)
        kind = ("cat", "dog", "cow")[i % 3]
        captions = (f"A Photo of one {kind}!", f"{i % 4} animals, {kind} number {i} and many more of them in a row")
        rows += [
            [*paths, caption, f"not {caption}", f"kind {LABELS[i]}", ("wild", "tame")[i % 2], str(i)]
            for caption in captions
        ]
    table = folder / f"{name}.csv"
    with table.open("w", newline="", encoding="utf-8") as file:
        header = ["filepath", "other_path", "title", "other_title", "label", "other_label", "score"]
        csv.writer(file).writerows([header, *rows])
    return str(table)


def key_of(override: str) -> str:
    return override.lstrip("+").partition("=")[0]


class Runs:
    """Trains in this process, and keeps what came out of each list of overrides."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.places = {
            name: write_pairs(folder / "data", name, seed) for seed, name in enumerate(("train", "val", "other"))
        }
        self.places["other_root"] = str(folder / "elsewhere")
        for seed, name in enumerate(("train", "val")):
            write_pairs(folder / "elsewhere", name, seed + 10)
        for seed, name in enumerate(("bert", "other_bert")):
            self.places[name] = str(write_encoder(folder / name, name.rpartition("_")[2], seed))
        self.result = cache(self._result)

    def _result(self, model: str, *overrides: str) -> dict[str, bytes]:
        """Losses, the last validation and the weights of a run, as bytes."""
        run = self._train(model, *overrides)
        values: dict[str, Any] = {"losses": run.losses}
        values |= {name: value for row in run.metrics for name, value in row.items() if name.startswith("val/")}
        found = {name: repr(value).encode() for name, value in values.items()}
        for file in latest(run.folder).glob("*.safetensors"):
            found[file.name] = file.read_bytes()
        return found

    def _train(self, model: str, *overrides: str) -> Finished:
        output_dir = self.folder / "outputs" / str(len(list((self.folder / "outputs").glob("*"))))
        places = {**self.places, **({"start": self._start(model)} if "<start>" in str(overrides) else {})}
        if "<averaged>" in str(overrides):
            state = load_file(self._start(model))
            average = {name: tensor * 0.9 if tensor.is_floating_point() else tensor for name, tensor in state.items()}
            places["averaged"] = str(self.folder / "averaged.pt")
            torch.save({"state_dict": state, "state_dict_ema": average}, places["averaged"])
        own = {key_of(word) for word in overrides}.union(*(OWN.get(word, ()) for word in overrides))
        words = [
            *(word for word in MODELS[model] if key_of(word) not in own),
            *(word for word in BASE if key_of(word) not in own),
            *overrides,
            f"output_dir={output_dir}",
        ]
        for name, place in places.items():
            words = [word.replace(f"<{name}>", place) for word in words]
        folder, code = train_here(compose("train", words), words)
        assert code == 0
        return Finished(folder, "")

    def _start(self, model: str) -> str:
        if f"start of {model}" not in self.places:
            run = self._train(model, "seed=7")
            self.places[f"start of {model}"] = str(latest(run.folder) / "model.safetensors")
        return self.places[f"start of {model}"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("every_key"))


@pytest.fixture(autouse=True)
def nothing_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Figure, "savefig", lambda _, path, **__: Image.new("RGB", (1, 1)).save(path))


def assert_refused(runs: Runs, model: str, key: str, *overrides: str) -> None:
    with pytest.raises(ClipExpError) as caught:
        runs.result(model, *overrides)
    node, _, name = key.rpartition(".")
    assert f"{node}." in str(caught.value) or f"{name}=" in str(caught.value), str(caught.value)


CASES = [(model, key) for model in MODELS for key in CHANGES]


@pytest.mark.parametrize("case", repeat_beyond(PROMISED, CASES), ids=" ".join)
def test_every_key_changes_the_result_or_is_refused(case: tuple[str, str], runs: Runs) -> None:
    model, key = case
    change = CHANGES[key]
    changed = (change.override(key), *change.also)
    if model in change.refused:
        assert_refused(runs, model, key, *change.given, *changed)
        return
    assert runs.result(model, *change.given, *changed) != runs.result(model, *change.given)
    if change.given and not change.asks_for_nothing:
        assert_refused(runs, model, key, *changed)


@pytest.mark.exhaustive
@pytest.mark.parametrize("model", MODELS)
def test_a_run_without_a_change_has_the_same_result(model: str, runs: Runs) -> None:
    assert runs.result(model, "output_dir=again") == runs.result(model)
