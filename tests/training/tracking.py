"""What TensorBoard and Weights & Biases were given, read back from their files."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

HEADER, BLOCK = 7, 32768  # bytes of a .wandb file, a log of LevelDB
FIRST_PARTS = (1, 2)  # a whole record, or the first part of one
LAST_PARTS = (1, 4)


def tensorboard_hparams(folder: Path) -> dict[str, Any]:
    """Return the hyperparameters of a folder of events."""
    events = EventAccumulator(str(folder)).Reload()
    content = events.SummaryMetadata(metadata.SESSION_START_INFO_TAG).plugin_data.content
    values = HParamsPluginData.FromString(content).session_start_info.hparams
    return {key: getattr(value, value.WhichOneof("kind")) for key, value in values.items()}


def wandb_run(file: Path) -> tuple[dict[str, Any], list[str]]:
    """Return configuration and tags of an offline run."""
    from wandb.proto.wandb_internal_pb2 import Record  # takes a second to import

    config: dict[str, Any] = {}
    tags: list[str] = []
    for record in map(Record.FromString, _records(file.read_bytes())):
        tags += record.run.tags
        for item in (*record.run.config.update, *record.config.update):
            config[item.key or ".".join(item.nested_key)] = json.loads(item.value_json)
    return config, tags


def _records(log: bytes) -> Iterator[bytes]:
    at, parts = HEADER, b""
    while at + HEADER <= len(log):
        if BLOCK - at % BLOCK < HEADER:  # a header is not split over blocks
            at += BLOCK - at % BLOCK
            continue
        size, kind = struct.unpack("<xxxxHB", log[at : at + HEADER])
        parts = (
            log[at + HEADER : at + HEADER + size]
            if kind in FIRST_PARTS
            else parts + log[at + HEADER : at + HEADER + size]
        )
        if kind in LAST_PARTS:
            yield parts
        at += HEADER + size
