"""Index of images: a safetensors file with their features, paths and file signatures, and the model that computed the features.

Tensors: `features` float32 [N, D] of unit norm, `size` int64 [N] in bytes, `mtime_ns` int64 [N], `sample` int64 [N], a hash of a part
of the content (`data.files`), and `paths`, the bytes of the paths, separated by NUL. Rows are sorted by path. Metadata:
`clip_exp.index`, JSON of a `Recipe`. Paths of images in the folder of the index are relative to it, so that both can be moved together.
"""

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from safetensors import SafetensorError, safe_open

from clip_exp.config.base import parse, plain
from clip_exp.config.evaluation import EvalOnBadImage
from clip_exp.config.model import ModelConfig
from clip_exp.data.files import ImageSignature, Stored, image_signatures, normal_path
from clip_exp.errors import CheckpointError, ConfigError, DataError
from clip_exp.inference.inputs import ImageInput, LeftOut
from clip_exp.loading import Mix, ModelSource
from clip_exp.storage import InUse, atomic_file, lock, remove_leftovers

if TYPE_CHECKING:
    from torch import Tensor

    from clip_exp.inference.features import Encoded, Match
    from clip_exp.inference.pipeline import Pipeline

KEY, VERSION = "clip_exp.index", 2


@dataclass(frozen=True)
class Recipe:
    """Model and settings that determine the features of an index."""

    weights_sha256: str
    weights: str  # absolute path of the file
    model: dict[str, Any]  # configuration of the model, with the preprocessing of images
    precision: str
    frames: int  # frames per video
    version: int = VERSION
    mix: dict[str, Any] | None = None  # weights that these are interpolated with
    prefix: str | None = None  # prefix of the weights in the file

    @property
    def source(self) -> ModelSource:
        """Model that created the index."""
        model = parse(ModelConfig, self.model, "model.")
        return ModelSource(model, Path(self.weights), mix=Mix(**self.mix) if self.mix else None, prefix=self.prefix)


class Entries(NamedTuple):
    """Contents of an index, sorted by path."""

    paths: list[str]  # as returned by `stored_path`
    size: "Tensor"  # int64 [N], bytes
    mtime_ns: "Tensor"  # int64 [N]
    sample: "Tensor"  # int64 [N], hash of a part of the content
    features: "Tensor"  # float32 [N, D] of unit norm; mapped from the file, not read


def recipe_of(source: ModelSource, precision: str, frames: int) -> Recipe:
    """Return the recipe of an index for a model. May read the weights to compute their hash."""
    mix = asdict(source.mix) if source.mix else None
    weights = str(source.weights.resolve())
    return Recipe(source.sha256(), weights, plain(source.model), precision, frames, mix=mix, prefix=source.prefix)


def read_recipe(path: Path) -> Recipe:
    """Return the recipe of an index. Does not import torch.

    Raises:
        CheckpointError: the file is not an index, is damaged, or is from another version.
    """
    try:
        with safe_open(path, framework="np") as file:
            values = json.loads((file.metadata() or {})[KEY])
    except (OSError, SafetensorError, KeyError) as error:
        reason = getattr(error, "strerror", None) or "not an index, or damaged"
        raise CheckpointError(
            f"index={path} cannot be used: {reason}. Use another file, or create the index again."
        ) from None
    if values["version"] != VERSION:
        raise CheckpointError(f"index={path} was created by another version of clip_exp: create it again.")
    recipe = Recipe(**values)
    try:
        parse(ModelConfig, recipe.model, "model.")
    except ConfigError as error:
        raise CheckpointError(
            f"index={path} was created by another version of clip_exp, whose models have other keys: create it again.\n{error}"
        ) from None
    return recipe


def check_same_model(path: Path, before: Recipe, requested: Recipe) -> None:
    """Check that an index and the requested model have comparable features.

    Raises:
        CheckpointError: the index was created by another model, or by other weights.
    """
    if before.weights_sha256 == requested.weights_sha256 and before.source.model == requested.source.model:
        return
    models = [
        f"{recipe.model['name']} with {recipe.weights} (sha256 {recipe.weights_sha256[:12]}…)"
        for recipe in (before, requested)
    ]
    same = "" if before.weights_sha256 != requested.weights_sha256 else " with other settings"
    raise CheckpointError(
        f"index={path} was created by {models[0]}, not by {models[1]}{same}: their features cannot be compared. "
        "Leave out the model to use that of the index, or give another index."
    )


def read_entries(path: Path) -> Entries:
    """Return the contents of an index; later changes of the file do not affect them."""
    with safe_open(path, framework="pt") as file:
        names = bytes(file.get_tensor("paths").numpy())
        columns = [file.get_tensor(name) for name in Entries._fields[1:]]
    return Entries([os.fsdecode(name) for name in names.split(b"\0")] if names else [], *columns)


def write_index(path: Path, recipe: Recipe, entries: Entries) -> None:
    """Write an index atomically; equal contents give equal bytes. The caller must hold the lock (`held`).

    Raises:
        CheckpointError: the disk is full, or the folder cannot be written.
    """
    import torch
    from safetensors.torch import save_file

    names = b"\0".join(map(os.fsencode, entries.paths))
    tensors = {
        **entries._asdict(),
        "paths": torch.frombuffer(bytearray(names), dtype=torch.uint8),
        "features": entries.features.contiguous(),
    }
    try:
        with atomic_file(path) as temporary:
            save_file(tensors, temporary, {KEY: json.dumps(asdict(recipe), sort_keys=True)})
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"index={path} cannot be written: {getattr(error, 'strerror', None) or error}."
        ) from error


@contextmanager
def held(path: Path) -> Iterator[None]:
    """Lock an index against changes by other processes; reading needs no lock. The lock ends with the process.

    If the file system has no locks, the last of several concurrent changes wins.

    Raises:
        ConfigError: another process has the lock.
        CheckpointError: the folder cannot be written.
    """
    with ExitStack() as stack:
        try:
            alone = stack.enter_context(lock(path.with_name(f".{path.name}.lock"), remove=True))
        except InUse as error:
            raise ConfigError(f"index={path} is being changed by {error.owner}: wait for it.") from None
        except OSError as error:
            raise CheckpointError(f"index={path} cannot be written: {error.strerror}.") from error
        if alone:
            remove_leftovers(path)
        yield


def stored_path(path: str | Path, folder: str | Path) -> str:
    """Return a path relative to `folder` if it is inside, else an absolute path."""
    absolute, base = normal_path(str(path)), os.path.join(normal_path(str(folder)), "")
    return absolute.removeprefix(base)


def full_path(stored: str, folder: str | Path) -> str:
    """Return the absolute path of an entry of an index in `folder`."""
    return os.path.join(normal_path(str(folder)), stored)


# Creating, updating and searching an index.

SAVE_EVERY_S = 60.0  # work that a killed process loses at most, if saving is fast
SAVE_FRACTION = 0.1  # largest fraction of the time for saving


@dataclass
class Update:
    """Changes of an index by an update."""

    total: int = 0  # images and videos in the index
    new: int = 0
    changed: int = 0
    dropped: int = 0
    left_out: list[LeftOut] = field(default_factory=list)  # unreadable images

    def __str__(self) -> str:
        counts = {"new": self.new, "changed": self.changed, "dropped": self.dropped, "left out": len(self.left_out)}
        shown = ", ".join(f"{count:,} {what}" for what, count in counts.items() if count) or "nothing new"
        return f"{self.total:,} images ({shown})"


def update_index(
    path: Path,
    recipe: Recipe,
    files: Sequence[str],
    folders: Sequence[str],
    make_clip: Callable[[], "Pipeline"],
    on_bad_image: EvalOnBadImage = EvalOnBadImage.skip,
    what: str | None = None,
) -> Update:
    """Encode new and changed files and save the index: every minute, and at the end, also after an error.

    Args:
        path: path of the index.
        recipe: model and settings of the index.
        files: images and videos to index.
        folders: folders that were searched for `files`. Entries in these folders that are not in `files` are dropped; other entries
            remain.
        make_clip: function that returns the model, called only if there are files to encode.
        on_bad_image: policy for unreadable images.
        what: name of the progress bar; None: no progress bar.

    Raises:
        DataError: an image cannot be read and `on_bad_image` is `error`, or none can.
        ConfigError, CheckpointError: another process changes the index, or it cannot be written.
    """
    from clip_exp.inference.media import Media  # imports torch

    with held(path):
        contents = _Contents(path, recipe, folders)
        missing = contents.missing(files)
        todo = list(missing)
        try:
            if todo:
                for encoded in make_clip().encode_each(Media(todo, recipe.frames), on_bad_image, what):
                    file = todo[encoded.item]
                    contents.add(stored_path(file, path.parent), missing[file], file, encoded)
        finally:
            contents.save()
        if not contents.update.total:
            first = contents.update.left_out[0]
            raise DataError(
                f"none of the {len(files)} images can be read; the first: {first.path}: {first.reason}. The index is not written."
            )
        return contents.update


class _Contents:
    """Contents of an index during an update."""

    def __init__(self, path: Path, recipe: Recipe, folders: Sequence[str]) -> None:
        self.path, self.recipe = path, recipe
        self.old = read_entries(path) if path.exists() else None
        self.rows = (
            {name: row for row, name in enumerate(self.old.paths)} if self.old else {}
        )  # rows of `old` that remain
        self.fresh: dict[str, tuple[ImageSignature, Tensor]] = {}
        self.searched = [os.path.join(normal_path(folder), "") for folder in folders]
        self.unsaved = False
        self.next_save = time.monotonic() + SAVE_EVERY_S
        self.update = Update(total=len(self.rows))

    def missing(self, files: Sequence[str]) -> dict[str, ImageSignature]:
        """Return the files to encode with their signatures; drop entries of searched folders that are not in `files`.

        The signature is taken before the file is read, so the next update detects a later change. An entry whose file is not
        reachable remains: its disk may be mounted again.
        """
        given = {stored_path(file, self.path.parent): file for file in files}
        gone = [
            name
            for name in self.rows.keys() - given.keys()
            if full_path(name, self.path.parent).startswith(tuple(self.searched))
        ]
        for name in gone:
            del self.rows[name]
        self.update.dropped = len(gone)
        self.unsaved = bool(gone)
        reachable_or_new = {name: file for name, file in given.items() if name not in self.rows or os.path.exists(file)}
        now = image_signatures([Stored(file) for file in reachable_or_new.values()])
        missing = {}
        for (name, file), signature in zip(reachable_or_new.items(), now, strict=True):
            old, row = self.old, self.rows.get(name)
            if (
                old is None
                or row is None
                or signature != (int(old.size[row]), int(old.mtime_ns[row]), int(old.sample[row]))
            ):
                missing[file] = signature
        return missing

    def add(self, name: str, signature: ImageSignature, file: str, encoded: "Encoded") -> None:
        """Add an image, or record that it cannot be read; save if the last time was too long ago."""
        known = self.rows.pop(name, None) is not None
        if encoded.features is None:
            self.update.left_out.append(LeftOut(file, encoded.reason))
            self.update.dropped += known
            self.unsaved |= known
        else:
            self.fresh[name] = signature, encoded.features
            self.update.changed += known
            self.update.new += not known
            self.unsaved = True
        if time.monotonic() >= self.next_save:
            self.save()

    def save(self) -> None:
        """Write the index if it has changed."""
        import torch

        self.update.total = len(self.rows) + len(self.fresh)
        if not self.unsaved or not self.update.total:
            return
        started = time.monotonic()
        names: list[str] = []
        parts: list[tuple[Tensor, ...]] = []  # the columns of `Entries` after the paths
        if self.old is not None and self.rows:
            rows = torch.tensor(list(self.rows.values()))
            names += self.rows
            parts.append(tuple(column[rows] for column in self.old[1:]))
        if self.fresh:
            found, features = zip(*self.fresh.values(), strict=True)
            names += self.fresh
            parts.append((*torch.tensor(found, dtype=torch.int64).T, torch.stack(features)))
        order = sorted(range(len(names)), key=names.__getitem__)
        columns = [torch.cat(column)[order] for column in zip(*parts, strict=True)]
        write_index(self.path, self.recipe, Entries([names[position] for position in order], *columns))
        self.unsaved = False
        took_s = time.monotonic() - started
        self.next_save = time.monotonic() + max(SAVE_EVERY_S, took_s / SAVE_FRACTION)


class ImageIndex:
    """Searchable index of images, created by `Pipeline.index` or `clip-exp search`. The features are mapped from the file.

    Args:
        path: path of the index file.
        clip: model that created the index.
    """

    def __init__(self, path: Path, clip: "Pipeline") -> None:
        self.path, self.clip = path, clip
        self._entries = read_entries(path)

    def __len__(self) -> int:
        return len(self._entries.paths)

    @property
    def paths(self) -> list[str]:
        """Sorted paths of the images and videos; those in the current folder are relative to it."""
        return [self._shown(index) for index in range(len(self))]

    def search(self, text: str | None = None, *, image: ImageInput | None = None, top_k: int = 10) -> "list[Match]":
        """Return the images with the highest cosine similarity to a text, image or video, best first.

        Args:
            text: text query; exactly one of `text` and `image`.
            image: image or video query.
            top_k: number of images to return.

        Raises:
            ConfigError: not exactly one of `text` and `image` is given, or `top_k` is below 1.
            DataError: the image cannot be read.
            NumericError: features or scores are not finite.
        """
        from clip_exp.evaluation.features import require_finite  # imports torch
        from clip_exp.inference.features import Match, best_matches

        if (text is None) == (image is None) or top_k < 1:
            raise ConfigError(
                'give either a text or an image, and top_k above 0: search("two dogs"), search(image="a.jpg").'
            )
        query = self.clip.encode_text(text) if text is not None else self.clip.encode_image(image)  # type: ignore[arg-type]
        require_finite(query, "features of the query")
        ranked = best_matches(self._entries.features, query[0], top_k)
        return [Match(self._shown(index), score, index) for index, score in ranked]

    def _shown(self, index: int) -> str:
        return stored_path(full_path(self._entries.paths[index], self.path.parent), Path.cwd())
