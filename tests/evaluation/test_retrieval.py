import math

import pytest
import torch
import torch.nn.functional as F

from clip_exp.errors import NumericError
from clip_exp.evaluation import retrieval as retrieval_module
from clip_exp.evaluation.classification import accuracies, best_classes
from clip_exp.evaluation.retrieval import retrieval
from clip_exp.reports.names import CLASSIFICATION, RETRIEVAL, SCALES


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_recall_and_median_rank_equal_open_clip_on_one_caption_per_image():
    open_clip_train = pytest.importorskip("open_clip_train.train")
    image, text = unit(97, 8), F.normalize(unit(97, 8) + 2.0 * unit(97, 8, seed=1), dim=-1)
    expected = open_clip_train.get_clip_metrics(image, text, 100.0)
    found = retrieval(image, text, torch.arange(97))
    for way, theirs in (("i2t", "image_to_text"), ("t2i", "text_to_image")):
        assert found[f"median_rank_{way}"] == expected[f"{theirs}_median_rank"]
        for k in (1, 5, 10):
            assert found[f"recall@{k}_{way}"] == pytest.approx(expected[f"{theirs}_R@{k}"])
            assert 0 < found[f"recall@{k}_{way}"] < 1


def test_any_of_several_captions_is_a_hit_and_tiles_do_not_matter(monkeypatch):
    image, text = unit(23, 6), unit(61, 6, seed=1)
    caption_image = torch.randint(0, 23, (61,), generator=torch.Generator().manual_seed(2))
    order_i2t = (image @ text.T).argsort(dim=1, descending=True)
    order_t2i = (text @ image.T).argsort(dim=1, descending=True)
    captioned = caption_image.unique().tolist()
    assert len(captioned) < 23  # one image has no caption: it counts in neither numerator nor denominator
    whole = retrieval(image, text, caption_image)
    for k in (1, 5, 10):
        hits = [(caption_image[order_i2t[i, :k]] == i).any().item() for i in captioned]
        assert whole[f"recall@{k}_i2t"] == pytest.approx(sum(hits) / len(captioned))
        hits = [(order_t2i[j, :k] == caption_image[j]).any().item() for j in range(61)]
        assert whole[f"recall@{k}_t2i"] == pytest.approx(sum(hits) / 61)
    monkeypatch.setattr(retrieval_module, "TILE", 7)
    assert retrieval(image, text, caption_image) == pytest.approx(whole)


def test_a_model_that_scores_all_pairs_equally_is_at_chance_level():
    image, text = torch.ones(20, 1), torch.ones(40, 1)
    found = retrieval(image, text, torch.arange(40) % 20)
    assert found["recall@1_t2i"] == pytest.approx(1 / 20)
    assert found["recall@10_t2i"] == pytest.approx(10 / 20)
    assert found["recall@1_i2t"] == pytest.approx(2 / 40)
    assert found["recall@5_i2t"] == pytest.approx(1 - math.comb(38, 5) / math.comb(40, 5))


def test_features_that_are_not_finite_are_refused_instead_of_ranked_first():
    image = unit(4, 3)
    image[2, 1] = torch.nan
    with pytest.raises(NumericError, match="image features"):
        retrieval(image, unit(4, 3), torch.arange(4))


def test_every_metric_has_a_scale_of_its_own_name():
    image, text = unit(4, 3), unit(4, 3)
    measured = {*retrieval(image, text, torch.arange(4)), *accuracies(best_classes(unit(6, 6)), torch.arange(6), 6)}
    assert measured == {*RETRIEVAL, *CLASSIFICATION}
    assert {"loss", *measured} <= {*SCALES}
