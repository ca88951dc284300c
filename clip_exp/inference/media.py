"""Images and videos as a dataset of images to encode, with several frames per video."""

import hashlib
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from clip_exp.data.files import BadImage, ImageLimits, Stored, image_signature
from clip_exp.data.images import open_image
from clip_exp.inference.inputs import FRAMES, ImageInput, is_video


class Media:
    """`data.image_sets.ImageSet` of images (paths or in memory) and of frames of videos (paths).

    Args:
        items: images and videos.
        frames: number of frames per video, evenly spaced.

    Attributes:
        owner: int64 [E], ascending; item of each of the E images to encode.
    """

    def __init__(self, items: Sequence[ImageInput], frames: int = FRAMES) -> None:
        self.in_memory = [item if isinstance(item, Image.Image) else None for item in items]
        if not any(self.in_memory):
            self.in_memory = []
        # One array, so that forked workers share its memory.
        self.paths = np.array(
            [f"image {i}" if isinstance(item, Image.Image) else str(item) for i, item in enumerate(items)]
        )
        self.frames = frames
        counts = np.array([frames if is_video(item) else 1 for item in items], dtype=np.int64)
        self.owner = np.repeat(np.arange(len(items)), counts)
        self._first = np.cumsum(counts) - counts

    def __len__(self) -> int:
        return len(self.owner)

    def open(self, index: int, limits: ImageLimits) -> Image.Image:
        """Open an image or frame; see `ImageSet.open`."""
        item = self.owner[index]
        if self.in_memory and (image := self.in_memory[item]) is not None:
            return image
        path = str(self.paths[item])
        if not is_video(path):
            return open_image(path, limits)
        return read_frame(path, index - int(self._first[item]), self.frames, limits.max_pixels)

    def name(self, index: int) -> str:
        """Return the path of the image or video."""
        return str(self.paths[self.owner[index]])

    def stored(self, index: int) -> None:
        """Return None: frames and images in memory are not stored as files (`ImageSet.stored`)."""

    def fingerprint(self) -> str:
        """Return a hash of the images and videos; see `ImageSet.fingerprint`."""
        digest = hashlib.sha256(f"frames {self.frames}\n".encode())
        for position, path in enumerate(self.paths):
            if self.in_memory and (image := self.in_memory[position]) is not None:
                digest.update(f"{image.mode} {image.size}\n".encode() + image.tobytes())
            else:
                # The text of older versions, so that their unfinished runs can still be resumed.
                signature = "Stamp(size={}, mtime_ns={}, sample={})".format(*image_signature(Stored(str(path))))
                digest.update(f"{os.path.abspath(path)}\t{signature}\n".encode(errors="surrogateescape"))
        return digest.hexdigest()


# Frames of videos, decoded by PyAV (`pip install av`).

BACK_S = (0.0, 2.0, 10.0, 60.0, 1e6)  # seconds before a frame at which decoding starts, increased until it succeeds


def read_frame(path: str, number: int, frames: int, max_pixels: int) -> Image.Image:
    """Return the frame that a player shows in the middle of the `number`-th of `frames` equal parts of a video.

    Args:
        path: path of the video.
        number: index of the frame, from 0.
        frames: number of parts.
        max_pixels: limit of the frame size.

    Returns:
        RGB image, rotated as specified in the file.

    Raises:
        BadImage: the video cannot be read, or PyAV is not installed.
    """
    try:
        import av
    except ImportError:
        raise BadImage("a video, which needs PyAV: pip install av") from None
    if not os.path.isfile(path):
        raise BadImage("not a regular file" if os.path.exists(path) else "no such file")
    # A path may contain a colon, and a video may refer to URLs: FFmpeg may open local files only.
    only_files = {"protocol_whitelist": "file"}
    try:
        with av.open(f"file:{path}", metadata_errors="ignore", container_options=only_files) as container:
            if not container.streams.video:
                raise BadImage("a video file without images")
            stream = container.streams.video[0]
            if stream.width * stream.height > max_pixels:
                raise BadImage(f"{stream.width} x {stream.height} pixels, more than max_image_pixels={max_pixels}")
            start_s, duration_s = _extent(container, stream)
            frame = _shown_at(container, stream, start_s, start_s + (number + 0.5) / frames * duration_s)
            return frame.to_image().rotate(frame.rotation, expand=True)
    except (av.FFmpegError, OSError, ValueError) as error:
        raise BadImage(f"not a readable video: {getattr(error, 'strerror', None) or error}") from error


def _extent(container: Any, stream: Any) -> tuple[float, float]:
    """Return the start and the duration of a stream, seconds."""
    start_s = float((stream.start_time or 0) * stream.time_base)
    if stream.duration:
        return start_s, float(stream.duration * stream.time_base)
    if container.duration:
        return start_s, container.duration / 1e6
    # Raw streams have no duration in the header: it is that of the packets, which are read but not decoded.
    ends = [packet.pts + (packet.duration or 0) for packet in container.demux(stream) if packet.pts is not None]
    return start_s, float(max(ends, default=0) * stream.time_base) - start_s


def _shown_at(container: Any, stream: Any, start_s: float, time_s: float) -> Any:
    """Return the last frame that starts at or before a time; the first frame if there is none."""
    first = None
    for back_s in BACK_S:  # in some formats a seek ends after the requested time
        container.seek(int(max(start_s - 1, time_s - back_s) / stream.time_base), stream=stream)
        shown = None
        for frame in container.decode(stream):
            if frame.time is not None and frame.time > time_s:
                first = frame
                break
            shown = frame
        if shown is not None:
            return shown
    if first is None:
        raise BadImage("a video without decodable frames")
    return first
