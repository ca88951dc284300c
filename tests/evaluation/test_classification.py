import pytest
import torch
import torch.nn.functional as F

from clip_exp.config.models import named_model
from clip_exp.errors import NumericError
from clip_exp.evaluation.classification import build_classifier, class_scores, classify
from clip_exp.evaluation.metrics import accuracies
from clip_exp.evaluation.sets.prompts import class_prompts, imagenet_classes, templates
from clip_exp.models.build import build_model
from clip_exp.models.clip import CLIP
from clip_exp.text.tokenizer import Tokenizer
from clip_exp.weights.open_clip import from_open_clip

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
    ours.load_state_dict(from_open_clip(theirs.state_dict()))
    found = build_classifier(ours, Tokenizer(77), NAMES, templates("openai"))
    torch.testing.assert_close(found, expected.T, atol=1e-5, rtol=0)


def test_a_prompt_that_many_classes_share_is_encoded_once_and_never_padded_to_77():
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


def test_the_metrics_of_a_set_equal_a_direct_count_whatever_the_chunks(monkeypatch):
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
