"""Published numbers of OpenAI's ViT-B/32, if its weights and images are available.

    CLIP_EXP_OPENAI_VIT_B32=open_clip_model.safetensors CLIP_EXP_CLIP_PNG=CLIP.png \
    CLIP_EXP_IMAGENET_V2=imagenetv2-matched-frequency-format-val python -m pytest tests/evaluation/test_golden.py
"""

import os
from pathlib import Path

import pytest

import clip_exp
from clip_exp.config.evaluation import EvaluateConfig
from clip_exp.config.model import Activation
from clip_exp.config.names import named_model
from clip_exp.evaluation.launch import evaluate

HUB = Path(os.environ.get("HF_HUB_CACHE", Path.home() / ".cache" / "huggingface" / "hub"))
IN_HUB = "models--timm--vit_base_patch32_clip_224.openai/snapshots/*/open_clip_model.safetensors"


def found(variable: str, what: str) -> Path:
    path = os.environ.get(variable)
    if not path:
        pytest.skip(f"{variable} does not name {what}")
    return Path(path)


@pytest.fixture(scope="module")
def weights() -> Path:
    cached = sorted(HUB.glob(IN_HUB))
    return (
        cached[-1] if cached else found("CLIP_EXP_OPENAI_VIT_B32", "OpenAI's ViT-B/32 weights as open_clip stores them")
    )


def test_the_probabilities_of_openais_example(weights: Path) -> None:
    """README of github.com/openai/CLIP: `CLIP.png` against three texts."""
    image = found("CLIP_EXP_CLIP_PNG", "the image CLIP.png of github.com/openai/CLIP")
    clip = clip_exp.load("vit_b32", pretrained=weights, activation="quick_gelu", accelerator="cpu")
    probabilities = clip.classify(image, ["a diagram", "a dog", "a cat"])
    assert probabilities[0].tolist() == pytest.approx([0.9927937, 0.00421068, 0.00299572], abs=2e-4)


@pytest.mark.timeout(7200)
def test_imagenet_v2_as_in_openais_notebook(weights: Path, tmp_path: Path) -> None:
    """Prompt_Engineering_for_ImageNet.ipynb prints top-1 55.93 and top-5 83.36, from float16 on a GPU."""
    root = found("CLIP_EXP_IMAGENET_V2", "a folder imagenetv2-matched-frequency-format-val")
    model = named_model("vit_b32")
    model.activation = Activation.quick_gelu
    task = {"imagenet_v2": {"kind": "zero_shot", "root": str(root), "classes": "imagenet", "templates": "openai"}}
    config = EvaluateConfig(model=model, pretrained=str(weights), task=task, output_dir=str(tmp_path))
    result = evaluate(config)["imagenet_v2"]
    assert result["protocol"]["images"] == 10_000
    assert 100 * result["metrics"]["top1"] == pytest.approx(55.93, abs=0.15)
    assert 100 * result["metrics"]["top5"] == pytest.approx(83.36, abs=0.15)
