import math

import pytest
import torch
from open_clip.loss import ClipLoss, SigLipLoss
from torch import Tensor
from torch.nn import functional as F

from clip_exp.config.data import PairLabel
from clip_exp.config.training import LossConfig
from clip_exp.losses.batch import ALL, CLIPOutput, Matches
from clip_exp.losses.sigmoid import SigmoidLossConfig
from clip_exp.losses.sigmoid.loss import sigmoid_loss
from clip_exp.losses.softmax import SoftmaxLossConfig
from clip_exp.losses.softmax.loss import softmax_loss
from tests.losses.largest import LargestTensor

B, D = 12, 16
Leaves = tuple[Tensor, Tensor, Tensor, Tensor]


def leaves(scale: float = 14.0, seed: int = 0) -> Leaves:
    """Features, logit scale and bias that collect gradients."""
    draw = torch.Generator().manual_seed(seed)
    image_BD, text_BD = (F.normalize(torch.randn(B, D, generator=draw), dim=-1).requires_grad_() for _ in range(2))
    return image_BD, text_BD, torch.tensor([scale], requires_grad=True), torch.tensor([-3.0], requires_grad=True)


def ids(*values: int) -> Tensor:
    """Ids of which the first are given and the rest occur once."""
    return torch.tensor([*values, *range(1000, 1000 + B - len(values))])


class GivenMatches(Matches):
    """A matrix that is known."""

    def __init__(self, matches_BB: Tensor) -> None:
        self.matches_BB = matches_BB

    def block(self, rows: slice = ALL, columns: slice = ALL) -> Tensor:
        return self.matches_BB[rows, columns]


def assert_same_gradients(actual: Leaves, expected: Leaves) -> None:
    for a, e in zip(actual, expected, strict=True):
        if e.grad is None:
            assert a.grad is None
        else:
            torch.testing.assert_close(a.grad, e.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("scale", [1.0, 14.0, 100.0])
def test_softmax_has_open_clips_value_and_gradients(scale: float) -> None:
    ours, theirs = leaves(scale), leaves(scale)
    loss, expected = softmax_loss(*ours[:3]), ClipLoss()(*theirs[:3])
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    assert_same_gradients(ours, theirs)


@pytest.mark.parametrize("scale", [1.0, 10.0, 100.0])
def test_sigmoid_has_open_clips_value_and_gradients(scale: float) -> None:
    ours, theirs = leaves(scale), leaves(scale)
    loss, expected = sigmoid_loss(*ours), SigLipLoss()(*theirs)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    assert_same_gradients(ours, theirs)


def test_softmax_target_is_uniform_over_a_rows_matches() -> None:
    image_BD, text_BD, scale, _ = leaves()
    matches_BB = torch.eye(B, dtype=torch.bool)
    matches_BB[0, 5] = matches_BB[5, 0] = True
    logits_BB = (scale * image_BD @ text_BD.T).detach()
    terms = []
    for log_probabilities in (logits_BB.log_softmax(dim=1), logits_BB.T.log_softmax(dim=1)):
        rows = [
            (log_probabilities[i, 0] + log_probabilities[i, 5]) / 2 if i in (0, 5) else log_probabilities[i, i]
            for i in range(B)
        ]
        terms.append(-sum(rows) / B)
    torch.testing.assert_close(softmax_loss(image_BD, text_BD, scale, matches_BB), (terms[0] + terms[1]) / 2)


def test_sigmoid_label_of_a_match_is_positive() -> None:
    image_BD, text_BD, scale, bias = leaves()
    repeated = sigmoid_loss(image_BD, text_BD, scale, bias, Matches([ids(7, 1, 2, 3, 4, 7)]))
    changed = repeated - sigmoid_loss(image_BD, text_BD, scale, bias)
    logits = torch.stack([scale * image_BD[i] @ text_BD[j] + bias for i, j in [(0, 5), (5, 0)]])
    torch.testing.assert_close(changed, (F.softplus(-logits) - F.softplus(logits)).sum() / B, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("chunk_size", [1, 5, 12, 100])
def test_sigmoid_is_the_same_in_chunks_of_any_size(chunk_size: int) -> None:
    whole, chunked = leaves(), leaves()
    matches = Matches([ids(7, 1, 2, 3, 4, 7)])
    expected, loss = sigmoid_loss(*whole, matches), sigmoid_loss(*chunked, matches, chunk_size)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    (2 * expected).backward()  # as a gradient scaler would
    (2 * loss).backward()
    for a, e in zip(chunked, whole, strict=True):
        torch.testing.assert_close(a.grad, e.grad, rtol=1e-5, atol=1e-6)


def test_sigmoid_without_gradient_has_the_same_value() -> None:
    expected = sigmoid_loss(*leaves())
    with torch.no_grad():
        assert torch.equal(sigmoid_loss(*leaves()), expected)


def test_sigmoid_holds_no_more_similarities_than_a_chunk() -> None:
    """The largest tensor that is made, seen by the dispatcher, forward and backward."""
    rows, chunk = 256, 16
    draw = torch.Generator().manual_seed(0)
    image_BD, text_BD = (F.normalize(torch.randn(rows, 4, generator=draw), dim=-1).requires_grad_() for _ in range(2))
    scale, bias = torch.tensor([10.0], requires_grad=True), torch.tensor([-10.0], requires_grad=True)
    with LargestTensor() as largest:
        sigmoid_loss(image_BD, text_BD, scale, bias, Matches([torch.arange(rows)]), chunk).backward()
    assert largest.elements == chunk * rows


@pytest.mark.parametrize("kind", [SoftmaxLossConfig, SigmoidLossConfig])
@pytest.mark.parametrize(
    ("same_caption", "same_image", "pairs"),
    [
        (PairLabel.negative, PairLabel.negative, []),
        (PairLabel.positive, PairLabel.negative, [(0, 1)]),
        (PairLabel.negative, PairLabel.positive, [(1, 2)]),
        (PairLabel.positive, PairLabel.positive, [(0, 1), (1, 2)]),
    ],
)
def test_repeated_captions_and_images_match_as_configured(
    kind: type[LossConfig], same_caption: PairLabel, same_image: PairLabel, pairs: list[tuple[int, int]]
) -> None:
    """Pairs 0 and 1 share a caption, 1 and 2 an image."""
    image_BD, text_BD, scale, bias = leaves()
    loss = kind(same_caption=same_caption, same_image=same_image).build()
    actual = loss(CLIPOutput(image_BD, text_BD, scale, bias), ids(7, 7), ids(5, 9, 9))
    matches_BB = torch.eye(B, dtype=torch.bool)
    for i, j in pairs:
        matches_BB[i, j] = matches_BB[j, i] = True
    expected = (
        softmax_loss(image_BD, text_BD, scale, matches_BB)
        if kind is SoftmaxLossConfig
        else sigmoid_loss(image_BD, text_BD, scale, bias, GivenMatches(matches_BB))
    )
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("kind", [SoftmaxLossConfig, SigmoidLossConfig])
def test_loss_is_computed_in_float32_under_autocast(kind: type[LossConfig]) -> None:
    loss = kind().build()
    output = CLIPOutput(*leaves(scale=100.0))
    expected = loss(output, ids(), ids())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = loss(output, ids(), ids())
    assert actual.dtype == torch.float32
    assert torch.equal(actual, expected)


def test_softmax_of_indistinguishable_features_is_the_logarithm_of_the_batch_size() -> None:
    same_BD = F.normalize(torch.ones(B, D), dim=-1)
    assert softmax_loss(same_BD, same_BD, torch.tensor([14.0])).item() == pytest.approx(math.log(B))
