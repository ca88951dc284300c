"""File to which images are copied that a table contains itself, so that each can be read by its offset and size."""

from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from clip_exp.data.tables.columns import int32_numpy


class ImageStore:
    """Writer of a file of images, which is created with the first one.

    Args:
        path: path of the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: BinaryIO | None = None
        self._size = 0

    def __enter__(self) -> "ImageStore":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()

    def add(self, images: pa.Array) -> np.ndarray:
        """Append images, large binary without nulls; return their offsets and sizes, int64 [images, 2].

        Raises: OSError.
        """
        if self._file is None:
            self._file = open(self.path, "wb")  # noqa: SIM115 - closed by __exit__
        sizes = int32_numpy(pc.cast(pc.binary_length(images), pa.int32())).astype(np.int64)
        offsets = self._size + np.concatenate([[0], np.cumsum(sizes)])
        for image in images:
            self._file.write(image.as_buffer())
        self._file.flush()
        self._size = int(offsets[-1])
        return np.stack([offsets[:-1], sizes], axis=1)
