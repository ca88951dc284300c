"""Data sets as users write them, named by `_target_`."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from pytorch_lightning import LightningDataModule
from torch.utils.data import DataLoader, Dataset, IterableDataset

from clip_exp.data.tables.open import read_table

CLASSES = ["even", "odd"]


def pixels(index: int, side: int = 40) -> np.ndarray:
    """Return a smooth image, uint8 [side, side, 3], that depends on the index only."""
    coarse = np.random.default_rng(index).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return np.array(Image.fromarray(coarse).resize((side, side)))


class Pairs(Dataset[dict[str, Any]]):
    """Drawn images with two captions each, and a label."""

    classes = CLASSES

    def __init__(self, count: int = 48, start: int = 0) -> None:
        self.count, self.start = count, start

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        number = self.start + index
        return {
            "image": Image.fromarray(pixels(number)),
            "captions": [f"image number {number}", f"the {number}th of all images"],
            "label": CLASSES[number % 2],
        }

    def num_captions(self, index: int) -> int:
        return 2


class Noisy(Pairs):
    """Images that the data set itself augments, with all three generators."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        noise = np.random.randint(0, 64) + random.randrange(64) + int(torch.randint(64, ()))
        return {**super().__getitem__(index), "image": np.minimum(pixels(index), 255 - noise)}


class Versioned(Pairs):
    """Pairs with a fingerprint."""

    def __init__(self, version: int = 1, count: int = 48) -> None:
        super().__init__(count)
        self.version = version

    def fingerprint(self) -> dict[str, int]:
        return {"version": self.version}


class OfTable:
    """The pairs of a table; not a subclass of Dataset."""

    def __init__(self, table: str) -> None:
        self.table = read_table(table)
        self.root = self.table.root

    def __len__(self) -> int:
        return self.table.images

    def __getitem__(self, index: int) -> tuple[Path, list[str]]:
        rows = self.table.rows_of(index).tolist()
        return self.root / self.table.path(rows[0]), [self.table.caption(row) for row in rows]

    def num_captions(self, index: int) -> int:
        return len(self.table.rows_of(index))


class Fields(NamedTuple):
    image: Any
    caption: str


@dataclass
class Record:
    image: Any
    captions: list[str]


class Returning:
    """Data set whose items a function returns."""

    def __init__(self, item: Callable[[int], Any], count: int = 8, **attributes: Any) -> None:
        self.item, self.count = item, count
        vars(self).update(attributes)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Any:
        return self.item(index)


class Failing(Pairs):
    """Pairs of which every fourth (`every`) fails, by the error that is named."""

    def __init__(self, error: str, count: int = 48, every: int = 4) -> None:
        super().__init__(count)
        self.error, self.every = error, every

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index % self.every == 1:
            raise {"os": OSError("the server is busy"), "value": ValueError("no such row")}[self.error]
        return super().__getitem__(index)


class Streamed(IterableDataset[dict[str, Any]]):
    def __iter__(self):
        yield from Pairs()


class Module(LightningDataModule):
    """Loaders instead of a data set, which exists after `setup` only."""

    def setup(self, stage: str) -> None:
        self.train, self.val = Pairs(48), Pairs(8, start=100)

    def train_dataloader(self) -> DataLoader[dict[str, Any]]:
        return DataLoader(self.train, batch_size=5, shuffle=True)

    def val_dataloader(self) -> DataLoader[dict[str, Any]]:
        return DataLoader(self.val)


class Several(Module):
    """Several loaders at once."""

    def train_dataloader(self) -> list[DataLoader[dict[str, Any]]]:  # type: ignore[override]
        return [DataLoader(self.train)]


class WithoutLength:
    def __getitem__(self, index: int) -> None: ...


class Named(Pairs):
    """Arguments with the names of keys of `data`."""

    def __init__(self, max_rows: int, image_root: str | None = None, name: str = "own", captions: str = "own") -> None:
        super().__init__(16)
        self.given = (max_rows, image_root, name, captions)


class OfFile(Pairs):
    """Pairs whose fingerprint is the content of a file."""

    def __init__(self, file: str, count: int = 40) -> None:
        super().__init__(count)
        self.fingerprint = Path(file).read_text()


class Nowhere(Pairs):
    """Paths of missing images."""

    def __getitem__(self, index: int) -> Any:
        return f"/nowhere/{index}.jpg", "a caption"


class Unlabeled(Pairs):
    """Pairs whose labels have no names."""

    classes = None


class Numbers(Pairs):
    """Items that are not pairs."""

    def __getitem__(self, index: int) -> Any:
        return index
