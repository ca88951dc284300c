"""Files of samples: WebDataset shards and Parquet, written and read back. Equal samples give equal bytes.

webdataset   000000017.jpg, 000000017.txt with the (first) caption, and 000000017.json with the further columns and, if there are
             several, all `captions`
parquet      columns `image` (struct of bytes and path) and `caption` (a string, or a list), as the library `datasets` reads
             and writes images, and the further columns
"""

import io
import json
import tarfile
from collections.abc import Iterable, Iterator
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from clip_exp.config.commands import ShardFormat
from clip_exp.data.tables.features import Shape
from clip_exp.data.tables.reader import TableOptions
from clip_exp.data.tables.shards import ShardReader
from clip_exp.data.tables.tar import members
from clip_exp.shards.samples import Sample

# Rows whose images a reader of Parquet reads together, as in `datasets`
ROW_GROUP = 100
BOM = "\ufeff"
# Declares the column to the library `datasets`, which would otherwise return bytes instead of images
IS_IMAGE = {"huggingface": json.dumps({"info": {"features": {"image": {"_type": "Image"}}}})}


class ShardFile(Protocol):
    """Format of the files."""

    ending: str

    def write(self, path: Path, samples: Iterable[Sample]) -> Iterator[bytes]:
        """Write samples to a file, and yield the digest of each, while their images are read."""
        ...

    def read(self, path: Path) -> Iterator[bytes]:
        """Yield the digests of the samples in a file, as a reader finds them."""
        ...


def shard_file(format: ShardFormat, several_captions: bool, shapes: dict[str, Shape]) -> ShardFile:
    """Return the format of the files.

    Args:
        format: name of the format.
        several_captions: whether a sample may have several captions.
        shapes: further columns by name: shape of their numbers, or None for texts.
    """
    return Tar() if format is ShardFormat.webdataset else Parquet(several_captions, shapes)


def _digest(key: str, image: bytes | bytearray, about: Any) -> bytes:
    """Return a digest of a sample; `about` is what is stored of its captions and further columns."""
    digest = sha256(json.dumps([key, about]).encode())
    digest.update(image)
    return digest.digest()


class Tar:
    """WebDataset shard."""

    ending = ".tar"

    def write(self, path: Path, samples: Iterable[Sample]) -> Iterator[bytes]:
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
            for sample in samples:
                caption = sample.captions[0]
                further = {"captions": sample.captions} if len(sample.captions) > 1 else {}
                record = {**further, **sample.columns}
                _add(tar, f"{sample.key}.{sample.extension}", sample.image)
                # Readers take away a byte order mark, so one at the start of a caption is doubled.
                _add(tar, f"{sample.key}.txt", f"{BOM if caption.startswith(BOM) else ''}{caption}".encode())
                if record:
                    _add(tar, f"{sample.key}.json", json.dumps(record, ensure_ascii=False).encode())
                yield _digest(sample.key, sample.image, [caption, record])

    def read(self, path: Path) -> Iterator[bytes]:
        # As training reads it, except for the .json, whose list of captions it reads only on request
        reader = ShardReader(path, TableOptions(image_key="jpg", caption_key="txt"))
        with path.open("rb") as file:
            records = {
                member.name.removesuffix(".json"): member for member in members(file) if member.name.endswith(".json")
            }
            for block in reader.blocks():
                names, captions = (block.columns[name].to_pylist() for name in ("image_key", "caption_key"))
                for name, caption, (offset, size) in zip(
                    names, captions, block.numbers["members"].tolist(), strict=True
                ):
                    key = name.partition(".")[0]
                    file.seek(offset)
                    image = file.read(size)
                    record = records.get(key)
                    file.seek(record.offset if record else 0)
                    about = json.loads(file.read(record.size)) if record else {}
                    yield _digest(key, image, [caption, about])


def _add(tar: tarfile.TarFile, name: str, data: bytes | bytearray) -> None:
    header = tarfile.TarInfo(name)  # without time and owner
    header.size = len(data)
    tar.addfile(header, io.BytesIO(data))


class Parquet:
    """Parquet file.

    Args:
        several_captions: whether a sample may have several captions.
        shapes: further columns by name: shape of their numbers, or None for texts.
    """

    ending = ".parquet"

    def __init__(self, several_captions: bool, shapes: dict[str, Shape]) -> None:
        self._several, self._names = several_captions, list(shapes)
        fields = {
            "image": pa.struct({"bytes": pa.binary(), "path": pa.string()}),
            "caption": pa.list_(pa.string()) if several_captions else pa.string(),
            **{name: _type(shape) for name, shape in shapes.items()},
        }
        self._schema = pa.schema(fields, IS_IMAGE)

    def write(self, path: Path, samples: Iterable[Sample]) -> Iterator[bytes]:
        rest = iter(samples)
        with pq.ParquetWriter(path, self._schema) as writer:
            while group := list(islice(rest, ROW_GROUP)):
                rows = [self._row(sample) for sample in group]
                writer.write_table(pa.Table.from_pylist(rows, self._schema))
                yield from map(self._row_digest, rows)

    def read(self, path: Path) -> Iterator[bytes]:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(ROW_GROUP):
                yield from map(self._row_digest, batch.to_pylist())

    def _row(self, sample: Sample) -> dict[str, Any]:
        image = {"bytes": bytes(sample.image), "path": f"{sample.key}.{sample.extension}"}
        return {
            "image": image,
            "caption": sample.captions if self._several else sample.captions[0],
            **sample.columns,
        }

    def _row_digest(self, row: dict[str, Any]) -> bytes:
        return _digest(row["image"]["path"], row["image"]["bytes"], [row["caption"], *(row[n] for n in self._names)])


def _type(shape: Shape) -> pa.DataType:
    if shape is None:
        return pa.string()
    nested = pa.float32()
    for _ in shape:
        nested = pa.list_(nested)
    return nested
