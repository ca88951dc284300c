import pytest
import torch
import torch.nn.functional as F

from clip_exp.config.names import named_model
from clip_exp.errors import NumericError
from clip_exp.evaluation.classification import (
    accuracies,
    accuracy,
    best_classes,
    build_classifier,
    class_scores,
    classify,
    mean_per_class_recall,
)
from clip_exp.evaluation.sets.class_names import class_prompts, imagenet_classes, templates
from clip_exp.models.clip import CLIP, build_model
from clip_exp.reports.names import of_classification
from clip_exp.text.tokenizer import Tokenizer
from clip_exp.weights.names import to_ours

NAMES = [name for _, name in imagenet_classes()[655:660]]


@pytest.mark.parametrize("batch_size", [7, 10_000])
def test_classifier_equals_the_published_protocol_padded_to_77_one_class_at_a_time(nano: CLIP, batch_size: int):
    prompts, tokenizer = templates("openai"), Tokenizer(77)
    expected = []
    with torch.no_grad():
        for name in NAMES:
            tokens = tokenizer(class_prompts(name, prompts), trim=False)
            assert tokens.shape == (80, 77)
            expected.append(F.normalize(F.normalize(nano.encode_text(tokens), dim=-1).mean(dim=0), dim=-1))
    found = build_classifier(nano, tokenizer, NAMES, prompts, batch_size)
    torch.testing.assert_close(found, torch.stack(expected), atol=1e-5, rtol=0)


def test_classifier_equals_open_clips_on_the_same_weights():
    open_clip = pytest.importorskip("open_clip")
    torch.manual_seed(0)
    image = {"image_size": 32, "patch_size": 8, "width": 64, "layers": 4, "head_width": 32}
    text = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2}
    theirs = open_clip.CLIP(64, image, text).eval()
    expected = open_clip.build_zero_shot_classifier(
        theirs, open_clip.SimpleTokenizer(), NAMES, open_clip.OPENAI_IMAGENET_TEMPLATES
    )
    ours = build_model(named_model("vit_nano")).eval()
    ours.load_state_dict(to_ours("open_clip", theirs.state_dict()))
    found = build_classifier(ours, Tokenizer(77), NAMES, templates("openai"))
    torch.testing.assert_close(found, expected.T, atol=1e-5, rtol=0)


def test_a_prompt_of_many_classes_is_encoded_once_and_never_padded_to_77():
    class Counting:
        def __init__(self) -> None:
            self.rows = self.longest = 0

        def encode_text(self, tokens_BL: torch.Tensor, normalize: bool = False) -> torch.Tensor:
            self.rows += len(tokens_BL)
            self.longest = max(self.longest, tokens_BL.shape[1])
            return F.normalize(tokens_BL.sum(dim=1, keepdim=True).float() * torch.tensor([1.0, 2.0]), dim=-1)

    model = Counting()
    build_classifier(model, Tokenizer(77), ["missile", "dog", "missile"], ["a {}.", "the {}.", "a {}."])
    assert model.rows == 4
    assert model.longest == 5


def test_the_metrics_of_a_set_equal_a_direct_count_for_any_chunks(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    features = F.normalize(torch.randn(101, 16, generator=generator), dim=-1)
    classifier = F.normalize(torch.randn(12, 16, generator=generator), dim=-1)
    labels = torch.randint(0, 12, (101,), generator=generator)
    order = (features @ classifier.T).argsort(dim=1, descending=True)
    monkeypatch.setattr("clip_exp.evaluation.classification.CHUNK", 10)
    best, probabilities = classify(features, classifier)
    torch.testing.assert_close(probabilities, class_scores(features, classifier).softmax(dim=1).gather(1, order[:, :5]))
    found = accuracies(best, labels, 12)
    assert found["top1"] == pytest.approx((order[:, 0] == labels).sum().item() / 101)
    assert found["top5"] == pytest.approx((order[:, :5] == labels[:, None]).any(dim=1).sum().item() / 101)
    recalls = [(order[labels == c, 0] == c).float().mean().item() for c in labels.unique()]
    assert found["mean_per_class_recall"] == pytest.approx(sum(recalls) / len(recalls))
    torch.testing.assert_close(class_scores(features, classifier), 100 * features @ classifier.T)


def test_a_classifier_that_is_not_finite_is_refused():
    with pytest.raises(NumericError, match="class embeddings"):
        classify(torch.ones(2, 1), torch.tensor([[torch.nan], [1.0]]))


def unit(*shape: int) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(0)), dim=-1)


def test_accuracy_equals_open_clips_formula_on_the_same_logits():
    logits, labels = unit(301, 17), torch.arange(301) % 17
    # open_clip_train.zero_shot.accuracy, which itself fails under numpy 2.4.
    correct = logits.topk(5, 1, True, True)[1].t().eq(labels.view(1, -1))
    top1, top5 = (correct[:k].reshape(-1).float().sum().item() for k in (1, 5))
    assert accuracy(logits, labels) == pytest.approx({"top1": top1 / 301, "top5": top5 / 301})


@pytest.mark.parametrize(("classes", "measured"), [(2, False), (5, False), (6, True)])
def test_top5_is_not_measured_where_it_is_certain(classes: int, measured: bool):
    scores, labels = unit(12, classes), torch.arange(12) % classes
    assert ("top5" in accuracy(scores, labels)) is measured
    found = accuracies(best_classes(scores), labels, classes)
    assert list(found) == of_classification(classes)
    assert ("top5" in found) is measured


def test_mean_per_class_recall_weighs_classes_alike_and_leaves_out_empty_ones():
    labels = torch.tensor([0, 0, 0, 2])
    assert mean_per_class_recall(torch.tensor([0, 1, 1, 2]), labels, num_classes=4) == pytest.approx((1 / 3 + 1) / 2)
