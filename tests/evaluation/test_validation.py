import pytest
import torch
import torch.nn.functional as F

from clip_exp.evaluation.classification import accuracy, class_scores
from clip_exp.evaluation.retrieval import retrieval
from clip_exp.evaluation.validation import deduplicate, validation_metrics


def unit(*shape: int, seed: int) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_repeated_rows_of_ranks_count_once_in_any_order():
    image, text, labels = unit(6, 4, seed=0), unit(12, 4, seed=1), torch.tensor([0, 1, 2, -1, 1, 0])
    caption_image, classes = torch.arange(12) // 2, unit(3, 4, seed=2)
    index, caption_index = torch.tensor([4, 5, 0, 1, 0, 2, 3]), torch.tensor([8, 9, 11, 10, *range(8), 0, 1])
    features = deduplicate(
        index,
        image[index],
        labels[index],
        caption_index,
        text[caption_index],
        caption_image[caption_index],
        caption_index,
    )
    labeled = labels >= 0
    top = accuracy(class_scores(image[labeled], classes), labels[labeled])
    expected = retrieval(image, text, caption_image) | {"top1": top["top1"]}
    assert validation_metrics(features, classes) == pytest.approx(expected)
    assert "top1" not in validation_metrics(features)
    assert "top5" in validation_metrics(features, unit(6, 4, seed=3))


def test_captions_of_a_missing_image_are_removed():
    image, text = unit(4, 4, seed=0), unit(4, 4, seed=1)
    present = torch.tensor([0, 1, 3])
    features = deduplicate(
        present, image[present], torch.full((3,), -1), torch.arange(4), text, torch.arange(4), torch.arange(4)
    )
    assert features.caption_image.tolist() == [0, 1, 2]
    assert validation_metrics(features) == retrieval(image[present], text[present], torch.arange(3))
