"""When two names are one file, without following every link: big tables have millions of them. No torch."""

import os
import posixpath
from functools import lru_cache


def normal_path(path: str) -> str:
    """Return a path as absolute and without empty, `.` and `..` parts: the names of a file that differ in these are equal then.

    The result names the same file. `x/..` is the folder above x, and where x is a link, the one above its target; where x is no
    folder, nothing is found that way, and it stays. Other links are not followed: two links to a file are two names.

    Args:
        path: as it is written; a relative one starts from the working directory.
    """
    absolute = path if path.startswith("/") else f"{os.getcwd()}/{path}"
    if "/.." not in absolute:
        normal = posixpath.normpath(absolute)
        return normal[1:] if normal.startswith("//") else normal  # which POSIX lets mean something else
    found = ""
    for part in absolute.split("/"):
        if part == "..":
            found = _above(found)
        elif part not in ("", "."):
            found = f"{found}/{part}"
    return found or "/"


@lru_cache(maxsize=1 << 16)
def _above(folder: str) -> str:
    """Return the normal path of `folder/..`, where `/` is written as nothing."""
    if not folder:
        return ""
    if not os.path.isdir(folder):
        return f"{folder}/.."
    if os.path.islink(folder):
        return _above(normal_path(os.path.join(os.path.dirname(folder), os.readlink(folder))).rstrip("/"))
    return os.path.dirname(folder).rstrip("/")
