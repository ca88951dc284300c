"""Encoding on a GPU: batches are launched one after the other, without waiting for what they compute."""

import pytest
import torch

from clip_exp.config.model_schema import ModelConfig
from clip_exp.data.images import preprocessing_of
from clip_exp.evaluation.encode import encode_pixels, encode_texts
from clip_exp.text.build import build_tokenizer
from tests.compose import train_config
from tests.fake_cuda import fake_model, fake_tensors
from tests.synchronization import SynchronizationWatch

TEXTS = [f"{a} {b} {c}" for a in ("one", "two", "three", "four") for b in ("red", "blue", "green") for c in range(25)]


@pytest.fixture(scope="module")
def config() -> ModelConfig:
    return train_config("model=vit_nano").model


def test_a_batch_of_images_does_not_wait_for_the_gpu(config: ModelConfig) -> None:
    preprocessing = preprocessing_of(config.image)
    with fake_tensors():
        model = fake_model(config, "cuda")
        pixels = torch.zeros(4, 3, config.image.image_size, config.image.image_size, dtype=torch.uint8)
        for watch in (SynchronizationWatch(), SynchronizationWatch()):  # the first batch of a process may wait
            with watch:
                features = encode_pixels(model, pixels, preprocessing, torch.device("cuda"))
    assert watch.found == []
    assert features.device.type == "cuda"


@pytest.mark.parametrize(("trees", "texts"), [(True, TEXTS), (False, TEXTS[:5])])
def test_texts_wait_for_the_gpu_equally_often_in_one_batch_and_in_many(
    config: ModelConfig, trees: bool, texts: list[str]
) -> None:
    found = {}
    with fake_tensors():
        model = fake_model(config, "cuda")
        model.text.shares_prefixes = trees
        for batch_size in (1, len(TEXTS) * 100):
            with SynchronizationWatch() as watch:
                encode_texts(model, build_tokenizer(config.text), texts, batch_size, "cuda")
            found[batch_size] = len(watch.found)
    assert len(set(found.values())) == 1, found
