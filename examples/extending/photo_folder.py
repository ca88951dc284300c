"""A Dataset: a folder of images, each with a text file of the same name that has one caption per line.

python train.py --config-dir examples/extending/conf data=photo_folder data.root=photos model=vit_b32
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset


class PhotoFolder(Dataset[dict[str, Any]]):
    """Images of a folder with their captions.

    Args:
        root: folder with image and text files.
        suffixes: suffixes of the image files.
    """

    def __init__(self, root: str, suffixes: Sequence[str] = (".jpg", ".png")) -> None:
        files = sorted(Path(root).iterdir())
        self.images = [file for file in files if file.suffix in suffixes and file.with_suffix(".txt").is_file()]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        # clip_exp opens the image, so that an unreadable one is counted and replaced like that of a table.
        return {"image": self.images[index], "captions": self._captions(index)}

    def num_captions(self, index: int) -> int:
        """Return the number of captions of an image, for data.captions=all."""
        return len(self._captions(index))

    def fingerprint(self) -> list[tuple[str, int]]:
        """Return what identifies the data: a run that is resumed with other data is refused."""
        return [(image.name, image.stat().st_size) for image in self.images]

    def _captions(self, index: int) -> list[str]:
        return self.images[index].with_suffix(".txt").read_text(encoding="utf-8").splitlines()
