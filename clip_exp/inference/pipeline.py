"""CLIP model for inference: features, probabilities and rankings of images, videos and texts."""

import copy
import multiprocessing
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from clip_exp.config import objects, registry
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
from clip_exp.inference.index import ImageIndex, check_same_model, read_recipe, recipe_of, update_index
from clip_exp.inference.inputs import FRAMES, ImageInput, find_images, folders_of, warn_left_out, warn_truncated
from clip_exp.inference.media import Media
from clip_exp.loading import ModelSource, load_model
from clip_exp.models.clip import CLIP
from clip_exp.text.tokenizer import build_tokenizer

ImageInputs = ImageInput | Iterable[ImageInput]


class Pipeline:
    """Model with its tokenizer and image transform, returned by `clip_exp.load`.

    Paths of images may also be paths of videos (`pip install av`), whose features are the mean over `frames` frames.

    Args:
        model: model in evaluation mode, on `device`.
        config: configuration of the model.
        device: device of the model.
        options: options for reading and encoding images; None: the defaults.
        source: source of the weights, which an index of images saves.

    Attributes:
        model: torch module with `encode_image(image_BCHW)` for normalized images and `encode_text(tokens_BL)`.
        tokenizer: function from texts to `tokens_BL`.
        options: options for reading and encoding images.
        batch_size: number of images per forward pass.
        frames: number of frames per video.
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
        # The folders with the classes of custom towers, and towers that are objects: `export` reads the model back.
        self._config_dir, self._objects = registry.folders(), objects.current()
        self.tokenizer = build_tokenizer(config.text)
        self.options = options or EncodeOptions(device)
        self.batch_size = self.options.batch_size
        self.frames = FRAMES

    def encode_image(self, images: ImageInputs) -> Tensor:
        """Return features [N, D] of one or many paths or images: float32, unit norm, on the CPU.

        Raises:
            DataError: an image cannot be read, or there are none.
        """
        return self.encode_media(images).features

    def encode_text(self, texts: str | Iterable[str]) -> Tensor:
        """Return features [N, D] of one or many texts: float32, unit norm, on the CPU. A warning is logged for truncated texts."""
        sentences = [texts] if isinstance(texts, str) else list(texts)
        if not sentences:
            raise DataError("no texts: give at least one.")
        truncated_before = self.tokenizer.truncated
        features = encode_texts(self.model, self.tokenizer, sentences, device=self.device).cpu()
        self._warn_truncated(truncated_before)
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
        """Return the images with the highest cosine similarity to a text, best first; ties in the given order.

        Args:
            text: text of the query.
            images: paths and images, or one folder or glob.
            top_k: number of images to return; None: all.
        """
        if not isinstance(text, str):
            raise ConfigError("text must be a single string.")
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
        """Create or update an index of images and return it. Only new and changed images are encoded.

        Args:
            images: paths, folders and globs; entries of images removed from a folder are dropped. None: no update.
            path: path of the index file.
            on_bad_image: `skip` leaves unreadable images out and warns; `error` raises.
            what: name of the progress bar; None: no progress bar.

        Raises:
            ConfigError: a file or folder does not exist, or another process is changing the index.
            CheckpointError: the index is damaged, was created by another model, or cannot be written.
            DataError: an image cannot be read and `on_bad_image` is `error`, or none can be read.
        """
        if on_bad_image not in list(EvalOnBadImage):
            raise ConfigError(f"on_bad_image={on_bad_image} must be one of {', '.join(EvalOnBadImage)}.")
        path = Path(path).expanduser()
        if self.source is None:
            raise ConfigError("an index needs the source of the weights: load the model with clip_exp.load.")
        recipe = recipe_of(self.source, self.options.precision, self.frames)
        if path.exists():
            check_same_model(path, read_recipe(path), recipe)
        elif images is None:
            raise ConfigError(f"{path}: no such file. Give images to create the index.")
        if images is not None:
            files = find_images(images)
            update = update_index(
                path, recipe, files, folders_of(images), lambda: self, EvalOnBadImage(on_bad_image), what
            )
            warn_left_out(update.left_out, len(files))
        return ImageIndex(path, self)

    def export(self, output: str | Path, format: str = "open_clip", overwrite: bool = False) -> Path:
        """Export the model to a folder for another library, with preprocessing, tokenizer and model card; return the folder.

        Args:
            output: new folder, which is created only when it is complete and its model gives the same features.
            format: `open_clip`, `huggingface`, `safetensors` (of clip_exp) or `onnx`.
            overwrite: replace an existing export.

        Raises:
            ConfigError: the format does not support the model, or the folder is not empty.
            CheckpointError: the folder cannot be written.
        """
        if format not in list(ExportFormat):
            raise ConfigError(f"format={format} must be one of {', '.join(ExportFormat)}.")
        model = self.model if self.device.type == "cpu" else copy.deepcopy(self.model).cpu()
        with registry.added(self._config_dir), objects.given(self._objects):
            return write_export(model, self.config, self.source, output, ExportFormat(format), overwrite).folder

    def encode_labels(
        self, labels: Sequence[str], templates: str | Sequence[str] | None = None, what: str | None = None
    ) -> Tensor:
        """Return features [labels, D] of whole texts, or of class names in templates.

        Args:
            labels: whole texts, or class names if there are templates.
            templates: see `classify`; None: labels are whole texts.
            what: name of the progress bar; None: no progress bar.

        Raises:
            ConfigError: `labels` is empty or a single text.
        """
        if isinstance(labels, str) or not labels:
            raise ConfigError('texts and labels must be non-empty lists, as ["a dog", "a cat"].')
        if templates is None:
            return self.encode_text(labels)
        prompts = read_templates(templates if isinstance(templates, str) else list(templates))
        truncated_before = self.tokenizer.truncated
        features = build_classifier(self.model, self.tokenizer, labels, prompts, device=self.device, what=what).cpu()
        self._warn_truncated(truncated_before)
        return features

    @exact_float32()
    def probabilities(self, image_features_ND: Tensor, label_features_CD: Tensor) -> Tensor:
        """Return probabilities [N, C]: the softmax over the labels of exp(logit_scale) times the cosine. Float32, on the CPU.

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
        """Return features of images and videos, and the unreadable ones.

        Args:
            images: one or many paths or images.
            on_bad_image: policy for unreadable images.
            what: name of the progress bar; None: no progress bar.

        Raises:
            DataError: an image cannot be read and `on_bad_image` is `error`, none can be read, or there are none.
        """
        media = Media(self._items(images), self.frames)
        if not len(media):
            raise DataError("no images: give at least one path or PIL image.")
        encoder, options = self._encoder(media, on_bad_image)
        return encode_media(encoder, media, options, what)

    def encode_each(self, media: Media, on_bad_image: EvalOnBadImage, what: str | None = None) -> Iterator[Encoded]:
        """Yield the features of every item; see `inference.features.encode_each`."""
        encoder, options = self._encoder(media, on_bad_image)
        return encode_each(encoder, media, options, what)

    def _encoder(self, media: Media, on_bad_image: EvalOnBadImage) -> tuple[ImageEncoder, EncodeOptions]:
        options = replace(self.options, batch_size=self.batch_size, on_bad_image=on_bad_image)
        # Images in memory need no worker processes. Spawned workers would import the caller's script, which may not expect it.
        if media.in_memory or (options.num_workers is None and multiprocessing.get_start_method() != "fork"):
            options = replace(options, num_workers=0)
        return EvaluatedModel(self.model, self.tokenizer, self.config, options).image_encoder(), options

    def _items(self, images: ImageInputs) -> list[ImageInput]:
        if isinstance(images, str | Path) and Path(images).is_dir():
            raise ConfigError(f'{images} is a folder: list its images with clip_exp.find_images("{images}").')
        return [images] if isinstance(images, str | Path | Image.Image) else list(images)

    def _warn_truncated(self, before: int) -> None:
        warn_truncated(self.tokenizer.truncated - before, self.config.text.context_length)


def load_pipeline(source: ModelSource, accelerator: str = "auto") -> Pipeline:
    """Load a model with the default options.

    Raises:
        ConfigError: the accelerator is not available.
        CheckpointError: the weights cannot be read, or are of another model.
    """
    device = torch.device(resolve_accelerator(accelerator))
    options = EncodeOptions(device, limits=source.image_limits())
    return Pipeline(load_model(source, device), source.model, device, options, source)


def open_pipeline(config: UseConfig, source: ModelSource) -> Pipeline:
    """Load the model of a command with the options of its configuration.

    Raises:
        ConfigError: the accelerator is not available.
        CheckpointError: the weights cannot be read, or are of another model.
    """
    options = encode_options(config, source)
    pipeline = Pipeline(load_model(source, options.device), source.model, options.device, options, source)
    pipeline.frames = config.frames or pipeline.frames
    return pipeline
