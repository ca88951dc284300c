"""What a command is given: images and videos by path, texts, class names. No torch."""

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
FRAMES = 8  # of a video
LISTED_LEFT_OUT = 20  # images that could not be read, named in one warning
LISTED = 5  # problems of a kind that are told one by one


class LeftOut(NamedTuple):
    """An image or video that could not be read."""

    path: str
    reason: str


def is_video(item: ImageInput) -> bool:
    """Whether a path is a video's, by its ending."""
    return not isinstance(item, Image.Image) and Path(item).suffix.lower() in VIDEO_SUFFIXES


def can_decode_videos() -> bool:
    """Whether PyAV is installed."""
    return importlib.util.find_spec("av") is not None


def find_images(wanted: Any, where: str = "images") -> list[str]:
    """Paths of the images and videos that are meant, each once: in the order given, sorted within a folder or a glob.

    Args:
        wanted: a file, a folder (with the folders in it; hidden ones and other files are passed over), a glob
            (`photos/**/*.jpg`), or a list of those.
        where: the configuration key, for messages.
    Raises:
        ConfigError: nothing given, or no such file or folder; a line each.
        DataError: a folder without images.
    """
    entries = list(wanted) if isinstance(wanted, list | tuple) else [wanted]
    if wanted is None or not entries:
        raise ConfigError(f"{where} has no value: give a file, a folder, a glob, or a list of those.")
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


def folders_of(wanted: Any) -> list[str]:
    """The folders among what `find_images` is given."""
    entries = wanted if isinstance(wanted, list | tuple) else [] if wanted is None else [wanted]
    paths = [Path(str(entry)).expanduser() for entry in entries]
    return [str(path) for path in paths if path.is_dir()]


def check_videos(paths: list[str], on_bad_image: EvalOnBadImage) -> None:
    """Raises:
    ConfigError: there are videos, nothing here decodes them, and they may not be left out.
    """
    videos = [path for path in paths if is_video(path)]
    if videos and on_bad_image is EvalOnBadImage.error and not can_decode_videos():
        raise ConfigError(
            f"{len(videos)} of the {len(paths)} files are videos ({videos[0]}), which PyAV decodes: pip install av. "
            "Or leave them out: on_bad_image=skip."
        )


def tell_left_out(left_out: list[LeftOut], given: int) -> None:
    """One warning with the count and the reasons."""
    if left_out:
        lines = [f"  {path}: {reason}" for path, reason in left_out[:LISTED_LEFT_OUT]]
        more = [f"  and {len(left_out) - LISTED_LEFT_OUT:,} more"] if len(left_out) > LISTED_LEFT_OUT else []
        count = f"left out {len(left_out):,} of {given:,} images, which cannot be read:"
        log.warning("\n".join([count, *lines, *more]))


def as_texts(value: Any, where: str) -> list[str]:
    """One text or a list of texts as a list. YAML's numbers and truths are texts too.

    Raises:
        ConfigError: nothing, an empty text, or something else than texts.
    """
    texts = value if isinstance(value, list) else [value]
    if value is None or not texts:
        raise ConfigError(f"{where} has no value: give a text, or a list: '{where}=[a dog,a cat]'.")
    if any(isinstance(text, dict | list) for text in texts):
        raise ConfigError(f"{where} must be texts; put odd ones in quotes: {where}=[\"a {{}}\",'a [dog]'].")
    written = [str(text).lower() if isinstance(text, bool) else "null" if text is None else str(text) for text in texts]
    if not all(text.strip() for text in written):
        raise ConfigError(f"{where} has an empty text.")
    return written


def as_text_list(value: Any, where: str) -> list[str]:
    """See `as_texts`; a single text is refused, since it was meant to be several.

    Raises:
        ConfigError: see `as_texts`.
    """
    if isinstance(value, str):
        hint = f"labels={value}" if Path(value).expanduser().is_file() else f"'{where}=[a dog,a cat]'"
        raise ConfigError(f"{where}={value} must be a list of texts: {hint}.")
    return as_texts(value, where)


def read_labels(value: Any) -> list[str]:
    """Class names: a list, a file, or `imagenet`.

    Raises:
        ConfigError: none of these.
    """
    if value == "imagenet":
        return [name for _, name in imagenet_classes()]
    if isinstance(value, list):
        return [text.strip(BLANKS) for text in as_texts(value, "labels")]
    return read_lines(value, "labels", "imagenet, a list, or a file of names (a line each, or a list as YAML or JSON)")


def _expand(entry: str, where: str) -> list[str]:
    path = Path(entry).expanduser()
    if path.is_dir():
        files = sorted(_below(path))
        if not files:
            raise DataError(f"{where}={entry} holds no images or videos.")
        return files
    if os.path.lexists(path):
        return [str(path)]
    if not glob.has_magic(entry):
        raise ConfigError(f"{where}={entry}: no such file or folder (seen from {Path.cwd()}).")
    files = []
    for match in map(Path, sorted(glob.glob(str(path), recursive=True))):
        if match.is_dir():
            files += sorted(_below(match))
        elif match.suffix.lower() in MEDIA_SUFFIXES:
            files.append(str(match))
    if not files:
        raise ConfigError(f"{where}={entry} matches no image or video (seen from {Path.cwd()}).")
    return files


def _below(folder: Path) -> Iterator[str]:
    """Images and videos in a folder and the folders in it, through links, each folder once."""
    seen: set[tuple[int, int]] = set()

    def tell(error: OSError) -> None:
        log.warning("%s is passed over: %s.", error.filename, error.strerror)

    for parent, folders, files in os.walk(folder, followlinks=True, onerror=tell):
        status = os.stat(parent)
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in files:
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in MEDIA_SUFFIXES:
                yield os.path.join(parent, name)
