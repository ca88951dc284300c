"""Layouts in which features of images and captions are stored, so that other tools read them. Does not import torch.

clip_retrieval   img_emb/img_emb_0.npy, text_emb/text_emb_0.npy, metadata/metadata_0.parquet, as `clip-retrieval
                 inference` writes them (rom1504/clip-retrieval, clip_inference/writer.py)
datacomp         00000000.npz with the arrays l14_img and l14_txt, and 00000000.parquet with uid, text and
                 clip_l14_similarity_score, as baselines/apply_filter.py of mlfoundations/datacomp reads them
parquet          00000.parquet, with the features in columns
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from clip_exp.config.commands import EmbedFormat
from clip_exp.errors import DataError
from clip_exp.storage import atomic_file

UID = "uid"  # column with DataComp's identifiers
_UID = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True)
class Features:
    """Features of consecutive rows, with what identifies them."""

    keys: list[str]  # keys of samples in shards, or paths as written in the table
    paths: list[str]  # locations of the images
    image: np.ndarray  # [N, D], unit norm
    captions: list[str] | None = None  # None: images only
    text: np.ndarray | None = None  # [N, D], unit norm
    similarity: np.ndarray | None = None  # float32 [N], cosine similarity of image and caption
    columns: dict[str, list[Any]] | None = None  # further columns: texts, numbers or lists of numbers

    @property
    def metadata(self) -> dict[str, Any]:
        """Columns that are not features, by name; None for those without values."""
        return {
            "image_path": _strings(self.paths),
            "caption": None if self.captions is None else _strings(self.captions),
            "key": _strings(self.keys),
            "similarity": self.similarity,
            **(self.columns or {}),
        }


@dataclass(frozen=True)
class Layout:
    """Layout of the files of one command.

    Args:
        format: name of the layout.
        parts: number of parts of the output, for the width of their numbers.
        with_text: whether there are features of captions.
        model: name of the model in DataComp's files.
    """

    format: EmbedFormat
    parts: int
    with_text: bool
    model: str

    @property
    def subfolders(self) -> list[str]:
        """Folders of the files, relative to the output folder."""
        if self.format is not EmbedFormat.clip_retrieval:
            return []
        return ["img_emb", *(["text_emb"] if self.with_text else []), "metadata"]

    def files(self, number: int) -> list[str]:
        """Return the files of a part, relative to the output folder."""
        match self.format:
            case EmbedFormat.clip_retrieval:
                # Tools sort the names as text, so all numbers have the width of the number of parts.
                digits = f"{number:0{len(str(self.parts))}d}"
                endings = {"metadata": "parquet"}
                return [f"{name}/{name}_{digits}.{endings.get(name, 'npy')}" for name in self.subfolders]
            case EmbedFormat.datacomp:
                return [f"{number:08d}.npz", f"{number:08d}.parquet"]
            case EmbedFormat.parquet:
                return [f"{number:05d}.parquet"]

    def write(self, folder: Path, number: int, features: Features) -> list[str]:
        """Write the features of a part, each file atomically; return the files. A part without rows has no files.

        Raises:
            DataError: a value of `uid` is not an identifier of DataComp.
        """
        files = self.files(number)
        if not features.keys:
            for name in files:
                (folder / name).unlink(missing_ok=True)
            return []
        writers = {
            EmbedFormat.clip_retrieval: self._clip_retrieval,
            EmbedFormat.datacomp: self._datacomp,
            EmbedFormat.parquet: self._parquet,
        }
        for name, write in zip(files, writers[self.format](features), strict=True):
            with atomic_file(folder / name) as temporary, temporary.open("wb") as file:
                write(file)
        return files

    def _clip_retrieval(self, features: Features) -> "list[Writer]":
        arrays = [features.image] if features.text is None else [features.image, features.text]
        return [*(_array(array) for array in arrays), _table(features.metadata)]

    def _datacomp(self, features: Features) -> "list[Writer]":
        assert features.captions is not None
        arrays = {f"{self.model}_img": features.image, f"{self.model}_txt": features.text}
        metadata = {
            UID: _uids(features),
            "text": _strings(features.captions),
            f"clip_{self.model}_similarity_score": features.similarity,
            **{name: values for name, values in (features.columns or {}).items() if name != UID},
        }
        return [lambda file: np.savez(file, **arrays), _table(metadata)]  # type: ignore[arg-type]

    def _parquet(self, features: Features) -> "list[Writer]":
        text = None if features.text is None else _lists(features.text)
        embeddings = {"image_embedding": _lists(features.image), "text_embedding": text}
        return [_table({**features.metadata, **embeddings})]


Writer = Callable[[IO[bytes]], None]


def _array(array: np.ndarray) -> Writer:
    return lambda file: np.save(file, array)


def _table(columns: dict[str, Any]) -> Writer:
    table = pa.table({name: values for name, values in columns.items() if values is not None})
    return lambda file: pq.write_table(table, file)


def _strings(texts: list[str]) -> pa.Array:
    # Names of files may not be UTF-8.
    return pa.array([text.encode("utf-8", "backslashreplace").decode() for text in texts], pa.string())


def _lists(array: np.ndarray) -> pa.FixedSizeListArray:
    return pa.FixedSizeListArray.from_arrays(pa.array(array.reshape(-1)), array.shape[1])


def _uids(features: Features) -> list[str]:
    """Return the column `uid`, or hashes of key and caption."""
    given = (features.columns or {}).get(UID)
    if given is None:
        pairs = zip(features.keys, features.captions or [], strict=True)
        return [
            blake2b(f"{key}\0{caption}".encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()
            for key, caption in pairs
        ]
    for path, uid in zip(features.paths, given, strict=True):
        if not isinstance(uid, str) or not _UID.fullmatch(uid):
            raise DataError(f"{path}: {UID}={uid!r} is not an identifier of DataComp, which has 32 hexadecimal digits.")
    return given
