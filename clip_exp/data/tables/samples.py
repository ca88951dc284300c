"""Samples: an image, its caption and other values in members of a shard, or in files of a folder, of the same name.

image: the member with the extension `image_key`, else the first of `IMAGES`
caption and label: the member with the extension `caption_key` (`label_key`), else that key of the .json; if neither
    exists, the .txt is the caption
further columns: likewise a member or a key of the .json; a .npy contains numbers
columns of the filter: the keys of the .json, the members by extension, and the values above
"""

import io
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from clip_exp.data.tables.reader import (
    IMAGES,
    BadValue,
    TableOptions,
    absent,
    is_caption,
    is_column,
    is_optional,
    key_of,
    max_length,
    text_of,
    value_of,
    what_of,
)
from clip_exp.data.tables.records import parse_object
from clip_exp.data.tables.tar import Member

_MAX_JSON = 1 << 20  # bytes
_MAX_ARRAY = 16 << 20  # bytes


class SampleReader:
    """Reader of the values of samples.

    Args:
        options: columns to read.
        read: function that returns the content of a member.
    """

    def __init__(self, options: TableOptions, read: Callable[[Member], bytes]) -> None:
        self.options, self.read = options, read
        self.requested, self.filtered = options.requested, sorted(options.filtered)

    def image_of(self, sample: Mapping[str, Member]) -> Member:
        """Return the image of a sample, whose members are given by extension.

        Raises: BadValue.
        """
        for extension in (self.options.image_key.lower(), *IMAGES):
            if extension in sample:
                return sample[extension]
        image = next((each for each in sample if each.rpartition(".")[2] in IMAGES), None)
        caption = next((each for each in sample if each.rpartition(".")[2] == "txt"), None)
        fix = f"; set data.image_key={image}" if image else ""
        fix += f" data.caption_key={caption}" if image and caption else ""
        raise BadValue("no image", f"there is no image among the members {', '.join(sample)}{fix}")

    def record_of(self, sample: Mapping[str, Member], image: Member) -> dict[str, Any]:
        """Return the requested values and those of the filter, by column name.

        Raises: BadValue.
        """
        texts = {setting: name for setting, name in self.requested.items() if setting != "image_key"}
        record: dict[str, Any] = {}
        if "json" in sample and (self.filtered or not all(name.lower() in sample for name in texts.values())):
            record = parse_object(self._content(sample["json"], _MAX_JSON, "JSON"))
        values = {name: self._value(sample, record, setting, name) for setting, name in texts.items()}
        named = [name for name in self.filtered if name.lower() in sample]
        read = {name: self._text(sample[name.lower()], "caption_key", name) for name in named}
        return {**read, **record, **values, self.options.image_key: image.name}

    def _value(self, sample: Mapping[str, Member], record: dict[str, Any], setting: str, name: str) -> Any:
        """Return a value except the image: a member, or a value of the sample's JSON, or the .txt for a caption."""
        if is_column(setting) and f".{name.lower()}".endswith(".npy") and name.lower() in sample:
            return self._array(sample[name.lower()], setting)
        if name.lower() in sample:
            return self._text(sample[name.lower()], setting, name)
        if record.get(name) is None and is_caption(setting) and not is_optional(setting):
            if "txt" in sample:
                return self._text(sample["txt"], setting, "txt")
            if record.get("caption") is not None:  # as img2dataset writes it
                return value_of(setting, "caption", record["caption"])
        if name not in record and not is_optional(setting):
            reason, _ = absent(setting, name)
            listed = f", and its .json has only {', '.join(map(repr, record))}" if record else ""
            raise BadValue(reason, f"{reason}: there is no member .{name}{listed}; check data.{key_of(setting)}")
        return value_of(setting, name, record.get(name))

    def _text(self, member: Member, setting: str, name: str) -> str:
        """Return the text of a member, verbatim."""
        try:
            text = self._content(member, 4 * max_length(setting), what_of(setting)).decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise BadValue(
                "not UTF-8", f"its {member.name!r} is not UTF-8 ({error.reason} at byte {error.start})"
            ) from error
        return text_of(setting, name, text)

    def _array(self, member: Member, setting: str) -> np.ndarray:
        """Return the array in a .npy member. Nothing is unpickled."""
        try:
            return np.load(io.BytesIO(self._content(member, _MAX_ARRAY, what_of(setting))), allow_pickle=False)
        except (ValueError, OSError, EOFError, MemoryError) as error:
            detail = f"its {member.name!r} is not a .npy file of numbers"
            raise BadValue(f"the {what_of(setting)} is not numbers", detail) from error

    def _content(self, member: Member, limit: int, what: str) -> bytes:
        if member.size > limit:
            raise BadValue(f"{what} too long", f"its {member.name!r} has {member.size:,} bytes, more than {limit:,}")
        return self.read(member)
