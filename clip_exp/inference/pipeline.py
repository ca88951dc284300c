"""A CLIP to use: images, videos and texts in, features, probabilities and rankings out."""

import copy
import logging
import multiprocessing
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from clip_exp.config.commands import ExportFormat, UseConfig
from clip_exp.config.evaluation import EvalOnBadImage
from clip_exp.config.model import ModelConfig
from clip_exp.devices import exact_float32, resolve_accelerator
from clip_exp.errors import ConfigError, DataError
from clip_exp.evaluation.classification import build_classifier
from clip_exp.evaluation.evaluated_model import EvaluatedModel
from clip_exp.evaluation.features import EncodeOptions, ImageEncoder, encode_options, encode_texts, require_finite
from clip_exp.evaluation.sets.class_names import templates as read_templates
from clip_exp.export.write import write_export
from clip_exp.inference.features import Encoded, EncodedMedia, Match, best_matches, encode_each, encode_media
from clip_exp.inference.index import ImageIndex, agree, read_recipe, recipe_of, update_index
from clip_exp.inference.inputs import FRAMES, ImageInput, find_images, folders_of, tell_left_out
from clip_exp.inference.media import Media
from clip_exp.loading import ModelSource, load_model
from clip_exp.models.clip import CLIP
from clip_exp.text.tokenizer import build_tokenizer

log = logging.getLogger(__name__)
ImageInputs = ImageInput | Iterable[ImageInput]


class Pipeline:
    """A model with the tokenizer and the transform that belong to it; made by `clip_exp.load`.

    Wherever an image is taken, a path may be a video's (`pip install av`): its vector is the mean of `frames` frames.

    Args:
        model: in evaluation mode, on `device`.
        config: what the model was built from.
        source: where its weights are; an index of images remembers it.

    Attributes:
        model: the torch module; `encode_image(image_BCHW)` of normalised images, `encode_text(tokens_BL)`.
        tokenizer: texts to `tokens_BL`.
        options: how images are read and encoded.
        batch_size: images per forward pass.
        frames: of a video.
    """

    def __init__(
        self,
        model: CLIP,
        config: ModelConfig,
        device: torch.device,
        options: EncodeOptions | None = None,
        source: ModelSource | None = None,
    ) -> None:
        self.model = model
        self.config = config
        self.device = device
        self.source = source
        self.tokenizer = build_tokenizer(config.text)
        self.options = options or EncodeOptions(device)
        self.batch_size = self.options.batch_size
        self.frames = FRAMES

    def encode_image(self, images: ImageInputs) -> Tensor:
        """Features [N, D] of one or many paths or images: float32, unit norm, on the CPU.

        Raises:
            DataError: an image cannot be read, or there are none.
        """
        return self.encode_media(images).features

    def encode_text(self, texts: str | Iterable[str]) -> Tensor:
        """Features [N, D] of one or many texts: float32, unit norm, on the CPU. Too long texts are cut, which is told."""
        sentences = [texts] if isinstance(texts, str) else list(texts)
        if not sentences:
            raise DataError("no texts: give one or many.")
        cut_before = self.tokenizer.truncated
        features = encode_texts(self.model, self.tokenizer, sentences, device=self.device).cpu()
        self._tell_cut(cut_before)
        return features

    def classify(
        self,
        images: ImageInputs,
        texts: Sequence[str] | None = None,
        *,
        labels: Sequence[str] | None = None,
        templates: str | Sequence[str] | None = None,
    ) -> Tensor:
        """Return probabilities [images, texts] or [images, labels], as `clip-exp predict` does: float32, on the CPU.

        They are the softmax over the texts or labels of `exp(logit_scale)` times the cosine.

        Args:
            images: one or many paths or images.
            texts: whole texts, such as "a diagram"; exactly one of `texts` and `labels`.
            labels: class names, such as "dog", which are put into `templates`.
            templates: `openai` (80), `simple` (7), or texts with `{}` for the class name, whose embeddings are averaged per
                label; None: a label is the whole text.

        Raises:
            ConfigError: not exactly one of `texts` and `labels` is given, or `templates` is given without `labels`.
            DataError: an image cannot be read, or there are none.
        """
        if (texts is None) == (labels is None):
            raise ConfigError(
                'give exactly one of texts and labels: classify(images, ["a diagram", "a dog"]), or '
                'classify(images, labels=["dog", "cat"], templates="openai").'
            )
        if texts is not None and templates is not None:
            raise ConfigError(
                "templates are for class names: give labels=[…] instead of texts, or leave out templates."
            )
        features = self.encode_labels(texts if texts is not None else labels or [], templates)
        return self.probabilities(self.encode_image(images), features)

    def rank(self, text: str, images: ImageInputs, top_k: int | None = None) -> list[Match]:
        """The images that fit a text best, best first; equal ones in the order given.

        Args:
            images: paths and images, or one folder or glob.
            top_k: number of images to return; None: all.
        """
        if not isinstance(text, str):
            raise ConfigError("text must be one text.")
        if isinstance(images, str | Path):
            images = find_images(images)
        items = self._items(images)
        ranked = best_matches(self.encode_media(items).features, self.encode_text(text)[0], top_k)
        paths = Media(items).paths
        return [Match(str(paths[index]), score, index) for index, score in ranked]

    def index(
        self,
        images: str | Path | Sequence[str | Path] | None = None,
        path: str | Path = "photos.index",
        on_bad_image: str = "skip",
        what: str | None = "images",
    ) -> ImageIndex:
        """An index of images, made or brought up to date: only what is new or changed is encoded.

        Args:
            images: paths, folders and globs; what is gone from a folder is dropped. None: the index as it is.
            path: of the file that keeps it.
            on_bad_image: `skip` leaves unreadable images out and warns; `error` raises.
            what: name of the progress bar; None for none.
        Raises:
            ConfigError: no such file or folder, or another process changes the index.
            CheckpointError: the index is damaged, was made by another model, or cannot be written.
            DataError: an image cannot be read under `error`, or none can.
        """
        if on_bad_image not in list(EvalOnBadImage):
            raise ConfigError(f"on_bad_image={on_bad_image} must be one of {', '.join(EvalOnBadImage)}.")
        path = Path(path).expanduser()
        if self.source is None:
            raise ConfigError("an index remembers its model's weights: load the model with clip_exp.load.")
        recipe = recipe_of(self.source, self.options.precision, self.frames)
        if path.exists():
            agree(path, read_recipe(path), recipe)
        elif images is None:
            raise ConfigError(f"{path}: no such file. Give the images to make it from.")
        if images is not None:
            files = find_images(images)
            update = update_index(
                path, recipe, files, folders_of(images), lambda: self, EvalOnBadImage(on_bad_image), what
            )
            tell_left_out(update.left_out, len(files))
        return ImageIndex(path, self)

    def export(self, output: str | Path, format: str = "open_clip", overwrite: bool = False) -> Path:
        """Write the model as a folder that another library loads, with preprocessing, tokenizer and model card.

        Args:
            output: a new folder, which appears when all is in it and gives the same features.
            format: `open_clip`, `huggingface`, `safetensors` (ours) or `onnx`.
            overwrite: replace an older export.
        Raises:
            ConfigError: the format cannot hold the model, or the folder has something in it.
            CheckpointError: the folder cannot be written.
        """
        if format not in list(ExportFormat):
            raise ConfigError(f"format={format} must be one of {', '.join(ExportFormat)}.")
        model = self.model if self.device.type == "cpu" else copy.deepcopy(self.model).cpu()
        return write_export(model, self.config, self.source, output, ExportFormat(format), overwrite).folder

    def encode_labels(
        self, labels: Sequence[str], templates: str | Sequence[str] | None = None, what: str | None = None
    ) -> Tensor:
        """Features [labels, D] of whole texts, or of class names in templates; see `classify`.

        Args:
            what: name of the progress bar; None for none.
        """
        if isinstance(labels, str) or not labels:
            raise ConfigError('texts and labels must be non-empty lists, as ["a dog", "a cat"].')
        if templates is None:
            return self.encode_text(labels)
        prompts = read_templates(templates if isinstance(templates, str) else list(templates))
        cut_before = self.tokenizer.truncated
        features = build_classifier(self.model, self.tokenizer, labels, prompts, device=self.device, what=what).cpu()
        self._tell_cut(cut_before)
        return features

    @exact_float32()
    def probabilities(self, image_features_ND: Tensor, label_features_CD: Tensor) -> Tensor:
        """[N, C]: softmax over the labels of exp(logit_scale) times the cosine. Float32, on the CPU.

        Raises:
            NumericError: a feature is not finite.
        """
        require_finite(image_features_ND, "image features")
        require_finite(label_features_CD, "label features")
        scale = self.model.logit_scale.detach().float().exp().cpu()
        return (scale * image_features_ND @ label_features_CD.T).softmax(dim=-1)

    def encode_media(
        self, images: ImageInputs, on_bad_image: EvalOnBadImage = EvalOnBadImage.error, what: str | None = None
    ) -> EncodedMedia:
        """Features of images and videos, with what was left out under `skip`.

        Args:
            what: name of the progress bar; None for none.
        Raises:
            DataError: one cannot be read under `error`, none can be read, or there are none.
        """
        media = Media(self._items(images), self.frames)
        if not len(media):
            raise DataError("no images: give one or many paths or PIL images.")
        encoder, options = self._encoder(media, on_bad_image)
        return encode_media(encoder, media, options, what)

    def encode_each(self, media: Media, on_bad_image: EvalOnBadImage, what: str | None = None) -> Iterator[Encoded]:
        """See `inference.features.encode_each`."""
        encoder, options = self._encoder(media, on_bad_image)
        return encode_each(encoder, media, options, what)

    def _encoder(self, media: Media, on_bad_image: EvalOnBadImage) -> tuple[ImageEncoder, EncodeOptions]:
        options = replace(self.options, batch_size=self.batch_size, on_bad_image=on_bad_image)
        # Images in memory need no decoding; where processes are spawned, the caller's script would have to expect it.
        if media.in_memory or (options.num_workers is None and multiprocessing.get_start_method() != "fork"):
            options = replace(options, num_workers=0)
        return EvaluatedModel(self.model, self.tokenizer, self.config, options).image_encoder(), options

    def _items(self, images: ImageInputs) -> list[ImageInput]:
        if isinstance(images, str | Path) and Path(images).is_dir():
            raise ConfigError(f'{images} is a folder: list its images with clip_exp.find_images("{images}").')
        return [images] if isinstance(images, str | Path | Image.Image) else list(images)

    def _tell_cut(self, before: int) -> None:
        if cut := self.tokenizer.truncated - before:
            length = self.config.text.context_length
            log.warning("%d of the texts are longer than the model's %d tokens: their ends are cut.", cut, length)


def load_pipeline(source: ModelSource, accelerator: str = "auto") -> Pipeline:
    """Load a model with the default options.

    Raises:
        ConfigError: no such accelerator here.
        CheckpointError: the weights cannot be read, or are another model's.
    """
    device = torch.device(resolve_accelerator(accelerator))
    return Pipeline(load_model(source, device), source.model, device, source=source)


def open_pipeline(config: UseConfig, source: ModelSource) -> Pipeline:
    """Load the model of a command, ready to use as its configuration says.

    Raises:
        ConfigError: no such accelerator here.
        CheckpointError: the weights cannot be read, or are another model's.
    """
    options = encode_options(config)
    pipeline = Pipeline(load_model(source, options.device), source.model, options.device, options, source)
    pipeline.frames = config.frames or pipeline.frames
    return pipeline
