import copy
from typing import Any

import open_clip
import pytest
import torch
from torch import Tensor, nn

from clip_exp.config.model import ModelConfig
from clip_exp.models.clip import CLIP, encode
from clip_exp.weights.names import to_ours
from tests.models.twins import inputs, load_config, randomize, shallow_timm, with_weights_of


def small(mlp_ratio: float = 4.0) -> tuple[ModelConfig, nn.Module]:
    """The architecture of SigLIP with towers of 48 channels, and open_clip's with random weights."""
    config = load_config("siglip_b16")
    config.embed_dim = 48
    for tower in (config.image, config.text):
        tower.width, tower.layers, tower.heads, tower.mlp_ratio = 48, 2, 3, mlp_ratio
    config.image.image_size, config.text.vocab_size = 48, 300
    settings: dict[str, Any] = open_clip.get_model_config("ViT-B-16-SigLIP")
    settings["text_cfg"] |= {"width": 48, "layers": 2, "heads": 3, "vocab_size": 300, "mlp_ratio": mlp_ratio}
    with shallow_timm(depth=2, embed_dim=48, num_heads=3, img_size=48, mlp_ratio=mlp_ratio):
        torch.manual_seed(0)
        twin = open_clip.model.CustomTextCLIP(48, settings["vision_cfg"], settings["text_cfg"], init_logit_bias=-10.0)
    return config, randomize(twin, std=0.1)


@pytest.fixture
def model() -> CLIP:
    config, twin = small()
    return with_weights_of(twin, config)


@pytest.mark.parametrize("mlp_ratio", [4.0, 3.7362])
def test_training_has_the_features_and_gradients_of_open_clip(mlp_ratio: float) -> None:
    config, twin = small(mlp_ratio)
    model = with_weights_of(twin, config)
    image_BCHW, tokens_BL = inputs(config, size=4)
    output = model(image_BCHW, tokens_BL)
    image_BD, text_BD, scale, bias = twin(image_BCHW, tokens_BL)
    torch.testing.assert_close(output.image_features, image_BD, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(output.text_features, text_BD, rtol=1e-5, atol=1e-5)
    (output.image_features @ output.text_features.T * output.logit_scale + output.logit_bias).square().sum().backward()
    (image_BD @ text_BD.T * scale + bias).square().sum().backward()
    expected = to_ours("open_clip", {name: p.grad for name, p in twin.named_parameters() if p.grad is not None})
    actual = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        # The bias of the keys has a gradient of rounding errors: whatever it is, it changes nothing.
        atol = 1e-2 if name.endswith("key_bias") else 1e-4 * gradient.abs().max().item()
        torch.testing.assert_close(actual[name], gradient, rtol=1e-4, atol=atol, msg=name)


def test_a_text_is_read_both_ways_padding_included(model: CLIP) -> None:
    tokens_BL = torch.randint(2, 300, (1, 64))
    features_BD = model.encode_text(tokens_BL)
    for position in (0, 30, 63):
        changed_BL = tokens_BL.clone()
        changed_BL[0, position] = 1
        assert not torch.allclose(model.encode_text(changed_BL), features_BD, atol=1e-4)
    assert not torch.allclose(model.encode_text(tokens_BL[:, :40]), features_BD, atol=1e-4)
    assert not model.shares_prefixes


def gradients(tower: nn.Module, features_BD: Tensor) -> dict[str, Tensor]:
    features_BD.square().sum().backward()
    return {name: p.grad for name, p in tower.named_parameters() if p.grad is not None}


def test_micro_batches_and_compiled_towers_give_the_gradients_of_the_whole_batch(model: CLIP) -> None:
    config, _ = small()
    for tower, x in zip((model.image, model.text), inputs(config, size=4), strict=True):
        expected = gradients(plain := copy.deepcopy(tower), plain(x))
        tower.compile(backend="aot_eager")
        actual = gradients(tower, encode(tower, x, 3))
        assert actual.keys() == expected.keys()
        for name, gradient in expected.items():
            atol = max(1e-4 * gradient.abs().max().item(), 1e-4)
            torch.testing.assert_close(actual[name], gradient, rtol=1e-3, atol=atol, msg=name)
