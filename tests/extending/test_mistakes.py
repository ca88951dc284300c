"""Mistakes in a user's code and its arguments are found before a run folder exists, each with one message without a traceback."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Run
from tests.extending.common import DIGITS, EXAMPLES, SMALL

MINE = """
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import IterableDataset
from torchvision.transforms import v2


class Loss(nn.Module):
    def __init__(self, weight: float, smoothing: float = 0.0) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, image_features, text_features, logit_scale):
        return (image_features * text_features).sum() * logit_scale.sum()


class Hungry(nn.Module):
    def forward(self, image_features, text_feature, logit_scale):
        return image_features.sum()


class WithBias(nn.Module):
    def forward(self, image_features, text_features, logit_scale, logit_bias):
        return image_features.sum()


class Twice(nn.Module):
    def __init__(self, weight: float) -> None:
        super().__init__()

    def forward(self, image_features, weight):
        return image_features.sum()


def function(image_features, text_features, color):
    return image_features.sum()


class Broken(nn.Module):
    def __init__(self) -> None:
        raise ValueError("no luck")


class Images(nn.Module):
    def forward(self, image_BCHW):
        return image_BCHW.mean((2, 3))


class Maps(nn.Module):
    def forward(self, image_BCHW):
        return image_BCHW


class Failing(nn.Module):
    def forward(self, image_BCHW, more):
        return image_BCHW


class Texts(nn.Module):
    def forward(self, tokens_BL):
        return [tokens_BL]


def sized(image_CHW, side=32):
    return v2.functional.resize(image_CHW, [side, side])


def floats(image_CHW):
    return sized(image_CHW).float()


class Task:
    pass


class Endless(IterableDataset):
    def __iter__(self):
        yield from ()


class NoOptimizer:
    def __init__(self, params, lr):
        pass


class Callback:
    pass
"""
TORCH = "torch.optim.lr_scheduler"
# Overrides, and the start of the message, which is complete where it ends with a period
MISTAKES: dict[str, tuple[list[str], str]] = {
    "an unknown module": (
        ["loss=custom", "loss._target_=minee.Loss"],
        "loss._target_=minee.Loss: there is no module minee. Check the name: minee.py is searched in the current folder, ",
    ),
    "an unknown class": (["loss=custom", "loss._target_=mine.Los"], "loss._target_=mine.Los: mine has no Los: did you mean 'Loss'?"),
    "a name without module": (["loss=custom", "loss._target_=Loss"], "loss._target_=Loss: there is no module Loss. Check the name: write module.name"),
    "a wrong argument": (
        ["loss=custom", "loss._target_=mine.Loss", "loss.weight=1", "loss.smothing=0.1"],
        "loss.smothing is not an argument of mine.Loss: did you mean 'smoothing'?",
    ),
    "a wrong argument in an object inside": (
        ["loss=custom", "loss._target_=mine.Loss", "loss.weight={_target_: mine.Loss, weight: 1, wieght: 2}"],
        "loss.weight.wieght is not an argument of mine.Loss: did you mean 'weight'?",
    ),
    "a missing argument": (
        ["loss=custom", "loss._target_=mine.Loss"], "loss.weight has no value, but mine.Loss requires it: set it (loss.weight=…).",
    ),
    "a module with a syntax error": (
        ["loss=custom", "loss._target_=broken.Loss"], "loss._target_=broken.Loss: broken cannot be imported: SyntaxError: ",
    ),
    "a module that imports what is not installed": (
        ["loss=custom", "loss._target_=missing.Loss"], "loss._target_=missing.Loss: missing cannot be imported: ModuleNotFoundError: No module named 'absent",
    ),
    "an unknown input of a loss": (
        ["loss=custom", "loss._target_=mine.Hungry"],
        "loss._target_=mine.Hungry takes 'text_feature', which is neither an input of losses nor in data.columns: did you mean 'text_features'?",
    ),
    "an unknown input of a function": (
        ["loss=custom", "loss._target_=mine.function", "+loss._partial_=true"],
        "loss._target_=mine.function takes 'color', which is neither an input of losses nor in data.columns: ",
    ),
    "a function that would be called instead of bound": (
        ["loss=custom", "loss._target_=mine.function"],
        "loss._target_=mine.function is a function that computes a loss: set loss._partial_=true, so that its arguments are bound.",
    ),
    "a loss with a bias that the model lacks": (
        ["loss=custom", "loss._target_=mine.WithBias"],
        "loss._target_=mine.WithBias takes logit_bias, but the model has none: set loss.init_logit_bias.",
    ),
    "a loss without forward": (
        ["loss=custom", "loss._target_=torch.nn.Module"], "loss._target_=torch.nn.Module takes no input by name: give its forward arguments",
    ),
    "an argument of __init__ as an input": (
        ["loss=custom", "loss._target_=mine.Twice", "loss.weight=1"],
        "loss._target_=mine.Twice takes 'weight', which is neither an input of losses nor in data.columns: ",
    ),
    "the name of an installed module": (
        ["loss=custom", "loss._target_=json.Loss"], f"loss._target_=json.Loss: json ({json.__file__}) has no Loss: ",
    ),
    "a loss that cannot be created": (
        ["loss=custom", "loss._target_=mine.Broken"], "loss: mine.Broken could not be created: ValueError: no luck (mine.py, line ",
    ),
    "a class that is no loss": (["loss=custom", "loss._target_=mine.Callback"], "loss._target_=mine.Callback is not a loss: name a torch.nn.Module, or a function with _partial_=true."),
    "a teacher that does not exist": (
        ["--config-dir", str(EXAMPLES / "conf"), "loss=distillation", "loss.teacher=absent"],
        "loss: 'absent' is neither an existing file or folder nor a model: ",
    ),
    "an image tower with feature maps": (
        ["model/image=custom", "model.image._target_=mine.Maps", "model.image.image_size=32"],
        "model.image: mine.Maps returned [2, 3, 32, 32] for 2 samples, but features [B, channels] are required.",
    ),
    "an image tower with further inputs": (
        ["model/image=custom", "model.image._target_=mine.Failing", "model.image.image_size=32"],
        "model.image: mine.Failing fails on a batch of [2, 3, 32, 32] (TypeError: ",
    ),
    "a text tower without a tensor": (
        ["model/text=custom", "model.text._target_=mine.Texts"],
        "model.text: mine.Texts returned list for 2 samples, but features [B, channels] are required.",
    ),
    "a tower that is no module": (
        ["model/image=custom", "model.image._target_=mine.Callback", "model.image.image_size=32"],
        "model.image: mine.Callback returned Callback, but a torch.nn.Module is required.",
    ),
    "a tower with other channels than the shared space": (
        ["model/image=custom", "model.image._target_=mine.Images", "model.image.image_size=32", "model.image.projection=none"],
        "model.image.projection=none requires that the features of mine.Images have model.embed_dim=64 channels, but they have 3.",
    ),
    "a transform to floats": (
        ["+data.transform={_target_: mine.floats, _partial_: true}"],
        "data.transform._target_=mine.floats returned torch.float32 [3, 32, 32], but a uint8 tensor [3, 32, 32] is required (model.image.image_size=32).",
    ),
    "a transform to another size": (
        ["+data.transform={_target_: mine.sized, _partial_: true, side: 33}"],
        "data.transform._target_=mine.sized returned torch.uint8 [3, 33, 33], but a uint8 tensor [3, 32, 32] is required",
    ),
    "a transform that cannot be called": (["+data.transform={_target_: mine.Callback}"], "data.transform._target_=mine.Callback is not callable: "),
    "a schedule without its length": (
        [f"scheduler._target_={TORCH}.CosineAnnealingLR"], f"scheduler.T_max has no value, but {TORCH}.CosineAnnealingLR requires it: set it (scheduler.T_max=…).",
    ),
    "a schedule that follows a metric": (
        [f"scheduler._target_={TORCH}.ReduceLROnPlateau"],
        f"scheduler._target_={TORCH}.ReduceLROnPlateau is not supported: it follows a validation metric, not the optimizer steps, so a resumed run could "
        "not continue it exactly. Use scheduler=cosine, or another schedule.",
    ),
    "our decay with a schedule of torch": (
        [f"scheduler._target_={TORCH}.CosineAnnealingLR", "scheduler.T_max=10", "scheduler.final_factor=0.1"],
        f"scheduler.final_factor=0.1 has no effect with scheduler._target_={TORCH}.CosineAnnealingLR: leave it out, and set the arguments of the scheduler",
    ),
    "a schedule with a warm-up of its own": (
        [f"scheduler._target_={TORCH}.OneCycleLR", "scheduler.max_lr=1e-3", "scheduler.warmup_steps=2"],
        f"scheduler._target_={TORCH}.OneCycleLR has a warm-up of its own: set scheduler.warmup_steps=0.",
    ),
    "a schedule with one rate for all weights": (
        [f"scheduler._target_={TORCH}.OneCycleLR", "scheduler.max_lr=1e-3", "scheduler.warmup_steps=0", "finetune.image.lr_factor=0.1"],
        f"scheduler._target_={TORCH}.OneCycleLR gives all weights the same learning rate",
    ),
    "a schedule that is none": (["scheduler._target_=mine.Callback"], "scheduler"),
    "an optimizer that is none": (["optimizer=custom", "optimizer._target_=mine.NoOptimizer"], "optimizer"),
    "a task without score": (["+task.mine={_target_: mine.Task}"], "task.mine._target_=mine.Task has no method score(model), which a task needs."),
    "a data set without positions": (["data=custom", "data._target_=mine.Endless"], "data._target_=mine.Endless is an IterableDataset. A stream without positions"),
    "a callback that is none": (["+callbacks.extra.mine={_target_: mine.Callback}"], "callbacks.extra.mine"),
    "a logger that is none": (
        ["+logger.extra.mine={_target_: mine.Callback}"], "logger.extra.mine: Callback is not a logger: give a subclass of pytorch_lightning.loggers.Logger",
    ),
}  # fmt: skip


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A folder with the user's modules."""
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "broken.py").write_text("class Loss:\n    def forward(self)\n        pass\n")
    (tmp_path / "missing.py").write_text("import absent_of_all\n")
    return tmp_path


def replaced(options: list[str]) -> list[str]:
    """The options of a small run, without those that a mistake replaces."""
    groups = {option.partition("=")[0] for option in options}
    data: tuple[Any, ...] = () if "data" in groups else DIGITS
    return [*(o for o in SMALL if not (o.startswith("optimizer") and "optimizer" in groups)), *data, "max_steps=4"]


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_message_before_a_run_folder_exists(case: str, here: Path, refused: Run) -> None:
    options, message = MISTAKES[case]
    more = ["optimizer.lr=1e-3"] if "optimizer=custom" in options else []
    result = refused("train.py", *options, *replaced(options), *more, cwd=here)
    assert result.returncode == 2, result.stdout + result.stderr
    assert result.stderr.startswith(f"error: {message}"), result.stderr
    assert len(result.stderr.splitlines()) == 1, result.stderr
    assert "Traceback" not in result.stderr
    assert not (here / "outputs" / "train").exists()


def test_a_syntax_error_names_file_and_line(here: Path, refused: Run) -> None:
    options, _ = MISTAKES["a module with a syntax error"]
    result = refused("train.py", *replaced(options), *options, cwd=here)
    assert "(broken.py, line 2)" in result.stderr


def test_several_mistakes_are_reported_at_once(here: Path, refused: Run) -> None:
    options = ["loss=custom", "loss._target_=mine.Loss", "loss.smothing=1", "scheduler._target_=mine.Absent"]
    result = refused("train.py", *replaced(options), *options, cwd=here)
    assert result.returncode == 2
    for part in ("loss.smothing is not", "loss.weight has no value", "mine has no Absent"):
        assert part in result.stderr
    assert not (here / "outputs" / "train").exists()
