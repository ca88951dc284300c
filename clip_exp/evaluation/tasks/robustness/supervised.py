"""Supervised networks of torchvision, trained on ImageNet-1k, as baselines of a CLIP."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from clip_exp.data.files import BadImage
from clip_exp.data.images import MAX_ASPECT, normalize, pil_to_tensor
from clip_exp.devices import inference
from clip_exp.errors import CheckpointError, ConfigError, nearest
from clip_exp.evaluation.features import EncodeOptions, ImageEncoder
from clip_exp.evaluation.tasks.robustness import weights_file
from clip_exp.ranks.group import from_main
from clip_exp.storage import file_sha256
from clip_exp.weights.read import read_weights

DEFAULT_WEIGHTS = "IMAGENET1K_V1"  # its preprocessing is used for files with other names
INCEPTIONS = ("googlenet", "inception_v3")  # convert their inputs to -1 to 1, as in training


@dataclass(frozen=True)
class Supervised:
    """Supervised network whose output vectors are the logits of the 1,000 classes."""

    name: str
    encoder: ImageEncoder
    about: dict[str, Any]  # evaluation settings


@dataclass(frozen=True)
class Preset:
    """Pixel transform of torchvision's `ImageClassification` preset: RGB, shorter side resized (Pillow), center crop."""

    resize_size: int
    crop_size: int
    interpolation: str

    def __call__(self, image: Image.Image) -> Tensor:
        """Return the pixels, uint8 [3, crop_size, crop_size].

        Raises:
            BadImage: the aspect ratio is too large, as for CLIP's transform.
        """
        from torchvision.transforms import InterpolationMode
        from torchvision.transforms import functional as F

        if max(image.size) > MAX_ASPECT * min(image.size):
            raise BadImage(f"{image.width} x {image.height} pixels, longer than {MAX_ASPECT} times its shorter side")
        resized = F.resize(image.convert("RGB"), [self.resize_size], InterpolationMode(self.interpolation))
        return pil_to_tensor(F.center_crop(resized, [self.crop_size])).contiguous()


def load_supervised(name: str, weights: str, where: str, options: EncodeOptions) -> Supervised:
    """Load a classifier of `torchvision.models`. All ranks must call; only rank 0 downloads or reads the weights.

    Args:
        name: name of the network in `torchvision.models`.
        weights: torchvision's name of the weights, such as IMAGENET1K_V1, or a file. A file with the name of published weights
            gets their preprocessing, other files that of IMAGENET1K_V1.
        where: key of the task, for messages.
        options: options for encoding images.

    Raises:
        ConfigError: the network or the weights are unknown.
        CheckpointError: the weights cannot be downloaded or read, or do not fit the network.
    """
    from torchvision import models

    if name not in models.list_models(module=models):
        raise ConfigError(f"{where}.baseline={name} does not exist: {nearest(name, models.list_models(module=models))}")
    published = models.get_model_weights(name)
    file = weights_file(weights, where)
    if file is None and weights not in published.__members__:
        raise ConfigError(
            f"{where}.baseline_weights={weights} must be a file, or weights of {name} "
            f"({', '.join(entry.name for entry in published)})."
        )
    by_file = {Path(entry.url).name: entry for entry in published}
    chosen = published[weights] if file is None else by_file.get(file.name, published[DEFAULT_WEIGHTS])
    state, identity = from_main(lambda: _read(name, chosen, file, where))
    arguments = {"transform_input": True, "init_weights": False} if name in INCEPTIONS else {}
    model = models.get_model(name, weights=None, **arguments)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        problems = [line.strip() for line in str(error).splitlines()[1:3]]
        raise CheckpointError(
            f"{file or weights} does not fit torchvision's {name}: {' '.join(problems)[:300]}"
        ) from None
    model = model.to(options.device).eval().requires_grad_(False)
    preset = chosen.transforms()
    (resize_size,), (crop_size,) = preset.resize_size, preset.crop_size

    def encode(pixels_BCHW: Tensor) -> Tensor:
        image_BCHW = normalize(pixels_BCHW.to(options.device, non_blocking=True), preset.mean, preset.std)
        with inference(options.precision, options.device):
            return model(image_BCHW).float()

    about = {
        "model": name,
        **identity,
        "resize": f"shorter side {resize_size}, {preset.interpolation.value}, Pillow",
        "crop": f"center {crop_size}",
        "mean": preset.mean,
        "std": preset.std,
    }
    transform = Preset(resize_size, crop_size, preset.interpolation.value)
    decisive = {key: value for key, value in about.items() if key != "weights"}  # the path may change
    return Supervised(name, ImageEncoder(encode, transform, crop_size, decisive), about)


def restrict(logits_NC: Tensor, classes: list[list[int]]) -> Tensor:
    """Return [N, K]: for each class of a dataset the highest logit of its ImageNet classes, minus infinity if it has none.

    So a prediction is correct if the best of all these ImageNet classes belongs to the label, as in the published scores of
    ObjectNet and the datasets with a subset of the classes (Taori et al. 2020).

    Args:
        logits_NC: logits of the 1,000 classes.
        classes: ImageNet classes of each class of the dataset.
    """
    none = logits_NC.new_full((len(logits_NC),), -torch.inf)
    return torch.stack([logits_NC[:, indices].amax(dim=1) if indices else none for indices in classes], dim=1)


def _read(name: str, chosen: Any, file: Path | None, where: str) -> tuple[Mapping[str, Tensor], dict[str, str]]:
    """Return weights, and the evaluation settings that identify them."""
    if file is not None:
        return read_weights(file), {"weights": str(file.resolve()), "weights_sha256": file_sha256(file)}
    try:
        state = chosen.get_state_dict(progress=True, check_hash=True, map_location="cpu", weights_only=True)
    except Exception as error:  # errors of the network or the disk, or any error of the unpickler for a damaged file
        raise CheckpointError(
            f"{where}: the weights of {name} cannot be downloaded from {chosen.url} or read ({error}). Download the file on another "
            f"machine and set {where}.baseline_weights=FILE, or leave out the baseline: {where}.baseline=null."
        ) from error
    return state, {"weights": chosen.name, "weights_url": chosen.url}
