"""Tests of models by their names in other libraries, on the command line and in Python."""

import open_clip
import pytest

from clip_exp.config.files import options
from clip_exp.config.model import Activation
from clip_exp.config.names import named_model, names, resolve, translate
from clip_exp.errors import ConfigError

ELSEWHERE = {
    "ViT-B/32": "vit_b32",
    "ViT-L/14@336px": "vit_l14_336",
    "RN50x16": "rn50x16",
    "clip-base-p32-224": "vit_b32",
    "clip-large-p14-336": "vit_l14_336",
    "ViT-B-32": "vit_b32",
    "ViT-bigG-14": "vit_bigg14",
    "ViT-B-16-SigLIP": "siglip_b16",
}


@pytest.mark.parametrize(("name", "ours"), ELSEWHERE.items())
def test_a_name_from_elsewhere_is_one_of_ours(name: str, ours: str) -> None:
    assert translate([f"model={name}", "seed=1"]) == [f"model={ours}", "seed=1"]
    assert named_model(name) == named_model(ours)


def test_quickgelu_in_a_name_is_the_activation() -> None:
    assert translate(["model=ViT-B-32-quickgelu"]) == ["model=vit_b32", "model.activation=quick_gelu"]
    assert named_model("ViT-B-32-quickgelu").activation is Activation.quick_gelu
    assert named_model("ViT-B-32").activation is None


def test_every_other_configuration_of_open_clip_goes_through_the_adapter() -> None:
    assert translate(["model=coca_ViT-B-32"]) == ["model=open_clip", "model.name=coca_ViT-B-32"]
    assert named_model("coca_ViT-B-32").image.kind == "open_clip"
    assert [name for name in open_clip.list_models() if resolve(name) is None] == []


def test_each_name_is_listed_once_and_the_adapter_is_not_a_model() -> None:
    assert len(names()) == len(set(names()))
    with pytest.raises(ConfigError, match="open_clip stands for any architecture of open_clip: give the name of one"):
        named_model("open_clip")


def test_our_names_custom_names_and_typos_are_left_to_hydra() -> None:
    arguments = ["model=vit_b23", "model=mine", "model=null", "model.name=ViT-B/32", "data.train=ViT-B/32", "-m"]
    assert translate([*arguments, *(f"model={name}" for name in options("model"))])[: len(arguments)] == arguments


def test_in_a_sweep_each_choice_is_translated() -> None:
    assert translate(["model=ViT-B/32,RN50,vit_nano", "-m"]) == ["model=vit_b32,rn50,vit_nano", "-m"]
    with pytest.raises(ConfigError, match=r"ViT-B-32-quickgelu stands for model=vit_b32 model\.activation=quick_gelu"):
        translate(["model=vit_b16,ViT-B-32-quickgelu", "-m"])


@pytest.mark.parametrize(
    ("arguments", "code", "expected"),
    [
        (["model=ViT-B/32", "--cfg", "job", "--package", "model.name"], 0, "vit_b32"),
        (["model=ViT-B/23"], 2, "model=ViT-B/23 does not exist: did you mean 'ViT-B/32'?"),
        (["model=vit_b16,ViT-B-32-quickgelu", "-m"], 2, "cannot be combined with other models in a sweep"),
    ],
)
def test_the_command_line_knows_them(command, tmp_path, arguments: list[str], code: int, expected: str) -> None:
    result = command("train.py", *arguments, cwd=tmp_path)
    assert result.returncode == code
    assert expected in result.stdout + result.stderr
    assert "Traceback" not in result.stderr
