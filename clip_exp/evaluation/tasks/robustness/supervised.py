"""Networks that torchvision trained on ImageNet-1k with labels, to stand beside a CLIP."""

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

DEFAULT_WEIGHTS = "IMAGENET1K_V1"  # whose preprocessing a file of unknown origin gets
INCEPTIONS = ("googlenet", "inception_v3")  # were trained on pixels of -1 to 1, into which they turn theirs


@dataclass(frozen=True)
class Supervised:
    """A network whose vectors are its logits of the 1,000 classes."""

    name: str
    encoder: ImageEncoder
    about: dict[str, Any]  # for a protocol


@dataclass(frozen=True)
class Preset:
    """The pixels of torchvision's `ImageClassification` preset: RGB, shorter side resized (Pillow), center crop."""

    resize_size: int
    crop_size: int
    interpolation: str

    def __call__(self, image: Image.Image) -> Tensor:
        """uint8 [3, crop_size, crop_size].

        Raises:
            BadImage: a strip, which CLIP's transform refuses too.
        """
        from torchvision.transforms import InterpolationMode
        from torchvision.transforms import functional as F

        if max(image.size) > MAX_ASPECT * min(image.size):
            raise BadImage(f"{image.width} x {image.height} pixels, longer than {MAX_ASPECT} times its shorter side")
        resized = F.resize(image.convert("RGB"), [self.resize_size], InterpolationMode(self.interpolation))
        return pil_to_tensor(F.center_crop(resized, [self.crop_size])).contiguous()


def load_supervised(name: str, weights: str, where: str, options: EncodeOptions) -> Supervised:
    """A classifier of `torchvision.models` with its weights. Every rank calls; rank 0 alone fetches or reads them.

    Args:
        weights: torchvision's name for them, such as IMAGENET1K_V1, or a file. A file under the name that torchvision
            publishes weights by has those weights' preprocessing, any other IMAGENET1K_V1's.
        where: the task's key, for messages.
    Raises:
        ConfigError: no such network or weights.
        CheckpointError: the weights cannot be fetched or read, or do not fit.
    """
    from torchvision import models

    if name not in models.list_models(module=models):
        raise ConfigError(f"{where}.baseline={name} does not exist: {nearest(name, models.list_models(module=models))}")
    published = models.get_model_weights(name)
    file = weights_file(weights, where)
    if file is None and weights not in published.__members__:
        raise ConfigError(
            f"{where}.baseline_weights={weights} is neither a file nor weights of {name} "
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
    decisive = {key: value for key, value in about.items() if key != "weights"}  # a path may change
    return Supervised(name, ImageEncoder(encode, transform, crop_size, decisive), about)


def restrict(logits_NC: Tensor, classes: list[list[int]]) -> Tensor:
    """[N, K]: of each class of a set, the highest logit of the ImageNet classes that it stands for.

    The best class is then right where the best of all those ImageNet classes is one that the label stands for, which is
    how ObjectNet and the sets with a part of the classes are scored (Taori et al. 2020). A class that stands for none has
    minus infinity.
    """
    none = logits_NC.new_full((len(logits_NC),), -torch.inf)
    return torch.stack([logits_NC[:, indices].amax(dim=1) if indices else none for indices in classes], dim=1)


def _read(name: str, chosen: Any, file: Path | None, where: str) -> tuple[Mapping[str, Tensor], dict[str, str]]:
    """Weights, and what identifies them."""
    if file is not None:
        return read_weights(file), {"weights": str(file.resolve()), "weights_sha256": file_sha256(file)}
    try:
        state = chosen.get_state_dict(progress=True, check_hash=True, map_location="cpu", weights_only=True)
    except Exception as error:  # no network, no disk, or a damaged file, which can break the unpickler in any way
        raise CheckpointError(
            f"{where}: the weights of {name} cannot be fetched from {chosen.url} or read ({error}). Fetch the file elsewhere and "
            f"give it ({where}.baseline_weights=FILE), or go without a network to compare with: {where}.baseline=null."
        ) from error
    return state, {"weights": chosen.name, "weights_url": chosen.url}
