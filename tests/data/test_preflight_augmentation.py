"""Presets of `conf/data/augmentation/`, and invalid numbers."""

import pytest

from clip_exp.config.base import parse
from clip_exp.config.data import AugmentationConfig
from clip_exp.config.files import options
from clip_exp.errors import ConfigError
from tests.compose import train_config

CSV = ("data=csv", "data.train=pairs.csv")


@pytest.mark.parametrize("option", options("data/augmentation"))
@pytest.mark.parametrize("data", [CSV, ("data=digits",), ("data=shapes",)])
def test_a_preset_means_the_same_whatever_the_data_sets_itself(option, data):
    chosen = train_config(*data, f"data/augmentation={option}").data
    assert chosen.name == data[0].removeprefix("data=")
    assert chosen.augmentation == train_config(*CSV, f"data/augmentation={option}").data.augmentation


def test_without_a_preset_data_keeps_its_own_crops():
    assert train_config("data=digits").data.augmentation.scale == [0.7, 1.0]


def test_keys_of_a_preset_are_overridden_one_by_one():
    chosen = train_config(*CSV, "data/augmentation=strong", "data.augmentation.gray_scale_prob=0.05").data.augmentation
    assert chosen.gray_scale_prob == 0.05
    assert chosen.color_jitter == [0.4, 0.4, 0.4, 0.1]


def test_the_command_line_chooses_another_preset_than_an_experiment():
    experiment = ("experiment=flickr8k_vit_tiny", "data.train=pairs.csv")
    assert train_config(*experiment).data.augmentation.scale == [0.5, 1.0]
    strong = train_config(*CSV, "data/augmentation=strong").data.augmentation
    assert train_config(*experiment, "data/augmentation=strong").data.augmentation == strong


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("horizontal_flip", 1.5, "=1.5 must be at most 1."),
        ("color_jitter_prob", -0.1, "=-0.1 must be at least 0."),
        ("gray_scale_prob", float("nan"), "=nan must be a finite number."),
        ("gaussian_blur_prob", 2, "=2 must be at most 1."),
        ("scale", [0.5, 1.1], "[1]=1.1 must be at most 1."),
        ("scale", [0.0, 1.0], "[0]=0.0 must be greater than 0."),
        ("scale", 0.5, "=0.5 must be a list."),
        ("ratio", [1.5, 0.5], "=[1.5, 0.5] must have the smaller number first."),
        ("ratio", [1.0, float("inf")], "[1]=inf must be a finite number."),
        ("gaussian_blur_sigma", [0.0, 2.0], "[0]=0.0 must be greater than 0."),
        ("gaussian_blur_sigma", [1.0], "=[1.0] must have 2 values."),
        ("color_jitter", [0.4, 0.4, 0.4], "=[0.4, 0.4, 0.4] must have 4 values."),
        ("color_jitter", [0.4] * 5, "=[0.4, 0.4, 0.4, 0.4, 0.4] must have 4 values."),
        ("color_jitter", [0.4, 0.4, 0.4, 0.6], "=[0.4, 0.4, 0.4, 0.6] must have a hue (the last value) of at most 0.5."),
        ("color_jitter", [-0.4, 0.4, 0.4, 0.1], "[0]=-0.4 must be at least 0."),
    ],
)  # fmt: skip
def test_numbers_without_a_meaning_are_refused_by_key(key, value, expected):
    with pytest.raises(ConfigError) as caught:
        parse(AugmentationConfig, {key: value}, "data.augmentation.")
    assert str(caught.value) == f"data.augmentation.{key}{expected}"
