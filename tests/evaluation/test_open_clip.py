"""The published protocol, compared with open_clip's own code on the same weights and photographs."""

from argparse import Namespace
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

from clip_exp.config.evaluation import EvaluateConfig
from clip_exp.config.names import named_model
from clip_exp.data.image_sets import ImageFiles
from clip_exp.evaluation.classification import build_classifier, class_scores
from clip_exp.evaluation.evaluated_model import EvaluatedModel
from clip_exp.evaluation.features import EncodeOptions, encode_images
from clip_exp.evaluation.launch import evaluate
from clip_exp.evaluation.sets.class_names import imagenet_classes, templates
from clip_exp.loading import load_model, source_of_file
from clip_exp.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def peer(tmp_path_factory: pytest.TempPathFactory) -> tuple[torch.nn.Module, Path]:
    """Return a random ViT-B/32 of open_clip, and the file of its weights."""
    torch.manual_seed(0)
    model = open_clip.CLIP(**open_clip.get_model_config("ViT-B-32")).eval()
    path = tmp_path_factory.mktemp("weights") / "vit_b32.safetensors"
    save_file(model.state_dict(), path)
    return model, path


def test_classifier_and_logits_equal_open_clips_on_imagenet_photographs(peer, real_data: Path) -> None:
    theirs, path = peer
    photographs = sorted((real_data / "imagenet_val_sample").glob("*/*"))[::10]
    names = [name for _, name in imagenet_classes()][656:660]  # `missile` among them, which is there twice
    prompts = templates("openai")[::20]
    config = named_model("vit_b32")
    ours = load_model(source_of_file(config, path))
    classifier = build_classifier(ours, Tokenizer(77), names, prompts)
    expected = open_clip.build_zero_shot_classifier(theirs, open_clip.get_tokenizer("ViT-B-32"), names, prompts).T
    torch.testing.assert_close(classifier, expected, rtol=0, atol=1e-5)

    evaluated = EvaluatedModel(ours, Tokenizer(77), config, EncodeOptions(torch.device("cpu"), num_workers=0))
    features = encode_images(evaluated.image_encoder(), ImageFiles(photographs), evaluated.options).features
    dataset = ImageFolder(str(real_data / "imagenet_val_sample"), transform=_their_transform(theirs))
    position = {name: number for number, (name, _) in enumerate(dataset.samples)}
    pixels = torch.stack([dataset[position[str(name)]][0] for name in photographs])
    with torch.inference_mode():
        their_features = theirs.encode_image(pixels, normalize=True)
    torch.testing.assert_close(features, their_features, rtol=0, atol=1e-5)
    # Logits are 100 times cosines.
    torch.testing.assert_close(class_scores(features, classifier) / 100, their_features @ expected.T, rtol=0, atol=1e-5)


@pytest.mark.exhaustive
def test_the_counts_of_an_evaluation_equal_those_of_open_clips_trainer(
    peer, real_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from open_clip_train import zero_shot

    theirs, _ = peer
    prompts = templates("simple")[:1]  # several are averaged in the test above
    root = real_data / "imagenet_val_sample"
    dataset = ImageFolder(str(root), transform=_their_transform(theirs))
    names = {wnid: name for wnid, name in imagenet_classes() if wnid in dataset.class_to_idx}
    classifier = open_clip.build_zero_shot_classifier(
        theirs, open_clip.get_tokenizer("ViT-B-32"), list(names.values()), prompts
    )
    _memorize(theirs, dataset, classifier)
    save_file(theirs.state_dict(), tmp_path / "vit_b32.safetensors")
    args = Namespace(device="cpu", precision="fp32", batch_size=50)
    # NumPy 2.5 no longer takes an array of one number for a number, which their `accuracy` relies on.
    monkeypatch.setattr(zero_shot, "float", lambda array: array.item(), raising=False)
    top1, top5 = zero_shot.run(theirs, classifier, DataLoader(dataset, batch_size=50), args)

    task = {"sample": {"kind": "zero_shot", "root": str(root), "classes": names, "templates": prompts}}
    result = evaluate(
        EvaluateConfig(
            model=named_model("vit_b32"),
            pretrained=str(tmp_path / "vit_b32.safetensors"),
            task=task,
            output_dir=str(tmp_path),
            accelerator="cpu",
        )
    )["sample"]
    assert result["protocol"]["images"] == len(dataset) == 150
    assert 0.2 < top1 < top5 < 1
    assert (result["metrics"]["top1"], result["metrics"]["top5"]) == (top1, top5)


def _memorize(model: open_clip.CLIP, dataset: ImageFolder, classifier_DC: torch.Tensor) -> None:
    """Fit the projection of the image tower so that every other photograph is classified correctly: with random weights none is."""
    projection = model.visual.proj
    assert projection is not None
    model.visual.proj = None
    with torch.no_grad():
        pooled = torch.cat([model.encode_image(pixels) for pixels, _ in DataLoader(dataset, batch_size=50)]).double()
        known, targets = pooled[::2], classifier_DC.T[dataset.targets[::2]].double()
        centered = known - known.mean(dim=0)
        kernel = centered @ centered.T
        ridge = 0.01 * kernel.diagonal().mean() * torch.eye(len(kernel), dtype=torch.float64)
        projection.copy_(centered.T @ torch.linalg.solve(kernel + ridge, targets - targets.mean(dim=0)))
    model.visual.proj = projection


def _their_transform(model: torch.nn.Module):
    return open_clip.image_transform(model.visual.image_size, is_train=False)
