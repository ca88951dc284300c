import copy
from pathlib import Path

import pytest
import torch
from open_clip.modified_resnet import ModifiedResNet as OpenClipResNet
from safetensors.torch import save_file
from torch import Tensor, nn

from clip_exp.models.clip import encode
from clip_exp.models.families.clip.resnet import ModifiedResNet
from clip_exp.models.layers import AttentionPool
from clip_exp.weights.names import to_ours
from tests.models.twins import randomize

SIZE, STAGES, WIDTH, HEADS, EMBED_DIM = 64, [2, 1, 1, 1], 16, 8, 40


@pytest.fixture
def twin() -> nn.Module:
    torch.manual_seed(0)
    return randomize(OpenClipResNet(STAGES, EMBED_DIM, HEADS, SIZE, WIDTH))


@pytest.fixture
def tower(twin: nn.Module) -> nn.Module:
    tower = ModifiedResNet(image_size=SIZE, stages=STAGES, width=WIDTH, heads=HEADS, embed_dim=EMBED_DIM)
    tower.load_state_dict(under_our_names(twin.state_dict()))
    return tower


@pytest.fixture
def image_BCHW() -> Tensor:
    return torch.randn(6, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


def under_our_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    ours = to_ours("open_clip", {f"visual.{name}": tensor for name, tensor in state.items()})
    return {name.removeprefix("image."): tensor for name, tensor in ours.items()}


def backward(features_BD: Tensor) -> None:
    (features_BD * torch.linspace(-1, 1, EMBED_DIM, dtype=features_BD.dtype)).square().sum().backward()


def gradients(tower: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in tower.named_parameters() if p.grad is not None}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        scale = value.abs().max().item() if value.is_floating_point() else 1
        # The bias of the keys has a gradient of rounding errors: whatever it is, it changes nothing.
        floor = 1e-4 if name.endswith("key_bias") else 1e-8
        torch.testing.assert_close(actual[name], value, rtol=tolerance, atol=max(tolerance * scale, floor), msg=name)


def test_training_has_the_features_gradients_and_statistics_of_open_clip(
    tower: nn.Module, twin: nn.Module, image_BCHW: Tensor
) -> None:
    """In double precision, because norms over 24 values magnify rounding."""
    features_BD, expected_BD = tower.double()(image_BCHW.double()), twin.double()(image_BCHW.double())
    torch.testing.assert_close(features_BD, expected_BD, rtol=1e-9, atol=1e-9)
    backward(features_BD)
    backward(expected_BD)
    assert_same(gradients(tower), under_our_names(gradients(twin)), tolerance=1e-8)
    assert_same(dict(tower.named_buffers()), under_our_names(dict(twin.named_buffers())), tolerance=1e-9)


def test_one_query_gathers_what_attention_with_keys_and_values_gathers() -> None:
    torch.manual_seed(0)
    pool, whole = AttentionPool(32, 4, 32), nn.MultiheadAttention(32, 4, batch_first=True)
    with torch.no_grad():
        for parameter in whole.parameters():
            parameter.normal_()
        query, key, value = whole.in_proj_weight.chunk(3)
        biases = whole.in_proj_bias.chunk(3)
        names = ["q.weight", "key_weight", "value_weight", "q.bias", "key_bias", "value_bias"]
        state = dict(zip(names, [query, key, value, *biases], strict=True))
        pool.load_state_dict(state | {f"out.{name}": p for name, p in whole.out_proj.named_parameters()})
    query_BD, x_BND = torch.randn(3, 32), torch.randn(3, 7, 32)
    expected_B1D, _ = whole(query_BD[:, None], x_BND, x_BND)
    torch.testing.assert_close(pool(query_BD, x_BND), expected_B1D[:, 0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("micro_batch_size", [2, 4])
def test_micro_batches_count_each_chunk_once_in_the_running_statistics(
    tower: nn.Module, image_BCHW: Tensor, micro_batch_size: int
) -> None:
    plain = copy.deepcopy(tower)
    backward(encode(tower, image_BCHW, micro_batch_size))
    backward(torch.cat([plain(chunk) for chunk in image_BCHW.split(micro_batch_size)]))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(tower.buffers(), plain.buffers(), strict=True))
    assert tower.stem.bn1.num_batches_tracked == 7 + len(image_BCHW.split(micro_batch_size))
    assert_same(gradients(tower), gradients(plain))


def test_micro_batches_leave_frozen_statistics_alone_and_give_the_gradient_of_the_whole_batch(
    tower: nn.Module, image_BCHW: Tensor
) -> None:
    tower.eval()
    whole, before = copy.deepcopy(tower), copy.deepcopy(dict(tower.named_buffers()))
    backward(encode(tower, image_BCHW, 4))
    backward(whole(image_BCHW))
    assert all(torch.equal(buffer, before[name]) for name, buffer in tower.named_buffers())
    assert_same(gradients(tower), gradients(whole), tolerance=1e-4)


def test_a_second_backward_pass_through_micro_batches_leaves_the_statistics_too(
    tower: nn.Module, image_BCHW: Tensor
) -> None:
    features_BD = encode(tower, image_BCHW, 3)
    before = copy.deepcopy(dict(tower.named_buffers()))
    features_BD.sum().backward(retain_graph=True)
    features_BD.sum().backward()
    assert all(torch.equal(buffer, before[name]) for name, buffer in tower.named_buffers())


def test_compiled_tower_in_micro_batches_has_the_features_gradients_and_statistics_of_the_plain_one(
    tower: nn.Module, image_BCHW: Tensor
) -> None:
    plain = copy.deepcopy(tower)
    names = list(tower.state_dict())
    tower.compile(backend="aot_eager")
    features_BD, expected_BD = encode(tower, image_BCHW, 3), encode(plain, image_BCHW, 3)
    torch.testing.assert_close(features_BD, expected_BD, rtol=1e-4, atol=1e-5)
    backward(features_BD)
    backward(expected_BD)
    assert_same(gradients(tower), gradients(plain), tolerance=1e-3)
    assert_same(dict(tower.named_buffers()), dict(plain.named_buffers()))
    assert list(tower.state_dict()) == names


def test_weights_stay_in_the_layout_that_files_and_flat_buffers_take(
    tower: nn.Module, image_BCHW: Tensor, tmp_path: Path
) -> None:
    backward(tower(image_BCHW))
    torch.optim.AdamW(tower.parameters(), fused=True).step()
    assert all(p.is_contiguous() and p.grad.is_contiguous() for p in tower.parameters())
    save_file(tower.state_dict(), tmp_path / "model.safetensors")


def test_features_under_autocast_are_close_to_those_in_float32(tower: nn.Module, image_BCHW: Tensor) -> None:
    tower.eval()
    expected_BD = tower(image_BCHW)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features_BD = tower(image_BCHW)
    assert features_BD.dtype == torch.bfloat16
    assert torch.nn.functional.cosine_similarity(features_BD.float(), expected_BD).min() > 0.99
