"""The handwritten digits that scikit-learn carries (Alpaydin and Kaynak 1998): 1,797 grey pictures of 8 x 8."""

import numpy as np
from PIL import Image

from clip_exp.data.randomness import hash64
from clip_exp.data.samples import Sample

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEMPLATES = ("a photo of the number {}.", "the digit {}.", "a handwritten {}.")
_HELD_OUT_EVERY = 5
_TEMPLATE = 4


def digits(seed: int) -> tuple[list[Sample], list[Sample]]:
    """Training and held-out samples with columns `title` and `label`; every fifth picture of each class is held out.

    Args:
        seed: of the choice of each caption's template; pictures and split do not depend on it.
    """
    from sklearn.datasets import load_digits

    data = load_digits()
    seen = dict.fromkeys(range(len(WORDS)), 0)
    train: list[Sample] = []
    val: list[Sample] = []
    for i, (pixels, target) in enumerate(zip(data.images, data.target, strict=True)):
        word = WORDS[target]
        template = TEMPLATES[hash64(_TEMPLATE, seed, i) % len(TEMPLATES)]
        picture = Image.fromarray(np.round(pixels * (255 / 16)).astype(np.uint8))
        held_out = seen[target] % _HELD_OUT_EVERY == _HELD_OUT_EVERY - 1
        (val if held_out else train).append(Sample(picture, {"title": template.format(word), "label": word}))
        seen[target] += 1
    return train, val
