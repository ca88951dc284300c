"""A CLIP to use: pictures and texts in, features and probabilities out."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from clip_exp.config.schema import ModelConfig
from clip_exp.data.images import BadImage, open_image
from clip_exp.data.transforms import eval_transform
from clip_exp.errors import ConfigError, DataError
from clip_exp.evaluation.classification import build_classifier
from clip_exp.evaluation.encode import encode_pixels, encode_texts
from clip_exp.evaluation.prompts import templates as read_templates
from clip_exp.models.clip import CLIP
from clip_exp.text.tokenizer import Tokenizer

Picture = str | Path | Image.Image


class Clip:
    """A model with the tokenizer and the transform that belong to it; made by `clip_exp.load`.

    Args:
        model: in evaluation mode, on `device`.
        config: what the model was built from.

    Attributes:
        model: the torch module; `encode_image(image_BCHW)` of normalised pictures, `encode_text(tokens_BL)`.
        tokenizer: texts to `tokens_BL`.
        batch_size: pictures per forward pass.
    """

    def __init__(
        self, model: CLIP, config: ModelConfig, device: torch.device, max_image_pixels: int = 200_000_000
    ) -> None:
        self.model = model
        self.config = config
        self.device = device
        self.tokenizer = Tokenizer(config.text.context_length)
        self.batch_size = 64
        self.max_image_pixels = max_image_pixels

    def encode_image(self, images: Picture | Iterable[Picture]) -> Tensor:
        """Features [N, D] of one or many paths or pictures: float32, unit norm, on the CPU.

        Raises:
            DataError: a picture cannot be read, or there are none.
        """
        pictures = [images] if isinstance(images, Picture) else list(images)
        if not pictures:
            raise DataError("no pictures: give one or many paths or PIL pictures.")
        features = []
        for start in range(0, len(pictures), self.batch_size):
            pixels = torch.stack([self._pixels(picture) for picture in pictures[start : start + self.batch_size]])
            features.append(encode_pixels(self.model, pixels, self.config.image, self.device).cpu())
        return torch.cat(features)

    def encode_text(self, texts: str | Iterable[str]) -> Tensor:
        """Features [N, D] of one or many texts: float32, unit norm, on the CPU. Too long texts are cut."""
        sentences = [texts] if isinstance(texts, str) else list(texts)
        if not sentences:
            raise DataError("no texts: give one or many.")
        return encode_texts(self.model, self.tokenizer, sentences, device=self.device).cpu()

    def classify(
        self,
        images: Picture | Iterable[Picture],
        labels: Sequence[str],
        templates: str | Sequence[str] | None = None,
    ) -> Tensor:
        """Probabilities [images, labels]: softmax over the labels of the scaled cosines. Float32, on the CPU.

        Args:
            labels: whole texts, such as "a diagram"; with `templates`, class names.
            templates: `openai`, `simple`, or texts with `{}` for the name; a label's embeddings are averaged.
        """
        if isinstance(labels, str) or not labels:
            raise ConfigError('labels must be a list of texts, as ["a dog", "a cat"].')
        if templates is None:
            label_features = self.encode_text(labels)
        else:
            prompts = read_templates(templates if isinstance(templates, str) else list(templates))
            label_features = build_classifier(self.model, self.tokenizer, labels, prompts, device=self.device).cpu()
        scale = self.model.logit_scale.detach().exp().float().cpu()
        return (scale * self.encode_image(images) @ label_features.T).softmax(dim=-1)

    def _pixels(self, picture: Picture) -> Tensor:
        if isinstance(picture, Image.Image):
            return eval_transform(picture, self.config.image.image_size)
        try:
            return eval_transform(open_image(picture, self.max_image_pixels), self.config.image.image_size)
        except BadImage as error:
            raise DataError(f"{picture}: {error}") from None
