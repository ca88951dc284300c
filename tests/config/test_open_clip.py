import open_clip
import pytest

from clip_exp.config.names import FIELDS, open_clip_field
from clip_exp.errors import ConfigError
from tests.compose import train_config


def test_every_configuration_has_every_field_as_open_clip_has_it() -> None:
    for name in open_clip.list_models():
        described = open_clip.get_model_config(name)
        vision, text = described["vision_cfg"], described["text_cfg"]
        found = {field: open_clip_field(name, field) for field in FIELDS}
        assert found["embed_dim"] == described["embed_dim"]
        assert found["image_size"] == vision["image_size"]
        assert found["context_length"] == text.get("context_length", 77)
        assert found["tokenizer"] == text.get("hf_tokenizer_name")
        assert found["encoder"] == text.get("hf_model_name")
        assert found["strip_sep_token"] == ("CLIPA" in name)
        assert (found["cleaning"] == "canonicalize") == ("SigLIP" in name or name.startswith("ViT-L-14-worldwide"))


# What the towers themselves say is in tests/models/test_open_clip_towers.py.
NOT_TRIMMED = {"ViT-B-16-SigLIP", "ViT-L-14-CLIPA", "MobileCLIP-S1", "coca_ViT-B-32"}
TRIMMED = {"ViT-B-32", "RN50", "convnext_base", "ViT-H-14-worldwide", "roberta-ViT-B-32", "MobileCLIP-B", "EVA02-B-16"}


def test_texts_are_trimmed_in_towers_that_do_not_attend_to_padding() -> None:
    assert {name for name in NOT_TRIMMED | TRIMMED if open_clip_field(name, "trim")} == TRIMMED


def test_a_model_is_filled_by_its_name_and_what_is_set_comes_first() -> None:
    config = train_config("model=open_clip", "model.name=ViT-B-16-SigLIP", "model.text.tokenizer=folder").model
    assert (config.name, config.open_clip_name, config.embed_dim) == ("ViT-B-16-SigLIP", "ViT-B-16-SigLIP", 768)
    assert (config.image.image_size, config.text.context_length, config.text.vocab_size) == (224, 64, 32000)
    assert (config.text.tokenizer, config.text.cleaning, config.text.trim) == ("folder", "canonicalize", False)


def test_an_unknown_name_of_open_clip_is_reported_with_the_nearest() -> None:
    with pytest.raises(
        ConfigError, match=r"^model.name=convnext_bas is not a model of open_clip: did you mean conv[^\n]*$"
    ):
        train_config("model=open_clip", "model.name=convnext_bas")
    with pytest.raises(ConfigError, match=r"^model.name has no value: set it \(model.name=…\)\.$"):
        train_config("model=open_clip")
