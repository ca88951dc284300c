"""Which format a table has: by the end of its name, which its first bytes must not contradict."""

from pathlib import Path

from clip_exp.data.tables.delimited import DelimitedReader
from clip_exp.data.tables.jsonl import JsonLinesReader
from clip_exp.data.tables.parquet import ParquetReader
from clip_exp.data.tables.reader import Reader, TableOptions
from clip_exp.data.tables.shards import ShardReader
from clip_exp.errors import ConfigError

JSON_LINES = (".jsonl", ".ndjson", ".json")
PARQUET = (".parquet", ".pq")
SHARD = (".tar",)
_HEAD = 512  # bytes
_COMPRESSED = {
    ".gz": "gunzip",
    ".tgz": "gunzip",
    ".zst": "unzstd",
    ".bz2": "bunzip2",
    ".xz": "unxz",
    ".zip": "unzip",
    ".lz4": "unlz4",
}
_OTHERS = {
    ".xlsx": "an Excel workbook",
    ".xls": "an Excel workbook",
    ".ods": "a spreadsheet",
    ".feather": "an Arrow file",
    ".arrow": "an Arrow file",
    ".orc": "an ORC file",
    ".avro": "an Avro file",
    ".h5": "an HDF5 file",
    ".hdf5": "an HDF5 file",
    ".npy": "a NumPy array",
    ".npz": "a NumPy archive",
    ".pkl": "a pickle, which is never opened",
    ".pickle": "a pickle, which is never opened",
    ".pt": "a pickle, which is never opened",
    ".tfrecord": "a TensorFlow record",
    ".sqlite": "a database",
    ".db": "a database",
}
_MAGIC = {
    b"PAR1": "Parquet",
    b"\x1f\x8b": "compressed by gzip (decompress it: gunzip)",
    b"\x28\xb5\x2f\xfd": "compressed by zstd (decompress it: unzstd)",
    b"BZh": "compressed by bzip2 (decompress it: bunzip2)",
    b"\xfd7zXZ\0": "compressed by xz (decompress it: unxz)",
    b"PK\x03\x04": "a ZIP archive or an Excel workbook",
    b"ARROW1": "an Arrow file",
    b"\x89HDF": "an HDF5 file",
    b"\x93NUMPY": "a NumPy array",
    b"SQLite format 3": "a database",
    b"\xff\xd8\xff": "a JPEG picture",
    b"\x89PNG": "a PNG picture",
    b"%PDF": "a PDF",
    b"version https://git-lfs": "a pointer of Git LFS (fetch the file itself: git lfs pull)",
}
_NAMED = {"Parquet": PARQUET, "a tar": SHARD}  # formats that are read, by what the first bytes say


def open_reader(file: Path, options: TableOptions) -> Reader:
    """The reader of a file: .jsonl .ndjson .json, .parquet .pq, .tar; anything else is delimited text.

    Raises: ConfigError for a compressed file, for a format that is not read, and for a name that its content contradicts.
    """
    check_format(file)
    suffix = file.suffix.lower()
    if suffix in JSON_LINES:
        return JsonLinesReader(file, options)
    if suffix in PARQUET:
        return ParquetReader(file, options)
    if suffix in SHARD:
        return ShardReader(file, options)
    return DelimitedReader(file, options)


def check_format(file: Path) -> None:
    """Raises ConfigError for a file that no reader reads, whether by its name or by its first bytes."""
    suffix = file.suffix.lower()
    if suffix in _COMPRESSED:
        raise ConfigError(
            f"{file} is compressed, so rows cannot be found in it: decompress it ({_COMPRESSED[suffix]} {file})."
        )
    if suffix in _OTHERS:
        raise ConfigError(f"{file} is {_OTHERS[suffix]}: write it as CSV, JSON Lines or Parquet.")
    try:
        with open(file, "rb") as stream:
            content = _content(stream.read(_HEAD))
    except OSError as error:
        raise ConfigError(f"The table {file} cannot be read: {error.strerror or error}.") from error
    if content is None or suffix in _NAMED.get(content, ()):
        return
    fix = (
        f"rename it to {file.stem}{_NAMED[content][0]}"
        if content in _NAMED
        else "give a CSV, JSON Lines or Parquet file or a shard"
    )
    raise ConfigError(f"{file} is named like {_named_like(suffix)}, but is {content}: {fix}.")


def _content(head: bytes) -> str | None:
    """What the first bytes tell of a file; None where they tell nothing, as of text."""
    if head[257:262] == b"ustar":
        return "a tar"
    return next((what for magic, what in _MAGIC.items() if head.startswith(magic)), None)


def _named_like(suffix: str) -> str:
    kinds = {"JSON Lines": JSON_LINES, "Parquet": PARQUET, "a shard": SHARD}
    return next((kind for kind, suffixes in kinds.items() if suffix in suffixes), "text")
