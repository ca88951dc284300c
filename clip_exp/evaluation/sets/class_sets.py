"""Published lists of classes: ImageNet-1k and the 200 classes each of ImageNet-A and -R. No torch.

Wnids and subsets come from `timm`'s package data, names from `open_clip_torch` (see `evaluation.sets.prompts`).
"""

from dataclasses import dataclass
from functools import cache

from clip_exp.evaluation.sets.prompts import imagenet_classes
from clip_exp.open_clip_files import package_folder

CLASS_SETS = {"imagenet": "ImageNet-1k", "imagenet_a": "ImageNet-A", "imagenet_r": "ImageNet-R"}


@dataclass(frozen=True)
class ClassSet:
    """Classes in the order of their wnids."""

    title: str
    wnids: list[str]
    names: list[str]  # OpenAI's; not distinct
    indices: list[int]  # of each class among ImageNet-1k's


@cache
def class_set(name: str) -> ClassSet:
    """One of `CLASS_SETS`."""
    everything = imagenet_classes()
    indices = list(range(len(everything)))
    if name != "imagenet":
        file = package_folder("timm") / f"data/_info/{name}_indices.txt"
        indices = sorted(int(index) for index in file.read_text(encoding="utf-8").split())
    chosen = [everything[index] for index in indices]
    return ClassSet(CLASS_SETS[name], [wnid for wnid, _ in chosen], [name for _, name in chosen], indices)


@cache
def imagenet_index() -> dict[str, int]:
    """The position of each wnid among ImageNet-1k's classes."""
    return {wnid: index for index, (wnid, _) in enumerate(imagenet_classes())}
