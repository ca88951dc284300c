"""Inputs of the commands: paths of images and videos, texts, and class names. Does not import torch."""

import glob
import importlib.util
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from clip_exp.config.evaluation import EvalOnBadImage
from clip_exp.data.files import normal_path
from clip_exp.data.tables.columns import BLANKS
from clip_exp.errors import ConfigError, DataError
from clip_exp.evaluation.sets.class_names import imagenet_classes, read_lines
from clip_exp.evaluation.sets.labeled import IMAGE_SUFFIXES

log = logging.getLogger(__name__)
VIDEO_SUFFIXES = frozenset(
    (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".wmv", ".flv", ".mts", ".m2ts", ".3gp", ".ogv")
)
MEDIA_SUFFIXES = IMAGE_SUFFIXES | VIDEO_SUFFIXES
ImageInput = str | Path | Image.Image
FRAMES = 8  # default number of frames per video
LISTED_LEFT_OUT = 20  # most unreadable images that a warning lists
LISTED = 5  # most missing paths that an error lists


class LeftOut(NamedTuple):
    """Unreadable image or video."""

    path: str
    reason: str


def is_video(item: ImageInput) -> bool:
    """Return True if a path has the suffix of a video."""
    return not isinstance(item, Image.Image) and Path(item).suffix.lower() in VIDEO_SUFFIXES


def can_decode_videos() -> bool:
    """Return True if PyAV is installed."""
    return importlib.util.find_spec("av") is not None


def find_images(images: Any, where: str = "images") -> list[str]:
    """Return the distinct paths of images and videos, in the given order, sorted within a folder or glob.

    Args:
        images: a file, a folder (with its subfolders; hidden folders and other files are ignored), a glob
            (`photos/**/*.jpg`), or a list of these.
        where: configuration key, for messages.

    Raises:
        ConfigError: nothing is given, or files or folders do not exist; a line each.
        DataError: a folder contains no images.
    """
    entries = list(images) if isinstance(images, list | tuple) else [images]
    if images is None or not entries:
        raise ConfigError(f"{where} has no value: give a file, a folder, a glob, or a list of these.")
    found: dict[str, str] = {}
    missing = []
    for entry in map(str, entries):
        try:
            for path in _expand(entry, where):
                found.setdefault(normal_path(path), path)
        except ConfigError as error:
            missing.append(str(error))
    if missing:
        more = [f"{where}: {len(missing) - LISTED} more are missing."] if len(missing) > LISTED else []
        raise ConfigError("\n".join(missing[:LISTED] + more))
    return list(found.values())


def folders_of(images: Any) -> list[str]:
    """Return the folders in the argument of `find_images`."""
    entries = images if isinstance(images, list | tuple) else [] if images is None else [images]
    paths = [Path(str(entry)).expanduser() for entry in entries]
    return [str(path) for path in paths if path.is_dir()]


def check_videos(paths: list[str], on_bad_image: EvalOnBadImage) -> None:
    """Check that videos can be decoded or skipped.

    Raises:
        ConfigError: there are videos, PyAV is not installed, and `on_bad_image` is `error`.
    """
    videos = [path for path in paths if is_video(path)]
    if videos and on_bad_image is EvalOnBadImage.error and not can_decode_videos():
        raise ConfigError(
            f"{len(videos)} of the {len(paths)} files are videos ({videos[0]}), which need PyAV: pip install av. "
            "To leave them out: on_bad_image=skip."
        )


def warn_left_out(left_out: list[LeftOut], given: int) -> None:
    """Log one warning with the number of unreadable images and the reasons."""
    if left_out:
        lines = [f"  {path}: {reason}" for path, reason in left_out[:LISTED_LEFT_OUT]]
        more = [f"  and {len(left_out) - LISTED_LEFT_OUT:,} more"] if len(left_out) > LISTED_LEFT_OUT else []
        count = f"left out {len(left_out):,} of {given:,} images, which cannot be read:"
        log.warning("\n".join([count, *lines, *more]))


def warn_truncated(truncated: int, context_length: int) -> None:
    """Log one warning with the number of texts that were truncated, if there are any."""
    if truncated:
        log.warning(
            "%d texts are longer than the context length of %d tokens and were truncated.", truncated, context_length
        )


def as_texts(value: Any, where: str) -> list[str]:
    """Return one text or a list of texts as a list. Numbers, booleans and null of YAML are converted to text.

    Raises:
        ConfigError: the value is missing, has an empty text, or is not a text or list of texts.
    """
    texts = value if isinstance(value, list) else [value]
    if value is None or not texts:
        raise ConfigError(f"{where} has no value: give a text, or a list: '{where}=[a dog,a cat]'.")
    if any(isinstance(text, dict | list) for text in texts):
        raise ConfigError(
            f"{where} must be a list of texts. Put texts with special characters in quotes: {where}=[\"a {{}}\",'a [dog]']."
        )
    written = [str(text).lower() if isinstance(text, bool) else "null" if text is None else str(text) for text in texts]
    if not all(text.strip() for text in written):
        raise ConfigError(f"{where} has an empty text.")
    return written


def as_text_list(value: Any, where: str) -> list[str]:
    """Return a list of texts as `as_texts` does; a single text is an error.

    Raises:
        ConfigError: the value is a single text, or see `as_texts`.
    """
    if isinstance(value, str):
        hint = f"labels={value}" if Path(value).expanduser().is_file() else f"'{where}=[a dog,a cat]'"
        raise ConfigError(f"{where}={value} must be a list of texts: {hint}.")
    return as_texts(value, where)


def read_labels(value: Any) -> list[str]:
    """Return class names from a list, a file, or `imagenet`.

    Raises:
        ConfigError: the value is none of these.
    """
    if value == "imagenet":
        return [name for _, name in imagenet_classes()]
    if isinstance(value, list):
        return [text.strip(BLANKS) for text in as_texts(value, "labels")]
    return read_lines(value, "labels", "imagenet, a list, or a file of names (one per line, or a list as YAML or JSON)")


def _expand(entry: str, where: str) -> list[str]:
    path = Path(entry).expanduser()
    if path.is_dir():
        files = sorted(_files_in(path))
        if not files:
            raise DataError(f"{where}={entry} contains no images or videos.")
        return files
    if os.path.lexists(path):
        return [str(path)]
    if not glob.has_magic(entry):
        raise ConfigError(f"{where}={entry}: no such file or folder (in {Path.cwd()}).")
    files = []
    for match in map(Path, sorted(glob.glob(str(path), recursive=True))):
        if match.is_dir():
            files += sorted(_files_in(match))
        elif match.suffix.lower() in MEDIA_SUFFIXES:
            files.append(str(match))
    if not files:
        raise ConfigError(f"{where}={entry} matches no image or video (in {Path.cwd()}).")
    return files


def _files_in(folder: Path) -> Iterator[str]:
    """Yield the images and videos in a folder and its subfolders. Links are followed; each folder is visited once."""
    seen: set[tuple[int, int]] = set()

    def warn(error: OSError) -> None:
        log.warning("%s is skipped: %s.", error.filename, error.strerror)

    for parent, folders, files in os.walk(folder, followlinks=True, onerror=warn):
        status = os.stat(parent)
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in files:
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in MEDIA_SUFFIXES:
                yield os.path.join(parent, name)
