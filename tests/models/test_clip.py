import copy

import open_clip
import pytest
import torch
from torch import Tensor

from clip_exp.config.model import Activation
from clip_exp.losses.softmax.loss import softmax_loss
from clip_exp.models.clip import CLIP, build_model
from tests.models.small import CONTEXT_LENGTH, batch, open_clip_twin, small_config, trim


def gradients(model: CLIP, image_BCHW: Tensor, tokens_BL: Tensor, micro_batch_size: int | None) -> dict[str, Tensor]:
    model.zero_grad()
    output = model(image_BCHW, tokens_BL, micro_batch_size)
    softmax_loss(output.image_features, output.text_features, output.logit_scale).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        atol = tolerance * gradient.abs().max().item()
        torch.testing.assert_close(actual[name], gradient, rtol=tolerance, atol=max(atol, 1e-8), msg=name)


@pytest.fixture
def model() -> CLIP:
    torch.manual_seed(0)
    return build_model(small_config())


@pytest.mark.parametrize("activation", [Activation.gelu, Activation.quick_gelu])
def test_features_equal_open_clip(activation: Activation) -> None:
    torch.manual_seed(0)
    model = build_model(small_config(activation))
    twin = open_clip_twin(model, quick_gelu=activation == Activation.quick_gelu)
    image_BCHW, tokens_BL = batch(6)
    output = model(image_BCHW, trim(tokens_BL))
    image_BD, text_BD, logit_scale = twin(image_BCHW, tokens_BL)
    torch.testing.assert_close(output.image_features, image_BD, rtol=0, atol=1e-5)
    torch.testing.assert_close(output.text_features, text_BD, rtol=0, atol=1e-5)
    torch.testing.assert_close(output.logit_scale.squeeze(), logit_scale)
    torch.testing.assert_close(model.encode_image(image_BCHW), twin.encode_image(image_BCHW), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.encode_text(tokens_BL), twin.encode_text(tokens_BL), rtol=1e-5, atol=1e-5)


def test_trimmed_text_gives_the_features_and_gradients_of_padded_text(model: CLIP) -> None:
    image_BCHW, tokens_BL = batch(6)
    trimmed_BL = trim(tokens_BL)
    assert trimmed_BL.shape[1] < CONTEXT_LENGTH
    torch.testing.assert_close(model.encode_text(trimmed_BL), model.encode_text(tokens_BL), rtol=1e-5, atol=1e-6)
    assert_same_gradients(gradients(model, image_BCHW, trimmed_BL, None), gradients(model, image_BCHW, tokens_BL, None))


def test_what_stands_behind_the_end_token_does_not_matter(model: CLIP) -> None:
    _, tokens_BL = batch(4)
    filled_BL = torch.where(tokens_BL == 0, 7, tokens_BL)
    torch.testing.assert_close(model.encode_text(filled_BL), model.encode_text(tokens_BL), rtol=0, atol=1e-6)


@pytest.mark.parametrize("micro_batch_size", [1, 3, 4])
def test_micro_batches_give_the_gradients_of_the_whole_batch(model: CLIP, micro_batch_size: int) -> None:
    image_BCHW, tokens_BL = batch(8)
    whole = gradients(model, image_BCHW, tokens_BL, None)
    assert "logit_scale" in whole
    assert_same_gradients(gradients(model, image_BCHW, tokens_BL, micro_batch_size), whole)


def test_micro_batches_bound_what_a_tower_sees_at_once_only_when_training(model: CLIP) -> None:
    sizes: list[int] = []
    model.image.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    image_BCHW, tokens_BL = batch(8)
    model(image_BCHW, tokens_BL, 3)
    assert sizes == [3, 3, 2]
    sizes.clear()
    with torch.no_grad():
        model(image_BCHW, tokens_BL, 3)
    assert sizes == [8]


def test_dropout_in_micro_batches_backpropagates_through_what_was_dropped() -> None:
    torch.manual_seed(0)
    model = build_model(small_config(dropout=0.5))
    image_BCHW, _ = batch(2)
    model.zero_grad()
    torch.manual_seed(1)
    features_BD = model(image_BCHW, batch(2)[1], micro_batch_size=1).image_features
    features_BD.sum().backward()
    checkpointed = {name: p.grad.clone() for name, p in model.image.named_parameters()}
    model.zero_grad()
    torch.manual_seed(1)
    torch.nn.functional.normalize(torch.cat([model.image(x) for x in image_BCHW.split(1)]), dim=-1).sum().backward()
    assert_same_gradients(checkpointed, {name: p.grad for name, p in model.image.named_parameters()})


def test_dropout_acts_in_training_only() -> None:
    torch.manual_seed(0)
    model = build_model(small_config(dropout=0.5))
    image_BCHW, _ = batch(2)
    assert not torch.equal(model.encode_image(image_BCHW), model.encode_image(image_BCHW))
    model.eval()
    plain = build_model(small_config()).eval()
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(model.encode_image(image_BCHW), plain.encode_image(image_BCHW))


def test_features_are_float32_of_unit_norm_under_autocast(model: CLIP) -> None:
    image_BCHW, tokens_BL = batch(4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model.encode_image(image_BCHW).dtype == torch.bfloat16
        output = model(image_BCHW, tokens_BL)
    for features_BD in output[:2]:
        assert features_BD.dtype == torch.float32
        torch.testing.assert_close(features_BD.norm(dim=-1), torch.ones(4), rtol=0, atol=1e-6)


def test_compiled_towers_keep_the_names_of_the_weights(model: CLIP) -> None:
    names = list(model.state_dict())
    model.image.compile(backend="eager")
    model.text.compile(backend="eager")
    image_BCHW, tokens_BL = batch(4)
    expected = copy.deepcopy(model)(image_BCHW, tokens_BL)
    torch.testing.assert_close(model(image_BCHW, tokens_BL).text_features, expected.text_features, rtol=1e-5, atol=1e-6)
    assert list(model.state_dict()) == names


def test_ten_adamw_steps_have_the_losses_of_open_clip(model: CLIP) -> None:
    """With the shape of ViT-B/32 made small: its towers, its loss, its optimizer."""
    twin = open_clip_twin(model)
    ours, theirs = (
        torch.optim.AdamW(m.parameters(), lr=1e-3, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.2) for m in (model, twin)
    )
    their_loss = open_clip.loss.ClipLoss()
    for step in range(10):
        image_BCHW, tokens_BL = batch(8, seed=step % 3)
        loss = softmax_loss(*model(image_BCHW, trim(tokens_BL))[:3])
        expected = their_loss(*twin(image_BCHW, tokens_BL))
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
        for optimizer, value in [(ours, loss), (theirs, expected)]:
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
