import math

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from torchvision import transforms
from torchvision.transforms.v2 import InterpolationMode, RandomResizedCrop

from clip_exp.config.data import AugmentationConfig
from clip_exp.data.files import BadImage, ImageLimits
from clip_exp.data.images import crop_box, eval_transform, normalize, open_image, pil_to_tensor, train_transform
from clip_exp.data.randomness import Draws
from tests.data.conftest import load, noise

MEAN, STD = open_clip.constants.OPENAI_DATASET_MEAN, open_clip.constants.OPENAI_DATASET_STD
IMAGES = {
    "wide": noise(0, 301, 123),
    "tall": noise(1, 97, 411),
    "square": noise(2, 224, 224),
    "small": noise(3, 9, 14),
    "gray": noise(4, 150, 90).convert("L"),
    "palette": noise(5, 150, 90).quantize(32),
    "bilevel": noise(6, 150, 90).convert("1"),
    "alpha": noise(7, 150, 90).convert("RGBA"),
    "cmyk": noise(8, 150, 90).convert("CMYK"),
}


@pytest.mark.parametrize("name", IMAGES)
@pytest.mark.parametrize("size", [32, 224, 225])
def test_evaluation_is_bit_equal_to_open_clip(name, size):
    original = IMAGES[name]
    image = eval_transform(original, size)
    assert image.dtype == torch.uint8
    expected = open_clip.image_transform(size, is_train=False)(original)
    assert torch.equal(normalize(image[None], MEAN, STD)[0], expected)


def test_evaluation_of_real_photographs_is_bit_equal_to_open_clip(real_data):
    reference = open_clip.image_transform(224, is_train=False)
    for file in sorted((real_data / "imagenet_val_sample").glob("*/*"))[:15]:
        image = eval_transform(open_image(file, ImageLimits()), 224)
        assert torch.equal(normalize(image[None], MEAN, STD)[0], reference(load(file))), file


def test_a_strip_that_would_fill_the_memory_is_refused():
    with pytest.raises(BadImage, match="1 x 60000"):
        eval_transform(Image.new("RGB", (1, 60_000)), 224)


def test_training_crop_is_within_two_levels_of_pillow():
    original = noise(9, 320, 240)
    image = pil_to_tensor(original)
    for k in range(10):
        top, left, height, width = crop_box(240, 320, Draws(k), (0.2, 1.0), (0.75, 4 / 3))
        box = (left, top, left + width, top + height)
        pillow = pil_to_tensor(original.crop(box).resize((64, 64), Image.Resampling.BICUBIC)).int()
        ours = train_transform(image, 64, Draws(k), AugmentationConfig(scale=[0.2, 1.0])).int()
        assert (ours - pillow).abs().max() <= 2


def test_training_transform_of_the_whole_image_is_torchvisions():
    image = pil_to_tensor(noise(10, 90, 90))
    whole = RandomResizedCrop(32, (1.0, 1.0), (1.0, 1.0), InterpolationMode.BICUBIC, antialias=True)(image)
    assert torch.equal(
        train_transform(image, 32, Draws(0), AugmentationConfig(scale=[1.0, 1.0], ratio=[1.0, 1.0])), whole
    )


def test_crops_are_distributed_as_torchvisions():
    scale, ratio, height, width = (0.3, 0.9), (0.75, 4 / 3), 200, 260
    torch.manual_seed(0)
    theirs = np.array(
        [
            transforms.RandomResizedCrop.get_params(torch.empty(3, height, width), list(scale), list(ratio))
            for _ in range(3000)
        ]
    )
    ours = np.array([crop_box(height, width, Draws(k), scale, ratio) for k in range(3000)])
    for mine, reference in zip(ours.T, theirs.T, strict=True):
        error = math.hypot(mine.std(), reference.std()) / math.sqrt(3000)
        assert abs(mine.mean() - reference.mean()) < 4 * error
        assert mine.std() == pytest.approx(reference.std(), rel=0.1)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 500), (500, 1), (2, 3)])
def test_crops_of_tiny_and_elongated_images_lie_inside(height, width):
    for k in range(50):
        top, left, crop_height, crop_width = crop_box(height, width, Draws(k), (0.9, 1.0), (0.75, 4 / 3))
        assert 0 <= top < top + crop_height <= height
        assert 0 <= left < left + crop_width <= width
    assert train_transform(
        torch.zeros(3, height, width, dtype=torch.uint8), 16, Draws(0), AugmentationConfig()
    ).shape == (3, 16, 16)


def test_the_same_draws_give_the_same_pixels_and_others_do_not():
    image = pil_to_tensor(noise(11, 100, 80))
    one, same, other = (
        train_transform(image, 32, Draws(*key), AugmentationConfig()) for key in ((0, 1, 2), (0, 1, 2), (0, 2, 2))
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert one.permute(1, 2, 0).is_contiguous()


def test_flip_mirrors_and_its_probability_holds():
    image = pil_to_tensor(noise(12, 50, 50))
    plain = [train_transform(image, 16, Draws(k), AugmentationConfig()) for k in range(200)]
    always = [train_transform(image, 16, Draws(k), AugmentationConfig(horizontal_flip=1.0)) for k in range(200)]
    assert all(torch.equal(a.flip(-1), b) for a, b in zip(plain, always, strict=True))
    half = [train_transform(image, 16, Draws(k), AugmentationConfig(horizontal_flip=0.5)) for k in range(200)]
    assert 70 < sum(torch.equal(a, b) for a, b in zip(half, always, strict=True)) < 130


def test_normalizing_puts_colors_apart_and_leaves_the_pixels_alone():
    image = torch.stack([pil_to_tensor(noise(13, 20, 20)).permute(1, 2, 0)]).permute(0, 3, 1, 2)
    before = image.clone()
    result = normalize(image, MEAN, STD)
    assert result.is_contiguous()
    assert torch.equal(result, normalize(image.contiguous(), MEAN, STD))
    assert torch.equal(image, before)
