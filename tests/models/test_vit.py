import copy

import open_clip
import pytest
import torch
from torch import Tensor, nn

from clip_exp.models.clip import CLIP, build_model, encode
from clip_exp.models.families.clip import ViTConfig
from clip_exp.models.families.clip.vit import PatchDropout
from clip_exp.models.families.siglip import SigLIPImageConfig
from clip_exp.weights.names import to_open_clip
from tests.models.small import batch, small_config


def build(fraction: float, kind: str = "vit") -> CLIP:
    torch.manual_seed(0)
    config = small_config()
    family = {"vit": ViTConfig, "siglip": SigLIPImageConfig}[kind]
    config.image = family(image_size=32, patch_size=8, width=64, layers=2, heads=4, patch_dropout=fraction)
    config.embed_dim = 64
    return build_model(config)


def gradients(tower: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in tower.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("fraction", [0.5, 0.99])
def test_patch_dropout_keeps_the_patches_that_open_clip_keeps(fraction: float) -> None:
    model = build(fraction)
    twin = open_clip.CLIP(
        64,
        {"image_size": 32, "patch_size": 8, "width": 64, "layers": 2, "head_width": 16, "patch_dropout": fraction},
        {"context_length": 77, "vocab_size": 500, "width": 48, "layers": 2, "heads": 3},
    )
    twin.load_state_dict(to_open_clip(model.state_dict()))
    image_BCHW, _ = batch(4)
    results = []
    for encode_image in (model.encode_image, twin.encode_image):
        torch.manual_seed(3)
        results.append(encode_image(image_BCHW))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(results[0], model.encode_image(image_BCHW), atol=1e-3)


@pytest.mark.parametrize("kind", ["vit", "siglip"])
def test_patch_dropout_acts_in_training_only(kind: str) -> None:
    model, plain = build(0.5, kind), build(0.0, kind)
    image_BCHW, _ = batch(4)
    assert not torch.equal(model.encode_image(image_BCHW), model.encode_image(image_BCHW))
    expected_BD = plain.encode_image(image_BCHW)
    assert torch.equal(model.eval().encode_image(image_BCHW), expected_BD)


@pytest.mark.parametrize("kind", ["vit", "siglip"])
def test_micro_batches_backpropagate_through_the_patches_that_they_kept(kind: str) -> None:
    tower = build(0.5, kind).image
    plain = copy.deepcopy(tower)
    image_BCHW, _ = batch(4)
    torch.manual_seed(3)
    encode(tower, image_BCHW, 2).square().sum().backward()
    torch.manual_seed(3)
    torch.cat([plain(chunk) for chunk in image_BCHW.split(2)]).square().sum().backward()
    for name, expected in gradients(plain).items():
        torch.testing.assert_close(gradients(tower)[name], expected, rtol=1e-5, atol=1e-5, msg=name)


def test_each_image_keeps_its_own_patches_each_as_often_as_any_other() -> None:
    torch.manual_seed(0)
    patch_BND = torch.arange(10.0).expand(4000, 10)[..., None]
    kept_BK1 = PatchDropout(0.75)(patch_BND)
    assert kept_BK1.shape == (4000, 2, 1)
    assert all(row.unique().numel() == 2 for row in kept_BK1)
    share_N = torch.bincount(kept_BK1.long().flatten(), minlength=10) / 4000
    # Five standard errors of a fraction of 0.2 in 4000 draws.
    torch.testing.assert_close(share_N, torch.full([10], 0.2), rtol=0, atol=5 * (0.2 * 0.8 / 4000) ** 0.5)
