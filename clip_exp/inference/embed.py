"""Command `clip-exp embed`: features of images and captions in numbered files. All inputs are checked without torch."""

import hashlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from clip_exp.config.base import plain, typed_keys
from clip_exp.config.base import problems as broken
from clip_exp.config.commands import EmbedConfig, EmbedFormat
from clip_exp.data.image_sets import ImageFiles, TableImages
from clip_exp.data.manifest import LEFT_OUT, Manifest, Part, check_folder, open_manifest, unwritable
from clip_exp.data.tables.table import PairTable
from clip_exp.errors import PREEMPTED_EXIT_CODE, ConfigError, DataError, Problems
from clip_exp.evaluation.sets.datasets import read_pairs, require_tables
from clip_exp.inference.feature_files import Features, Layout
from clip_exp.inference.inputs import LeftOut, find_images, is_video, warn_left_out, warn_truncated
from clip_exp.loading import ModelSource, check_source, find_source
from clip_exp.progress import progress
from clip_exp.ranks.failure import Stopped, stop_on_signals

if TYPE_CHECKING:
    from clip_exp.evaluation.features import EncodedImages


def embed(config: EmbedConfig, arguments: Sequence[str] = ()) -> int:
    """Write the features of the images and captions that are not written yet; return the exit code.

    Args:
        arguments: arguments of the command line; each of their keys must have an effect.

    Raises:
        ClipExpError: paths or names are invalid, with a line per problem, before the model is loaded; an image cannot be read
            and `on_bad_image` is `error`; or the folder cannot be written.
    """
    problems, checked, inputs, folder = Problems(), None, None, Path()
    problems.add(*broken(config, typed_keys(arguments)))
    with problems:
        folder = check_folder(config.output)
    with problems:
        checked = check_source(config)
    with problems:
        inputs = _open_inputs(config)
    problems.raise_if_any()
    assert inputs is not None
    source = checked or find_source(config)
    count = -(-len(inputs) // config.rows_per_file)
    layout = Layout(config.format, count, inputs.table is not None, config.datacomp_name)
    try:
        with stop_on_signals(), open_manifest(folder, _about(config, source, inputs), layout.subfolders) as manifest:
            _write_missing(config, source, inputs, layout, manifest)
            with unwritable(folder):
                manifest.list_left_out()
    except Stopped as stopped:
        print(f"{stopped} The same command continues from what is finished in {folder}.", file=sys.stderr, flush=True)
        return PREEMPTED_EXIT_CODE
    warn_left_out([LeftOut(path, reason) for path, reason, _ in manifest.left_out], inputs.images)
    if not manifest.rows:
        path, reason, _ = manifest.left_out[0]
        raise DataError(f"none of the {inputs.images:,} images can be read; the first: {path}: {reason}.")
    print(f"written: {folder} ({manifest.rows:,} rows, {config.rows_per_file:,} per file)")
    if manifest.left_out:
        print(f"left out: {len(manifest.left_out):,} images, listed in {folder / LEFT_OUT}")
    return 0


class Rows(NamedTuple):
    """Consecutive rows of the input, and their distinct images."""

    numbers: range
    image: np.ndarray  # int64 [rows]: position of the image of each row in `sources`
    sources: np.ndarray  # int64 [images]: a row with each image


@dataclass(frozen=True)
class Inputs:
    """Rows to encode: pairs of a table, or images without captions."""

    paths: list[str]  # images without a table
    table: PairTable | None = None
    outside_root: bool = False  # see `ImageLimits`

    def __len__(self) -> int:
        return len(self.paths) if self.table is None else len(self.table)

    @property
    def images(self) -> int:
        """Number of distinct images."""
        return len(self.paths) if self.table is None else self.table.images

    @cached_property
    def _image_of_row(self) -> np.ndarray:
        return np.arange(len(self)) if self.table is None else self.table.image_index()

    def rows(self, start: int, end: int) -> Rows:
        """Return the rows of a part. An image that several of them have is encoded once."""
        end = min(end, len(self))
        _, first, image = np.unique(self._image_of_row[start:end], return_index=True, return_inverse=True)
        return Rows(range(start, end), image, start + first)

    def image_set(self, rows: np.ndarray) -> ImageFiles | TableImages:
        """Return the images of rows."""
        if self.table is None:
            return ImageFiles([self.paths[row] for row in rows.tolist()])
        return TableImages(self.table, rows, self.outside_root)  # type: ignore[arg-type]

    def key(self, row: int) -> str:
        """Return the key of a sample in a shard, without its extension, or the path as written in the table."""
        if self.table is None:
            return self.paths[row]
        path = self.table.path(row)
        if self.table.members is None:
            return path
        name = PurePosixPath(path)
        return str(name.with_name(name.name.partition(".")[0]))

    def path(self, row: int) -> str:
        """Return the path of an image on disk; in a shard, `<shard>/<member>`."""
        return self.paths[row] if self.table is None else self.table.image_path(row)

    def where(self, row: int) -> str:
        """Return the file and line of a row; empty without a table."""
        return "" if self.table is None else self.table.where(row)

    def fingerprint(self) -> dict[str, Any]:
        """Return JSON values that change with the rows, by the words in which a message names them."""
        if self.table is not None:
            return self.table.fingerprint()
        names = "\0".join(self.paths).encode(errors="surrogateescape")
        return {"images": {"number": len(self.paths), "sha256": hashlib.sha256(names).hexdigest()}}


def _open_inputs(config: EmbedConfig) -> Inputs:
    """Find the images, or read the table.

    Raises:
        ConfigError: not exactly one of `images` and `table` is given, a file does not exist, or a file is a video.
        DataError: the table cannot be read.
    """
    if (config.images is None) == (config.table is None):
        raise ConfigError("give exactly one of images and table: images=DIR, or table=pairs.csv.")
    if config.table is not None:
        require_tables(config.table, "")
        table = read_pairs(config.table, "", config, caption_key=config.caption_key, columns=config.columns)
        return Inputs([], table, config.allow_outside_root)
    paths = find_images(config.images)
    if videos := [path for path in paths if is_video(path)]:
        raise ConfigError(
            f"{len(videos)} of the {len(paths)} files are videos ({videos[0]}), and embed reads images only: leave them out by a glob "
            "('images=photos/**/*.jpg')."
        )
    return Inputs(paths)


def _about(config: EmbedConfig, source: ModelSource, inputs: Inputs) -> dict[str, Any]:
    """Return what determines the features and their files."""
    settings = {
        name: plain(getattr(config, name))
        for name in (
            "format", "dtype", "similarity", "rows_per_file", "datacomp_name", "columns", "precision", "max_image_pixels",
        )
    }  # fmt: skip
    model = {"the model": {**plain(source.model), "weights_sha256": source.sha256()}}
    return {**inputs.fingerprint(), **model, **settings}


def _write_missing(
    config: EmbedConfig, source: ModelSource, inputs: Inputs, layout: Layout, manifest: Manifest
) -> None:
    """Encode and write the parts that are not finished, or whose images have changed since."""
    starts = range(0, len(inputs), config.rows_per_file)
    parts = {number: inputs.rows(start, start + config.rows_per_file) for number, start in enumerate(starts)}
    signatures = {}
    with progress(len(inputs), "checking for changed images") as advance:
        for number, rows in parts.items():
            signatures[number] = inputs.image_set(rows.sources).fingerprint()
            advance(len(rows.numbers))
    missing = {
        number: rows
        for number, rows in parts.items()
        if number not in manifest.finished or manifest.finished[number].inputs != signatures[number]
    }
    if not missing:
        return
    # Torch takes seconds to import, so it is imported only after the checks.
    from clip_exp.data.loader import report_killed_workers
    from clip_exp.evaluation.evaluated_model import EvaluatedModel
    from clip_exp.evaluation.features import encode_blocks, encode_options
    from clip_exp.loading import load_model
    from clip_exp.text.tokenizer import build_tokenizer

    options = encode_options(config, source)
    tokenizer = build_tokenizer(source.model.text)
    model = EvaluatedModel(load_model(source, options.device), tokenizer, source.model, options)
    images = inputs.image_set(np.concatenate([rows.sources for rows in missing.values()]))
    blocks: dict[int, range] = {}
    for number, rows in missing.items():
        start = next(reversed(blocks.values())).stop if blocks else 0
        blocks[number] = range(start, start + len(rows.sources))
    with report_killed_workers("num_workers"), progress(len(images), f"{len(images):,} images") as advance:
        for number, encoded in encode_blocks(model.image_encoder(), images, options, blocks, advance):
            rows = parts[number]
            left_out = _left_out(encoded, blocks[number], rows, inputs)
            features = _features(config, model, inputs, rows, blocks[number].start, encoded)
            with unwritable(manifest.folder):
                files = layout.write(manifest.folder, number, features)
                manifest.add(Part(number, files, len(features.keys), signatures[number], left_out))
    warn_truncated(tokenizer.truncated, source.model.text.context_length)


def _left_out(encoded: "EncodedImages", block: range, rows: Rows, inputs: Inputs) -> list[tuple[str, str, str]]:
    """Return path, reason and location of each image of a block that cannot be read."""
    missing = sorted({*block} - {*encoded.kept.tolist()})
    found = []
    for position, bad in zip(missing, encoded.bad, strict=True):
        row = int(rows.sources[position - block.start])
        path = inputs.path(row)
        found.append((path, bad.removeprefix(f"{path}: "), inputs.where(row)))
    return found


def _features(
    config: EmbedConfig, model: Any, inputs: Inputs, rows: Rows, first: int, encoded: "EncodedImages"
) -> Features:
    """Return the features of the rows whose images can be read.

    Args:
        first: position of the first image of these rows, as in `encoded.kept`.
    """
    from clip_exp.evaluation.features import encode_texts, require_finite

    require_finite(encoded.features, "image features")
    kept = encoded.kept.numpy() - first
    good = np.isin(rows.image, kept)
    numbers = [row for row, is_good in zip(rows.numbers, good.tolist(), strict=True) if is_good]
    image = encoded.features.numpy()[np.searchsorted(kept, rows.image[good])]
    keys, paths = [inputs.key(row) for row in numbers], [inputs.path(row) for row in numbers]
    table = inputs.table
    if table is None or not numbers:
        return Features(keys, paths, image.astype(config.dtype))
    captions = [table.caption(row) for row in numbers]
    texts = encode_texts(model.model, model.tokenizer, captions, device=model.options.device).cpu()
    require_finite(texts, "text features")
    text = texts.numpy()
    scored = config.similarity or config.format is EmbedFormat.datacomp
    return Features(
        keys,
        paths,
        image.astype(config.dtype),
        captions,
        text.astype(config.dtype),
        (image * text).sum(axis=1) if scored else None,
        {name: [table.json_column(name, row) for row in numbers] for name in config.columns},
    )
