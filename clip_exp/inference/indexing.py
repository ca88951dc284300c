"""An index of images that is made, updated with what is new or changed, and searched."""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from clip_exp.config.data import OnBadImage
from clip_exp.data.files import Stamp, Stored, normal_path, stamps
from clip_exp.errors import ConfigError, DataError
from clip_exp.evaluation.features import require_finite
from clip_exp.inference.features import Encoded
from clip_exp.inference.index import Entries, Recipe, full_path, held, read_entries, stored_path, write_index
from clip_exp.inference.inputs import LeftOut, Picture
from clip_exp.inference.media import Media
from clip_exp.inference.ranking import Match, best_matches

if TYPE_CHECKING:
    from clip_exp.inference.pipeline import Pipeline

SAVE_EVERY_S = 60.0  # what a killed process loses, if saving is fast
SAVE_SHARE = 0.1  # of the time that saving may take


@dataclass
class Update:
    """What was done to an index."""

    total: int = 0  # pictures and videos in it
    new: int = 0
    changed: int = 0
    dropped: int = 0
    left_out: list[LeftOut] = field(default_factory=list)  # that cannot be read

    def __str__(self) -> str:
        counts = {"new": self.new, "changed": self.changed, "dropped": self.dropped, "left out": len(self.left_out)}
        told = ", ".join(f"{count:,} {what}" for what, count in counts.items() if count) or "nothing new"
        return f"{self.total:,} pictures ({told})"


def update_index(
    path: Path,
    recipe: Recipe,
    files: Sequence[str],
    folders: Sequence[str],
    make_clip: Callable[[], "Pipeline"],
    on_bad_image: OnBadImage = OnBadImage.replace,
    what: str | None = None,
) -> Update:
    """Encode what is new or changed among `files`, and save: every minute, and however this ends.

    Args:
        folders: that were searched for `files`: what the index has of them and is gone is dropped. All else stays.
        make_clip: called if there is something to encode.
        what: name of the progress bar; None for none.
    Raises:
        DataError: a picture cannot be read and `on_bad_image` is `error`, or none can.
        ConfigError, CheckpointError: another process changes the index, or it cannot be written.
    """
    with held(path):
        shelf = _Shelf(path, recipe, folders)
        missing = shelf.missing(files)
        todo = list(missing)
        try:
            if todo:
                for encoded in make_clip().encode_each(Media(todo, recipe.frames), on_bad_image, what):
                    file = todo[encoded.item]
                    shelf.add(stored_path(file, path.parent), missing[file], file, encoded)
        finally:
            shelf.save()
        if not shelf.update.total:
            first = shelf.update.left_out[0]
            raise DataError(
                f"none of the {len(files)} pictures can be read; the first: {first.path}: {first.reason}. The index is not written."
            )
        return shelf.update


class _Shelf:
    """The contents of an index while it grows."""

    def __init__(self, path: Path, recipe: Recipe, folders: Sequence[str]) -> None:
        self.path, self.recipe, self.update = path, recipe, Update()
        self.old = read_entries(path) if path.exists() else None
        self.rows = {name: row for row, name in enumerate(self.old.paths)} if self.old else {}  # of `old` that stay
        self.fresh: dict[str, tuple[Stamp, Tensor]] = {}
        self.searched = [os.path.join(normal_path(folder), "") for folder in folders]
        self.unsaved = False
        self.next_save = time.monotonic() + SAVE_EVERY_S
        self.update.total = len(self.rows)

    def missing(self, files: Sequence[str]) -> dict[str, Stamp]:
        """The files that are to be encoded, each with its stamp; entries of searched folders that are not among the files are dropped.

        A stamp is of before the file is read: a change after it is found next time. An entry whose file cannot be reached stays: its
        disk may be back tomorrow.
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
        now = stamps([Stored(file) for file in reachable_or_new.values()])
        return {
            file: stamp
            for (name, file), stamp in zip(reachable_or_new.items(), now, strict=True)
            if self._stamp(name) != stamp
        }

    def _stamp(self, name: str) -> Stamp | None:
        if self.old is None or (row := self.rows.get(name)) is None:
            return None
        return Stamp(int(self.old.size[row]), int(self.old.mtime_ns[row]), int(self.old.sample[row]))

    def add(self, name: str, stamp: Stamp, file: str, encoded: Encoded) -> None:
        """Take in a picture, or note that it cannot be read; save if it is time."""
        known = self.rows.pop(name, None) is not None
        if encoded.features is None:
            self.update.left_out.append(LeftOut(file, encoded.reason))
            self.update.dropped += known
            self.unsaved |= known
        else:
            self.fresh[name] = stamp, encoded.features
            self.update.changed += known
            self.update.new += not known
            self.unsaved = True
        if time.monotonic() >= self.next_save:
            self.save()

    def save(self) -> None:
        """Write what there is, if anything changed."""
        self.update.total = len(self.rows) + len(self.fresh)
        if not self.unsaved or not self.update.total:
            return
        started = time.monotonic()
        write_index(self.path, self.recipe, self._merged())
        self.unsaved = False
        took_s = time.monotonic() - started
        self.next_save = time.monotonic() + max(SAVE_EVERY_S, took_s / SAVE_SHARE)

    def _merged(self) -> Entries:
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
        return Entries([names[position] for position in order], *columns)


class PictureIndex:
    """Made by `Pipeline.index`, or `clip-exp search`. Its features stay in the file, which is mapped into memory.

    Args:
        path: of the file.
        clip: the model that made it.
    """

    def __init__(self, path: Path, clip: "Pipeline") -> None:
        self.path, self.clip = path, clip
        self._entries = read_entries(path)

    def __len__(self) -> int:
        return len(self._entries.paths)

    @property
    def paths(self) -> list[str]:
        """Of the pictures and videos, sorted; relative to the current folder where they are below it."""
        return [self._shown(index) for index in range(len(self))]

    def search(self, text: str | None = None, *, image: Picture | None = None, top: int = 10) -> list[Match]:
        """The pictures that fit a text, or are most like a picture or video: by exact cosine, best first.

        Raises:
            ConfigError: not exactly one of text and image, or `top` is below 1.
            DataError: the picture cannot be read.
            NumericError: features or scores are not finite.
        """
        if (text is None) == (image is None) or top < 1:
            raise ConfigError('give a text or a picture, and a top above 0: search("two dogs"), search(image="a.jpg").')
        query = self.clip.encode_text(text) if text is not None else self.clip.encode_image(image)  # type: ignore[arg-type]
        require_finite(query, "features of the query")
        ranked = best_matches(self._entries.features, query[0], top)
        return [Match(self._shown(index), score, index) for index, score in ranked]

    def _shown(self, index: int) -> str:
        return stored_path(full_path(self._entries.paths[index], self.path.parent), Path.cwd())
