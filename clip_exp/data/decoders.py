"""Decoder of JPEG and WebP: torchcodec, which returns Pillow's pixels, faster and with less memory; else Pillow.

torchcodec is built for one version of torch. Whatever prevents its import is logged once, and Pillow decodes.
"""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

import PIL
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from clip_exp.ranks.group import is_main

log = logging.getLogger(__name__)


class _Torchcodec(NamedTuple):
    """Functions of torchcodec, which apply the EXIF orientation and raise a RuntimeError for an image that they refuse."""

    version: str
    decode_jpeg: Callable[..., Any]
    decode_webp: Callable[..., Any]


def image_decoder() -> str:
    """Return the name and version of the decoder of JPEG and WebP, such as `torchcodec 0.17.0`.

    The first call imports it. Call this before worker processes start: they inherit it, and do not log its absence.
    """
    found = _torchcodec()
    return f"Pillow {PIL.__version__}" if found is None else f"torchcodec {found.version}"


def decode_jpeg(data: bytearray) -> Tensor | None:
    """Return the upright RGB pixels of a JPEG, uint8 [3, H, W]; None if torchcodec is missing or refuses the image."""
    if (found := _torchcodec()) is None:
        return None
    pixels: Tensor | None = None
    with suppress(RuntimeError), silent_worker():
        pixels = found.decode_jpeg(torch.frombuffer(data, dtype=torch.uint8))
    return pixels


def decode_webp(data: bytearray) -> Tensor | None:
    """Return the upright pixels of a still WebP, uint8 [3 or 4, H, W]; None: see `decode_jpeg`."""
    if (found := _torchcodec()) is None:
        return None
    pixels: Tensor | None = None
    with suppress(RuntimeError):
        pixels = found.decode_webp(torch.frombuffer(data, dtype=torch.uint8), mode="UNCHANGED")
    return pixels


@cache
def _torchcodec() -> _Torchcodec | None:
    try:
        import torchcodec.decoders as found

        return _Torchcodec(_installed(), found.decode_jpeg, found.decode_webp)
    except Exception as error:  # ImportError, or OSError or RuntimeError for libraries that do not fit
        if is_main() and get_worker_info() is None:
            log.warning(
                "torchcodec %s cannot be imported with torch %s (%s): Pillow %s decodes images, more slowly. Install the torchcodec for this torch.",
                _installed(), torch.__version__, type(error).__name__, PIL.__version__,
            )  # fmt: skip
        return None


def _installed() -> str:
    try:
        return version("torchcodec").partition("+")[0]  # +cpu and +cu130 have the same decoders
    except PackageNotFoundError:
        return "(not installed)"


@contextmanager
def silent_worker() -> Iterator[None]:
    """Suppress the warnings that libjpeg and libtiff print to stderr without the name of the file.

    Only in worker processes: in other processes, other threads may write to stderr at the same time.
    """
    if get_worker_info() is None or (descriptors := _stderr_and_devnull()) is None:
        yield
        return
    stderr, devnull = descriptors
    os.dup2(devnull, 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)


@cache
def _stderr_and_devnull() -> tuple[int, int] | None:
    try:
        return os.dup(2), os.open(os.devnull, os.O_WRONLY)
    except OSError:  # the process was started without stderr
        return None
