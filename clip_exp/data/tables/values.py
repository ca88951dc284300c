"""What a row's picture path, caption and label may be, where a format holds more than text. The same for all of them."""

import difflib
from collections.abc import Iterable

from clip_exp.data.tables.reader import MAX_CAPTION

_WHAT = {"image_key": "picture path", "caption_key": "caption", "label_key": "label"}


class BadValue(Exception):
    """A value that makes its row a bad one: the kind of fault, and what exactly is wrong."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


def text_of(setting: str, name: str, value: object) -> str:
    """The text of a value, verbatim.

    Nothing is made text that is not: a number as a caption is a wrong column more often than a caption. Only labels may be
    whole numbers; no label (null) is the empty one, which means no class.

    Args:
        setting: `image_key`, `caption_key` or `label_key`.
        name: of its column, for messages.

    Raises: BadValue.
    """
    if setting == "label_key" and (value is None or type(value) is int):
        return "" if value is None else str(value)
    what = _WHAT[setting]
    if value is None:
        raise BadValue(*absent(setting, name))
    if not isinstance(value, str):
        raise BadValue(f"the {what} is no text", f"the {what} {name!r} is no text but {_shown(value)}")
    if not value and setting == "image_key":
        raise BadValue(f"no {what}", f"the {what} {name!r} is empty")
    if "\0" in value:
        raise BadValue("NUL character", f"the {what} {name!r} holds a NUL character")
    if len(value) > MAX_CAPTION:
        raise BadValue(*longer_than(setting, name, f"{len(value):,} characters, more than {MAX_CAPTION:,}"))
    if not value.isascii():
        _check_unicode(what, name, value)
    return value


def longer_than(setting: str, name: str, measure: str) -> tuple[str, str]:
    """Reason and detail for a text of too many characters or bytes."""
    return f"{_WHAT[setting]} too long", f"the {_WHAT[setting]} {name!r} has {measure}"


def absent(setting: str, name: str) -> tuple[str, str]:
    """Reason and detail for a value that is missing."""
    what = _WHAT[setting]
    return f"no {what}", f"there is no {what} ({name!r} is missing or null; data.{setting})"


def no_column(name: str, setting: str, names: Iterable[str]) -> str:
    """The end of a message that began with the file: which column is missing, and which may be meant."""
    listed = list(names)
    close = difflib.get_close_matches(name.lower(), [other.lower() for other in listed], n=1)
    nearest = next((other for other in listed if close and other.lower() == close[0] and other.isprintable()), None)
    shown = ", ".join(repr(other if len(other) <= 40 else other[:40] + "…") for other in listed[:20]) or "none"
    if setting == "filter":
        return f"has no column {name!r} (data.filter). Its columns: {shown}." + (
            f" Did you mean {nearest!r}?" if nearest else ""
        )
    return f"has no column {name!r} (data.{setting}). Its columns: {shown}. Set data.{setting}={nearest or '<one of them>'}."


def _check_unicode(what: str, name: str, value: str) -> None:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadValue("not Unicode", f"the {what} {name!r} holds half a surrogate pair") from error


def _shown(value: object) -> str:
    kinds = {bool: "a truth value", int: "a number", float: "a number", list: "a list", dict: "an object"}
    kind = kinds.get(type(value), type(value).__name__)
    text = str(value)
    return f"{kind}: {text if len(text) <= 40 else text[:40] + '…'}"
