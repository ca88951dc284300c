"""Tests that files of Chinese-CLIP, from cn-clip and from transformers' ChineseCLIPModel, load with equal features."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import ChineseCLIPConfig, ChineseCLIPModel

import clip_exp
from clip_exp.config.commands import ExportFormat
from clip_exp.config.model import Activation, ModelConfig, Pooler, Projection, ResizeMode
from clip_exp.config.names import named_model
from clip_exp.errors import CheckpointError
from clip_exp.export.write import write_export
from clip_exp.models.clip import build_model
from clip_exp.models.families.published import huggingface_config, model_config_of
from clip_exp.weights.fit import load_weights
from clip_exp.weights.inspect import describe
from clip_exp.weights.names import to_huggingface
from tests.encoders import CHINESE, CHINESE_CLIP, small_chinese_clip, write_chinese_clip

CONTEXT = 52
VISION, TEXT = CHINESE_CLIP["vision_config"], CHINESE_CLIP["text_config"]
SIZE, VOCABULARY = VISION["image_size"], TEXT["vocab_size"]


@pytest.fixture(scope="module")
def theirs() -> ChineseCLIPModel:
    return small_chinese_clip()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_chinese_clip(tmp_path)


def as_cn_clip_saves(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights under the names of `cn_clip.clip.model.CLIP`, whose image tower is OpenAI's and whose text tower is a BERT.

    Written out here, since cn-clip pins other versions of what the tests need.
    """
    renamed: dict[str, Tensor] = {
        "text_projection": state["text_projection.weight"].T.contiguous(),
        "logit_scale": state["logit_scale"],
        "visual.proj": state["visual_projection.weight"].T.contiguous(),
        "visual.class_embedding": state["vision_model.embeddings.class_embedding"],
        "visual.positional_embedding": state["vision_model.embeddings.position_embedding.weight"],
        "visual.conv1.weight": state["vision_model.embeddings.patch_embedding.weight"],
    }
    for kind in ("weight", "bias"):
        renamed[f"visual.ln_pre.{kind}"] = state[f"vision_model.pre_layrnorm.{kind}"]
        renamed[f"visual.ln_post.{kind}"] = state[f"vision_model.post_layernorm.{kind}"]
        for i in range(VISION["num_hidden_layers"]):
            here, there = f"visual.transformer.resblocks.{i}", f"vision_model.encoder.layers.{i}"
            renamed[f"{here}.attn.in_proj_{kind}"] = torch.cat(
                [state[f"{there}.self_attn.{part}_proj.{kind}"] for part in "qkv"]
            )
            for ours, of_transformers in (
                ("attn.out_proj", "self_attn.out_proj"), ("ln_1", "layer_norm1"), ("ln_2", "layer_norm2"), ("mlp.c_fc", "mlp.fc1"),
                ("mlp.c_proj", "mlp.fc2"),
            ):  # fmt: skip
                renamed[f"{here}.{ours}.{kind}"] = state[f"{there}.{of_transformers}.{kind}"]
    return renamed | {
        name.replace("text_model.", "bert.", 1): tensor
        for name, tensor in state.items()
        if name.startswith("text_model.")
    }


def our_config() -> ModelConfig:
    """Return a small version of `model=chinese_clip_b16`."""
    model = named_model("chinese_clip_b16")
    sizes = {"image_size": SIZE, "patch_size": 8, "width": 48, "layers": 2, "heads": 4}
    return model.model_copy(
        update={
            "embed_dim": 40,
            "image": model.image.model_copy(update=sizes),
            "text": model.text.model_copy(update={"architecture": {**model.text.architecture, **TEXT}}),  # type: ignore[attr-defined]
        }
    )


@torch.no_grad()
def assert_same_features(theirs: Any, ours: Any) -> None:
    draw = torch.Generator().manual_seed(1)
    image_BCHW = torch.randn(3, 3, SIZE, SIZE, generator=draw)
    tokens_BL = torch.randint(1, VOCABULARY, (3, CONTEXT), generator=draw)
    for i, row_L in enumerate(tokens_BL):
        row_L[5 + i :] = 0
    image = theirs.get_image_features(pixel_values=image_BCHW).pooler_output
    text = theirs.get_text_features(input_ids=tokens_BL, attention_mask=(tokens_BL != 0).long()).pooler_output
    torch.testing.assert_close(ours.encode_image(image_BCHW), image, rtol=0, atol=1e-5)
    torch.testing.assert_close(ours.encode_text(tokens_BL), text, rtol=0, atol=1e-5)
    torch.testing.assert_close(ours.encode_text(tokens_BL[:, :8]), text, rtol=0, atol=1e-5)  # cut to the longest
    assert torch.equal(ours.logit_scale, theirs.logit_scale.reshape(1))


@pytest.mark.parametrize("with_pooler", [False, True])
def test_a_checkpoint_of_cn_clip_loads(with_pooler: bool, theirs: ChineseCLIPModel, tmp_path: Path) -> None:
    """Some of the published files have BERT's pooler, which cn-clip does not load, either."""
    state = as_cn_clip_saves(theirs.state_dict())
    if with_pooler:
        state |= {"bert.pooler.dense.weight": torch.zeros(32, 32), "bert.pooler.dense.bias": torch.zeros(32)}
    wrapped = {f"module.{name}": tensor for name, tensor in state.items()}
    path = tmp_path / "clip_cn_vit-b-16.pt"
    torch.save({"epoch": 1, "step": 5, "name": "finetuned", "state_dict": wrapped, "optimizer": {"state": {}}}, path)
    config = our_config()
    model = build_model(config).eval()
    assert load_weights(model, path, config) == []
    assert_same_features(theirs, model)


def test_a_saved_folder_loads_by_itself(theirs: ChineseCLIPModel, folder: Path) -> None:
    clip = clip_exp.load(folder, accelerator="cpu")
    assert clip.config.activation is Activation.quick_gelu
    assert clip.config.image.resize_mode is ResizeMode.squash
    text: Any = clip.config.text
    assert (text.pooler, text.projection, text.context_length) == (Pooler.cls, Projection.linear, CONTEXT)
    assert_same_features(theirs, clip.model)


def test_a_folder_as_it_is_published_loads(theirs: ChineseCLIPModel, tmp_path: Path) -> None:
    """`pytorch_model.bin` contains position ids, the configuration has no defaults, and the tokenizer is `vocab.txt`."""
    positions = {"text_model.embeddings.position_ids": torch.arange(64)[None]}
    torch.save(theirs.state_dict() | positions, tmp_path / "pytorch_model.bin")
    values = {**CHINESE_CLIP, "text_config_dict": None, "vision_config_dict": None}
    (tmp_path / "config.json").write_text(json.dumps(values))
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *dict.fromkeys("".join(CHINESE))]
    (tmp_path / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    clip = clip_exp.load(tmp_path, accelerator="cpu")
    assert_same_features(theirs, clip.model)
    assert clip.config.image.resize_mode is ResizeMode.squash  # as Chinese-CLIP was trained
    assert clip.tokenizer(CHINESE)[0].tolist()[:3] == [2, 5, 6]


def test_weights_and_configuration_go_back_unchanged(theirs: ChineseCLIPModel, folder: Path) -> None:
    config = describe(folder).model
    assert config is not None
    model = build_model(config)
    load_weights(model, folder, config)
    again = ChineseCLIPModel(ChineseCLIPConfig.from_dict(huggingface_config(config)))
    again.load_state_dict(to_huggingface(model.state_dict(), config), strict=True)
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in theirs.state_dict().items())


@pytest.mark.parametrize("name", [f"chinese_clip_{size}" for size in ("b16", "l14", "l14_336", "h14")])
def test_our_models_are_those_of_transformers(name: str) -> None:
    """The weights are the same, and the configuration is reproduced, so `pretrained` accepts it."""
    config = named_model(name)
    values = huggingface_config(config)
    with torch.device("meta"):
        model, theirs = build_model(config), ChineseCLIPModel(ChineseCLIPConfig.from_dict(values))
    shapes = {key: tensor.shape for key, tensor in to_huggingface(model.state_dict(), config).items()}
    assert shapes == {key: tensor.shape for key, tensor in theirs.state_dict().items()}
    again = model_config_of(values)
    assert again.activation is config.activation
    assert again.image == config.image
    named = {"name": config.text.name, "tokenizer": config.text.tokenizer}  # type: ignore[attr-defined]
    assert again.text.model_copy(update=named) == config.text


def test_positions_of_another_kind_are_refused() -> None:
    text = TEXT | {"position_embedding_type": "relative_key"}
    with pytest.raises(
        CheckpointError, match="position_embedding_type=relative_key of the text tower must be absolute"
    ):
        model_config_of(CHINESE_CLIP | {"text_config": text})


def test_the_length_of_texts_goes_into_an_export_and_comes_back(folder: Path, tmp_path: Path) -> None:
    """It is not part of transformers' configuration, but of the tokenizer's."""
    config = clip_exp.load(folder, accelerator="cpu").config
    text = config.text.model_copy(update={"context_length": 17})
    model = build_model(changed := config.model_copy(update={"text": text})).eval()
    exported = write_export(model, changed, None, tmp_path / "out", ExportFormat.huggingface).folder
    assert describe(exported).model.text.context_length == 17  # type: ignore[union-attr]
