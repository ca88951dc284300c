"""Tests that all weights are loaded or none, and that problems are reported in a few lines."""

from pathlib import Path

import pytest
import torch
from open_clip.model import resize_pos_embed
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from clip_exp.config.model import ModelConfig
from clip_exp.config.names import named_model
from clip_exp.errors import CheckpointError
from clip_exp.models.clip import CLIP, build_model
from clip_exp.models.families.siglip import SigLIPImageConfig, SigLIPTextConfig
from clip_exp.models.families.timm import TimmConfig
from clip_exp.weights.fit import fit_weights, grouped, load_weights, resize_grid
from clip_exp.weights.names import to_open_clip
from tests.models.small import CONTEXT_LENGTH, batch, open_clip_twin, small_config, trim
from tests.weights.published import our_config


@pytest.fixture
def model() -> CLIP:
    torch.manual_seed(0)
    return build_model(small_config())


def fresh(config: ModelConfig | None = None, bias: float | None = None) -> CLIP:
    torch.manual_seed(1)
    return build_model(config or small_config(), init_logit_bias=bias)


def refusal(model: nn.Module, state: dict[str, Tensor]) -> str:
    """Return the error message for weights that do not fit, after checking that the model is unchanged."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        fit_weights(model, state, "file.pt")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    message = str(caught.value)
    assert message.startswith("file.pt ")
    assert len(message) < 2000
    assert len(message.splitlines()) < 9
    return message


def test_half_precision_goes_into_float32(model: CLIP, tmp_path: Path) -> None:
    path = tmp_path / "half.pt"
    for dtype in (torch.float16, torch.bfloat16):
        torch.save({name: tensor.to(dtype) for name, tensor in to_open_clip(model.state_dict()).items()}, path)
        other = fresh()
        assert load_weights(other, path) == []
        assert other.image.class_embedding.dtype == torch.float32
        assert torch.equal(other.image.class_embedding, model.image.class_embedding.to(dtype).float())


def test_what_does_not_fit_is_named_and_nothing_is_loaded(model: CLIP) -> None:
    state = model.state_dict()
    del state["text.ln_final.bias"]
    state["image.extra"] = torch.zeros(1)
    state["image.ln_post.weight"] = torch.zeros(50)
    state["image.ln_post.bias"] = torch.zeros(64, dtype=torch.int8)
    message = refusal(fresh(), state)
    assert "missing in the file: text.ln_final.bias" in message
    assert "not in the model: image.extra" in message
    assert "different shape: image.ln_post.weight [50] instead of [64]" in message
    assert "different dtype: image.ln_post.bias torch.int8 instead of torch.float32" in message


def test_a_missing_tower_is_reported_as_one_name(model: CLIP) -> None:
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("text.")}
    count = len(model.state_dict()) - len(state)
    assert f"missing in the file: text.* ({count} weights)\n" in refusal(fresh(), state)


def test_weights_of_every_block_are_listed_once() -> None:
    blocks = [
        f"image.transformer.blocks.{i}.{part}" for i in range(12) for part in ("ln_1.weight", "ln_1.bias", "mlp.bias")
    ]
    among = ["image.class_embedding", *blocks]
    assert grouped({name for name in blocks if name.endswith("mlp.bias")}, among) == [
        "image.transformer.blocks.0-11.mlp.bias (12 weights)"
    ]
    assert grouped(blocks[6:], among) == ["image.transformer.blocks.2-11.* (30 weights)"]
    assert grouped(blocks[:3] + blocks[30:33], among) == ["image.transformer.blocks.*.* (6 weights)"]
    assert grouped(blocks, among) == ["image.transformer.* (36 weights)"]
    assert grouped(among, among) == ["image.* (37 weights)"]
    assert grouped({"image.class_embedding"}, among) == ["image.class_embedding"]
    assert grouped(["logit_scale"], ["logit_scale", "logit_bias"]) == ["logit_scale"]


def meta_state(name: str) -> dict[str, Tensor]:
    """Return the shapes of a model of `conf/model/`."""
    with torch.device("meta"):
        return build_model(named_model(name)).state_dict()


@pytest.mark.parametrize(
    ("file", "model", "numbers"),
    [
        ("vit_l14", "vit_b32", "image.layers=24 instead of 12"),
        ("vit_l14_336", "vit_l14", "image.width=1024"),
        ("vit_b32", "vit_b16", "image.patch_size=32 instead of 16"),
        ("rn50x4", "vit_b32", "image.kind=resnet instead of vit"),
        ("rn101", "rn50", "image.stages=[3, 4, 23, 3] instead of [3, 4, 6, 3]"),
        ("siglip_b16", "vit_b16", "image.kind=siglip instead of vit"),
    ],
)
def test_weights_of_another_known_model_are_recognized(file: str, model: str, numbers: str) -> None:
    with torch.device("meta"):
        chosen = build_model(named_model(model))
    state = meta_state(file)
    if file == "vit_l14_336":  # whose positions alone would fit
        state["image.ln_post.bias"] = torch.empty(7, device="meta")
        numbers = f"model={file} has these shapes"
    with pytest.raises(CheckpointError) as caught:
        fit_weights(chosen, state, "file.pt")
    message = str(caught.value)
    assert numbers in message
    assert f"model={file} has these shapes: select it." in message
    assert len(message.splitlines()) < 9
    assert len(message) < 2000


def test_a_bias_depends_on_the_loss_and_is_reported(model: CLIP) -> None:
    with_bias = fresh(bias=-10.0)
    notes = fit_weights(with_bias, model.state_dict(), "file.pt")
    assert with_bias.logit_bias is not None
    assert with_bias.logit_bias.item() == -10
    assert ["logit_bias" in note and "-10" in note for note in notes] == [True]
    without = fresh()
    notes = fit_weights(without, {**model.state_dict(), "logit_bias": torch.tensor([-3.0])}, "file.pt")
    assert ["softmax" in note for note in notes] == [True]
    assert torch.equal(without.logit_scale, model.logit_scale)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(model: CLIP, value: float) -> None:
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state["text.ln_final.weight"][3] = value
    assert "not finite (NaN or infinite) in text.ln_final.weight." in refusal(fresh(), state)


def test_numbers_of_other_widths_become_float32_or_are_named(model: CLIP) -> None:
    state = {name: tensor.double() for name, tensor in model.state_dict().items()}
    other = fresh()
    assert fit_weights(other, state, "file.pt") == []
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in other.state_dict().items())
    state["text.ln_final.weight"][3] = 1e300  # no float32
    assert "not finite (NaN or infinite) in text.ln_final.weight." in refusal(fresh(), state)
    state["text.ln_final.weight"] = torch.ones(48, dtype=torch.float8_e5m2)
    assert "different dtype: text.ln_final.weight torch.float8_e5m2 instead of torch.float32" in refusal(other, state)


NINES = "9" * 5000  # a number that Python does not read


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ({"image.patch_embedding.weight": torch.ones(())}, "image.patch_embedding.weight [] instead of"),
        ({"text.token_embedding.weight": torch.ones(4)}, "text.token_embedding.weight [4] instead of"),
        ({"text.positional_embedding": torch.ones(())}, "text.positional_embedding [] instead of"),
        ({"text.projection.weight": torch.ones(())}, "text.projection.weight [] instead of"),
        ({"image.stem.conv1.weight": torch.ones(()), f"image.stages.{NINES}.{NINES}.x": torch.ones(1)}, "not in the"),
        ({"\x1b]0;hostile\x07\n": torch.ones(1)}, r"not in the model: '\x1b]0;hostile\x07\n'…"),
    ],
)
def test_what_no_model_has_is_named_too(model: CLIP, weights: dict[str, Tensor], expected: str) -> None:
    message = refusal(fresh(), model.state_dict() | weights)
    assert expected in message
    assert message.replace("\n", "").isprintable()


def with_image(config: ModelConfig, **values: int) -> ModelConfig:
    return config.model_copy(update={"image": config.image.model_copy(update=values)})


@pytest.mark.parametrize("image_size", [16, 64, 72])
def test_positions_of_a_vit_are_interpolated_as_open_clip_does(model: CLIP, image_size: int, tmp_path: Path) -> None:
    theirs = to_open_clip(model.state_dict())
    torch.save(theirs, tmp_path / "model.pt")
    bigger = fresh(with_image(small_config(), image_size=image_size))
    side = image_size // 8
    (note,) = load_weights(bigger, tmp_path / "model.pt")
    assert note.startswith(
        f"image.positional_embedding: interpolated (bicubic) from a grid of 4x4 patches to {side}x{side}"
    )
    twin = open_clip_twin(model)
    twin.visual.grid_size = (side, side)
    resize_pos_embed(theirs, twin)
    torch.testing.assert_close(
        bigger.image.positional_embedding.data, theirs["visual.positional_embedding"], rtol=0, atol=1e-6
    )


def test_positions_of_a_resnet_are_interpolated_as_a_vits() -> None:
    config = our_config("resnet")
    small, big = fresh(config), fresh(with_image(config, image_size=128))
    (note,) = fit_weights(big, small.state_dict(), "file")
    assert "grid of 2x2 patches to 4x4" in note
    old = small.image.pool.positional_embedding.data
    expected = resample_abs_pos_embed(old[None], [4, 4], num_prefix_tokens=1)[0]
    torch.testing.assert_close(big.image.pool.positional_embedding.data, expected, rtol=0, atol=1e-6)


def siglip_config(image_size: int = 32, context_length: int = 12) -> ModelConfig:
    config = small_config()
    image = SigLIPImageConfig(image_size=image_size, patch_size=8, width=40, layers=2, heads=4)
    text = SigLIPTextConfig(
        context_length=context_length, vocab_size=500, width=48, layers=2, heads=3, tokenizer="none"
    )
    return config.model_copy(update={"image": image, "text": text})


def test_positions_of_siglip_are_interpolated_as_timm_does() -> None:
    small, big = fresh(siglip_config()), fresh(siglip_config(image_size=56))
    (note,) = fit_weights(big, small.state_dict(), "file")
    assert "grid of 4x4 patches to 7x7" in note
    expected = resample_abs_pos_embed(small.image.positional_embedding.data[None], [7, 7], num_prefix_tokens=0)[0]
    torch.testing.assert_close(big.image.positional_embedding.data, expected, rtol=0, atol=1e-6)


def test_only_square_grids_with_the_same_first_token_are_interpolated() -> None:
    assert resize_grid(torch.ones(17, 3), 16) is None
    assert resize_grid(torch.ones(16, 3), 26) is None
    assert resize_grid(torch.ones(12, 3), 16) is None
    assert resize_grid(torch.ones(17, 3), 0) is None
    assert resize_grid(torch.ones(1, 17, 3), 26).shape == (1, 26, 3)  # type: ignore[union-attr]


def test_a_shorter_context_gives_the_same_features_of_texts_that_fit_in(model: CLIP) -> None:
    config = small_config()
    short = fresh(config.model_copy(update={"text": config.text.model_copy(update={"context_length": 20})}))
    (note,) = fit_weights(short, model.state_dict(), "file")
    assert note.startswith(f"text.positional_embedding: truncated from {CONTEXT_LENGTH} to 20 positions")
    tokens_BL = trim(batch(4)[1])
    torch.testing.assert_close(short.encode_text(tokens_BL), model.encode_text(tokens_BL), rtol=0, atol=1e-6)


def test_a_longer_context_is_refused_with_the_reason(model: CLIP) -> None:
    config = small_config()
    long = fresh(config.model_copy(update={"text": config.text.model_copy(update={"context_length": 128})}))
    message = refusal(long, model.state_dict())
    assert "text.positional_embedding [77, 48] instead of [128, 48]" in message
    assert "set model.text.context_length=77" in message


def test_another_context_of_a_text_tower_that_is_not_causal_is_refused() -> None:
    """Its features depend on all positions, so a part of them would be another tower."""
    message = refusal(fresh(siglip_config(context_length=8)), fresh(siglip_config()).state_dict())
    assert "set model.text.context_length=12" in message


def test_foreign_towers_are_read_by_the_configuration(tmp_path: Path) -> None:
    """Our names do not follow from open_clip's names of a timm tower, but from the model's configuration."""
    config = small_config().model_copy(update={"image": TimmConfig(image_size=64, name="resnet10t"), "embed_dim": 40})
    source, other = fresh(config), build_model(config)
    save_file(to_open_clip(source.state_dict(), config), tmp_path / "theirs.safetensors")
    load_weights(other, tmp_path / "theirs.safetensors", config)
    assert all(torch.equal(tensor, source.state_dict()[name]) for name, tensor in other.state_dict().items())
