"""Colors, gray and blur compared with torchvision's transforms."""

import math

import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from clip_exp.config.data import AugmentationConfig
from clip_exp.data.images import blur_kernel, change_colors, jitter, pil_to_tensor, train_transform
from clip_exp.data.randomness import Draws
from tests.data.conftest import noise

STRENGTHS = [0.4, 0.3, 0.2, 0.1]
PINNED = [131.21, 128.08, 124.13, 136.55]
IMAGE = pil_to_tensor(noise(0, 60, 60)).contiguous()


class Recorded(Draws):
    """Draws that are recorded."""

    def __init__(self, *key: int) -> None:
        super().__init__(*key)
        self.uniforms: list[float] = []
        self.integers: list[int] = []

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        self.uniforms.append(super().uniform(low, high))
        return self.uniforms[-1]

    def integer(self, n: int) -> int:
        self.integers.append(super().integer(n))
        return self.integers[-1]


def order_of(integers: list[int]) -> list[int]:
    order = [0, 1, 2, 3]
    for last, other in zip((3, 2, 1), integers, strict=True):
        order[last], order[other] = order[other], order[last]
    return order


@pytest.mark.parametrize("key", range(12))
def test_jitter_gives_the_pixels_of_torchvisions_for_the_same_order_and_factors(key):
    draws = Recorded(key)
    ours = jitter(IMAGE, STRENGTHS, draws)
    names = ("brightness_factor", "contrast_factor", "saturation_factor", "hue_factor")
    params = {"fn_idx": torch.tensor(order_of(draws.integers)), **dict(zip(names, draws.uniforms, strict=True))}
    assert torch.equal(ours, v2.ColorJitter(*STRENGTHS).transform(IMAGE, params))


def test_jitter_is_distributed_as_torchvisions():
    torch.manual_seed(0)
    theirs = [v2.ColorJitter(*STRENGTHS).make_params([]) for _ in range(2000)]
    ours = []
    for key in range(2000):
        draws = Recorded(key)
        jitter(IMAGE[:, :2, :2], STRENGTHS, draws)
        ours.append([*draws.uniforms, *order_of(draws.integers)])
    reference = [[p["brightness_factor"], p["contrast_factor"], p["saturation_factor"], p["hue_factor"], *p["fn_idx"].tolist()] for p in theirs]  # fmt: skip
    for mine, other in zip(np.array(ours).T, np.array(reference).T, strict=True):
        assert abs(mine.mean() - other.mean()) < 4 * math.hypot(mine.std(), other.std()) / math.sqrt(2000)
        assert mine.std() == pytest.approx(other.std(), rel=0.1)


def test_a_strength_of_zero_changes_nothing():
    assert torch.equal(jitter(IMAGE, [0, 0, 0, 0], Draws(0)), IMAGE)


def test_gray_is_torchvisions():
    gray = change_colors(IMAGE, Draws(0), AugmentationConfig(gray_scale_prob=1.0))
    assert torch.equal(gray, v2.functional.rgb_to_grayscale(IMAGE, 3))


def test_blur_is_torchvisions():
    draws = Recorded(0)
    blurred = change_colors(IMAGE, draws, AugmentationConfig(gaussian_blur_prob=1.0, gaussian_blur_sigma=[1.0, 2.0]))
    sigma = draws.uniforms[1]
    assert 1 <= sigma < 2
    assert torch.equal(blurred, v2.functional.gaussian_blur(IMAGE, [7, 7], [sigma, sigma]))


@pytest.mark.parametrize(("size", "kernel"), [(16, 3), (32, 3), (64, 7), (224, 23), (336, 33)])
def test_the_kernel_is_a_tenth_of_the_image(size, kernel):
    assert blur_kernel(size) == kernel


def test_probabilities_hold():
    image = IMAGE[:, :8, :8].contiguous()
    for key in ("gray_scale_prob", "gaussian_blur_prob"):
        config = AugmentationConfig(**{key: 0.25})
        changed = sum(not torch.equal(change_colors(image, Draws(k), config), image) for k in range(400))
        assert 70 < changed < 130, key
    config = AugmentationConfig(color_jitter=STRENGTHS, color_jitter_prob=0.25)
    assert 70 < sum(not torch.equal(change_colors(image, Draws(k), config), image) for k in range(400)) < 130


def test_crops_and_flips_do_not_change_with_what_comes_after_them():
    plain = AugmentationConfig(scale=[0.2, 1.0], horizontal_flip=0.5)
    gray = AugmentationConfig(scale=[0.2, 1.0], horizontal_flip=0.5, gray_scale_prob=1.0)
    both = AugmentationConfig(scale=[0.2, 1.0], horizontal_flip=0.5, color_jitter=[0, 0, 0, 0], gaussian_blur_prob=1e-9)
    for k in range(20):
        image = train_transform(IMAGE, 32, Draws(k), plain)
        assert torch.equal(
            train_transform(IMAGE, 32, Draws(k), gray), v2.functional.rgb_to_grayscale(image, num_output_channels=3)
        )
        assert torch.equal(train_transform(IMAGE, 32, Draws(k), both), image)


def test_crops_and_flips_are_those_of_earlier_versions():
    """A run that is resumed must see the pixels that it would have seen."""
    augmentation = AugmentationConfig(scale=[0.2, 1.0], horizontal_flip=0.5)
    left_halves = [train_transform(IMAGE, 16, Draws(6, 0, 0, k), augmentation)[..., :8].float() for k in range(4)]
    assert [half.mean().item() for half in left_halves] == pytest.approx(PINNED, abs=0.1)
