"""Preprocessing of images in the format of Hugging Face's image processors."""

import json
from pathlib import Path
from typing import Any

from clip_exp.config.model import ImageTowerConfig, Interpolation, ResizeMode
from clip_exp.data.images import preprocessing_of

# Pillow's numbers of interpolation modes
RESAMPLE = {Interpolation.bilinear: 2, Interpolation.bicubic: 3}


def write_preprocessor(folder: Path, tower: ImageTowerConfig, family: str = "CLIP") -> None:
    """Write `preprocessor_config.json` for `<family>ImageProcessor` and `<family>Processor`."""
    classes = {"image_processor_type": f"{family}ImageProcessor", "processor_class": f"{family}Processor"}
    text = json.dumps({**classes, **preprocessor_of(tower)}, indent=2) + "\n"
    (folder / "preprocessor_config.json").write_text(text, encoding="utf-8")


def preprocessor_of(tower: ImageTowerConfig) -> dict[str, Any]:
    """Return the configuration of the evaluation transform: resize, crop, rescale to 0..1, normalize."""
    size, mean, std, interpolation, resize_mode = preprocessing_of(tower)
    square = {"height": size, "width": size}
    squash = resize_mode is ResizeMode.squash
    return {
        "do_convert_rgb": True,
        "do_resize": True,
        "size": square if squash else {"shortest_edge": size},
        "resample": RESAMPLE[interpolation],
        "do_center_crop": not squash,
        "crop_size": square,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": mean,
        "image_std": std,
    }
