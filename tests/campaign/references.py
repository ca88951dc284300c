"""Undisturbed runs, and the comparison of a run with one: bitwise, but for clocks."""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file

from clip_exp.checkpoints.folders import EMA_WEIGHTS, STATE, TENSORS, WEIGHTS, latest, read_manifest
from clip_exp.runs import read_metrics
from clip_exp.storage import read_json_object
from tests.campaign.commands import Command, describe
from tests.campaign.configurations import STEPS, Configuration
from tests.campaign.moments import Pace, last_step

CLOCKS = ("train/samples_per_s", "train/data_wait_s", "train/compute_s")


@dataclass(frozen=True)
class Reference:
    """An undisturbed run."""

    folder: Path  # the run folder
    pace: Pace


def make_reference(folder: Path, configuration: Configuration) -> Reference:
    """Run a configuration undisturbed."""
    folder.mkdir(parents=True)
    start_s = time.monotonic()
    command = Command(folder, configuration)
    seen: dict[int, float] = {}
    while command.is_alive():
        seen.setdefault(last_step(command.run_folder), time.monotonic() - start_s)
        time.sleep(0.005)
    end_s, run_folder = time.monotonic() - start_s, command.run_folder
    if command.code != 0 or run_folder is None:
        raise RuntimeError(
            f"the undisturbed run failed with exit code {command.code}:\n{describe(configuration, command.outputs)}\n{command.errors}"
        )
    first_s, last_s = seen[min(step for step in seen if step)], seen[STEPS]
    pace = Pace(first_s, (last_s - first_s) / STEPS, end_s - last_s)
    return Reference(run_folder, pace)


def differences(run: Path, reference: Path, metrics_after: int = 0) -> list[str]:
    """Return how the end of a run differs from that of the reference; empty: it does not.

    Args:
        run: run folder.
        reference: run folder of the undisturbed run.
        metrics_after: rows of `metrics.csv` up to this step may be missing or wrong, since the file was damaged.
    """
    mine, theirs = latest(run), latest(reference)
    if mine.name != theirs.name:
        return [f"the last checkpoint is {mine.name} instead of {theirs.name}"]
    found = []
    for name in (WEIGHTS, EMA_WEIGHTS, TENSORS):
        entries = [read_manifest(checkpoint).files.get(name) for checkpoint in (mine, theirs)]
        if entries[0] != entries[1]:
            found.append(f"{name}: {_different_tensors(mine / name, theirs / name) or 'other bytes'}")
    states = [read_json_object(checkpoint / STATE) for checkpoint in (mine, theirs)]
    found += [f"{STATE}: {where}" for where in _different_values(*states)]
    if (metrics := read_manifest(mine).metrics) != (expected := read_manifest(theirs).metrics):
        found.append(f"metrics of the checkpoint: {metrics} instead of {expected}")
    rows = [_without_clocks(folder, metrics_after) for folder in (run, reference)]
    if rows[0] != rows[1]:
        steps = [[row["step"] for row in part] for part in rows]
        first = next((pair for pair in zip(*rows, strict=False) if pair[0] != pair[1]), None)
        found.append(f"metrics.csv: steps {steps[0]} instead of {steps[1]}; first other row: {first}")
    return found


def _without_clocks(run: Path, after: int) -> list[dict[str, Any]]:
    rows = read_metrics(run / "metrics.csv")
    return [{name: value for name, value in row.items() if name not in CLOCKS} for row in rows if row["step"] > after]


def _different_tensors(mine: Path, theirs: Path) -> str:
    one, other = (load_file(path) if path.exists() else {} for path in (mine, theirs))
    names = [
        name
        for name in one | other
        if name not in one or name not in other or one[name].tobytes() != other[name].tobytes()
    ]
    return f"{len(names)} of {len(other)} tensors differ, such as {names[0]}" if names else ""


def _different_values(one: Any, other: Any, where: str = "") -> list[str]:
    if isinstance(one, dict) and isinstance(other, dict):
        found = []
        for key in one | other:
            found += _different_values(one.get(key), other.get(key), f"{where}.{key}" if where else key)
        return found
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        pairs = enumerate(zip(one, other, strict=True))
        return [found for index, pair in pairs for found in _different_values(*pair, f"{where}[{index}]")]
    return [] if one == other else [f"{where} is {json.dumps(one)[:80]} instead of {json.dumps(other)[:80]}"]
