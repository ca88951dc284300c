"""Writing of shards for tests."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

from tests.data.conftest import noise

Members = dict[str, bytes | str | dict[str, Any] | tarfile.TarInfo]


def write_shard(file: Path, members: Members | list[tuple[str, Any]], format: int = tarfile.PAX_FORMAT) -> Path:
    """Write a tar. A member is bytes, text, a mapping for JSON, or a header without data."""
    with tarfile.open(file, "w", format=format) as tar:
        for name, content in members.items() if isinstance(members, dict) else members:
            if isinstance(content, tarfile.TarInfo):
                content.name = name
                tar.addfile(content)
                continue
            data = json.dumps(content) if isinstance(content, dict) else content
            data = data.encode() if isinstance(data, str) else data
            header = tarfile.TarInfo(name)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))
    return file


def jpeg(seed: int) -> bytes:
    stream = io.BytesIO()
    noise(seed).save(stream, "JPEG")
    return stream.getvalue()
