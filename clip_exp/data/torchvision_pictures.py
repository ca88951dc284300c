"""Pictures that a data set of torchvision keeps in a form of its own. No torch: the data set is made elsewhere."""

import hashlib
import os
import warnings
from pathlib import Path
from typing import Any

from PIL import Image

from clip_exp.data.contents import Stored
from clip_exp.data.files import TOO_MANY_PIXELS, BadImage
from clip_exp.data.headers import bad_image
from clip_exp.data.tables.stamps import Stamp


class TorchvisionPictures:
    """The pictures of a data set of torchvision, or of anything whose items begin with a picture.

    Args:
        dataset: `dataset[i][0]` is a PIL picture.
        title: of the set and its part, as CIFAR10/test.
        root: the folder that the set was given, absolute.
    """

    def __init__(self, dataset: Any, title: str, root: Path) -> None:
        self.dataset = dataset
        self.title = title
        self.root = root

    def __len__(self) -> int:
        return len(self.dataset)

    def open(self, index: int, max_pixels: int) -> Image.Image:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                picture = self.dataset[index][0]
                picture.load()
            except Exception as error:  # whatever this class meets in a damaged file
                raise bad_image(error) from error
        if picture.width * picture.height > max_pixels:
            raise BadImage(
                f"{TOO_MANY_PIXELS}: {picture.width} x {picture.height} pixels, more than max_image_pixels={max_pixels}"
            )
        return picture

    def name(self, index: int) -> str:
        return f"{self.title}/{index}"

    def stored(self, index: int) -> Stored | None:
        """Return the image's file where the set has a list of them, whatever its name: of paths, or of tuples that begin with one."""
        for listed in vars(self.dataset).values():
            if isinstance(listed, list) and len(listed) == len(self):
                item = listed[index]
                path = item[0] if isinstance(item, tuple) and item else item
                if isinstance(path, str | Path) and os.path.isabs(path) and os.path.isfile(path):
                    return Stored(str(path))
        return None

    def fingerprint(self) -> str:
        """Of the set's name and length, and of names, sizes, times of change and samples of the content of its files."""
        digest, files = hashlib.sha256(f"{self.title}\t{len(self)}\n".encode()), self._files()
        for path in files:
            digest.update(f"{path}\t{tuple(Stamp.of(Path(path), len(files)))}\n".encode())
        return digest.hexdigest()

    def _files(self) -> list[str]:
        """Below the set's own folders where it names them: `root` may hold many sets."""
        named = [getattr(self.dataset, name, None) for name in ("base_folder", "raw_folder", "filename")]
        named += [
            value for value in vars(self.dataset).values() if isinstance(value, str | Path) and os.path.isabs(value)
        ]
        paths = {self.root / value for value in named if isinstance(value, str | Path)}
        own = {path for path in paths if self.root in path.parents and path.exists()} or {self.root}
        found = {str(path) for path in own if path.is_file()}
        for folder in own:
            found |= {os.path.join(parent, name) for parent, _, names in os.walk(folder) for name in names}
        return sorted(found)
