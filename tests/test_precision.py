"""Tests of torch's precision settings: exact float32 where it is required, and restored afterwards."""

from collections.abc import Iterator

import pytest
import torch

from clip_exp.config.model import ModelConfig
from clip_exp.data.images import preprocessing_of
from clip_exp.devices import benchmarks_convolutions, exact_float32, inference_precision, training_precision
from clip_exp.evaluation import evaluated_model as scoring
from clip_exp.evaluation.evaluated_model import EvaluatedModel
from clip_exp.evaluation.features import EncodeOptions, encode_pixels, encode_texts
from clip_exp.evaluation.task import Task
from clip_exp.evaluation.tasks.auto import AutoTaskConfig
from clip_exp.inference.pipeline import Pipeline
from clip_exp.models.clip import build_model
from clip_exp.reports.evaluation import Result
from clip_exp.text.tokenizer import build_tokenizer
from tests.compose import train_config

Switches = tuple[str, bool]
TRAINING, EXACT = ("high", True), ("highest", False)


def switches() -> Switches:
    return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32


@pytest.fixture(autouse=True)
def while_training() -> Iterator[None]:
    """Allow TF32, as it is after training in the same process."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    assert switches() == TRAINING
    yield
    assert switches() == TRAINING
    torch.set_float32_matmul_precision(before)


@pytest.fixture
def config() -> ModelConfig:
    return train_config("model=vit_nano").model


def noted(model: torch.nn.Module) -> list[Switches]:
    """Record the precision settings at every call of a linear layer."""
    found: list[Switches] = []
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda *_: found.append(switches()))
    return found


def test_the_switches_are_restored_after_an_error() -> None:
    @exact_float32()
    def fail() -> None:
        assert switches() == EXACT
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_towers_of_an_evaluation_compute_exact_float32_products(config: ModelConfig, precision: str) -> None:
    model = build_model(config).eval()
    found = noted(model)
    pixels = torch.zeros(1, 3, config.image.image_size, config.image.image_size, dtype=torch.uint8)
    encode_pixels(model, pixels, preprocessing_of(config.image), torch.device("cpu"), precision)
    encode_texts(model, build_tokenizer(config.text), ["a dog"])
    assert set(found) == {EXACT}


def test_a_task_is_scored_with_exact_float32_products(config: ModelConfig) -> None:
    found = []

    class Noting(Task):
        def score(self, model: EvaluatedModel):
            found.append(switches())

            def compute_result() -> Result:
                found.append(switches())
                return Result({}, {}, None)

            return compute_result

    options = EncodeOptions(torch.device("cpu"))
    scoring.score(
        Noting("auto", AutoTaskConfig()),
        EvaluatedModel(build_model(config), build_tokenizer(config.text), config, options),
    )
    assert found == [EXACT, EXACT]


def test_a_pipeline_predicts_with_exact_float32_products(config: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = Pipeline(build_model(config).eval(), config, torch.device("cpu"))
    found = noted(pipeline.model)
    softmax = torch.Tensor.softmax
    monkeypatch.setattr(torch.Tensor, "softmax", lambda self, dim: (found.append(switches()), softmax(self, dim))[1])
    features = pipeline.encode_text(["a dog", "a cat"])
    assert set(found) == {EXACT}
    found.clear()
    pipeline.probabilities(features, features)
    assert found == [EXACT]


@pytest.mark.parametrize(
    ("overrides", "convolutional"),
    [
        (["model=rn50"], True),
        (["model=vit_nano"], False),
        (["model=siglip_b16"], False),
        (["model=vit_nano", "model/image=timm", "model.image.name=test_convnext", "model.image.image_size=64"], True),
        (["model=vit_nano", "model/image=timm", "model.image.name=test_vit", "model.image.image_size=160"], False),
        (["model=open_clip", "model.name=RN50"], True),
        (["model=open_clip", "model.name=ViT-B-32"], False),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_cudnn_times_the_algorithms_of_convolutional_towers_alone(overrides: list[str], convolutional: bool) -> None:
    with torch.device("meta"):
        tower = build_model(train_config(*overrides).model).image
    assert benchmarks_convolutions(tower, "cuda", deterministic=False) is convolutional
    assert not benchmarks_convolutions(tower, "cuda", deterministic=True)
    assert not benchmarks_convolutions(tower, "cpu", deterministic=False)


def test_a_gpu_that_only_emulates_bf16_computes_in_another_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """T4 and V100 support bf16 only by slow emulation."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert training_precision("auto", "cuda") == "16-mixed"
    assert inference_precision("auto", "cuda") == "32-true"
