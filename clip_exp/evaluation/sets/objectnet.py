"""ObjectNet (Barbu et al. 2019) from a local copy: its 113 classes that are also in ImageNet. Does not import torch.

As in the published evaluations of CLIP (the code of wise-ft, which CLIP_benchmark and the table of OpenCLIP use), only images of
the 113 classes are scored, with ObjectNet's own 113 labels as class names, in the order of the folders. That code converts the
labels to lower case, as CLIP's tokenizer does with every text. The red frame of two pixels is cropped first.
"""

import json
from pathlib import Path
from typing import Any

from clip_exp.data.image_sets import ImageFiles
from clip_exp.errors import ConfigError, DataError
from clip_exp.evaluation.sets.labeled import LabeledImages, find_images, listing

FRAME = 2  # pixels on each side
FOLDERS, OVERLAP = "folder_to_objectnet_label.json", "objectnet_to_imagenet_1k.json"
IDS, IMAGENET = "pytorch_to_imagenet_2012_id.json", "imagenet_to_label_2012_v2"
MAPPINGS = (FOLDERS, OVERLAP, IDS, IMAGENET)


def from_objectnet(root: str | Path, where: str = "task") -> LabeledImages:
    """Return the images `<root>/images/<class>/<image>`, with `<root>/mappings/`, in the layout of objectnet-1.0.zip.

    Args:
        root: folder objectnet-1.0, its parent, or its folder of images.
        where: key of the data, for messages.
    """
    folder = Path(root).expanduser()
    if not folder.is_dir():
        raise ConfigError(f"{where}.root={folder}: no such folder. Give the folder objectnet-1.0.")
    images = next(place for place in (folder / "objectnet-1.0/images", folder / "images", folder) if place.is_dir())
    places = (images.parent / "mappings", images.parent, folder)
    mappings = next((place for place in places if all((place / name).is_file() for name in MAPPINGS)), None)
    if mappings is None:
        raise ConfigError(
            f"{where}.root={folder}: ObjectNet's mappings are missing. Use the layout of objectnet-1.0.zip: images/ next "
            f"to mappings/ with {', '.join(MAPPINGS)}."
        )
    label_of_folder, overlap = _read_json(mappings / FOLDERS), _imagenet_of_label(mappings)
    folders = sorted(entry.name for entry in images.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if unknown := [folder for folder in folders if folder not in label_of_folder]:
        raise DataError(
            f"{images}: folders that are not classes of ObjectNet: {listing(unknown)}. Move them elsewhere."
        )
    classes = sorted(folder for folder, label in label_of_folder.items() if label in overlap)
    files = {folder: find_images(images / folder) for folder in folders}
    scored = [folder for folder in classes if files.get(folder)]
    if not scored:
        raise DataError(f"{images} contains no images of the {len(classes)} classes that are also in ImageNet.")
    position = {folder: index for index, folder in enumerate(classes)}
    others = [folder for folder in folders if folder not in position]
    return LabeledImages(
        ImageFiles([path for folder in scored for path in files[folder]], border=FRAME),
        [position[folder] for folder in scored for _ in files[folder]],
        [label_of_folder[folder] for folder in classes],
        str(root),
        [folder if folder in files else None for folder in classes],
        imagenet=[overlap[label_of_folder[folder]] for folder in classes],
        about={
            "left_out_classes": len(others),
            "left_out_images": sum(len(files[folder]) for folder in others),
            "cropped_border": f"{FRAME} pixels on each side",
        },
    )


def _imagenet_of_label(mappings: Path) -> dict[str, list[int]]:
    """Return the classes of ImageNet-1k, as positions in the sorted wnids, of each label of ObjectNet that is in ImageNet."""
    index_of_id = {str(number): int(index) for index, number in _read_json(mappings / IDS).items()}
    lines = (mappings / IMAGENET).read_text(encoding="utf-8", errors="replace").split("\n")
    id_of_label = {line.strip(): str(number) for number, line in enumerate(lines) if line.strip()}
    found = {}
    for label, names in _read_json(mappings / OVERLAP).items():
        ids = [id_of_label.get(name) for name in names.split("; ")]
        if unknown := [name for name, number in zip(names.split("; "), ids, strict=True) if number not in index_of_id]:
            raise DataError(f"{mappings / OVERLAP}: {listing(unknown)} of '{label}' is not in {IMAGENET} and {IDS}.")
        found[label] = sorted(index_of_id[number] for number in ids if number is not None)
    return found


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}. Take it from objectnet-1.0.zip.") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} is not a mapping. Take it from objectnet-1.0.zip.")
    return content
