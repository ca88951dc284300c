"""A run that was killed after its second checkpoint, by hand and without training, and what can happen to its files."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from clip_exp.checkpoints.io import SafeCheckpointIO
from clip_exp.config.training import TrainConfig
from clip_exp.runs import RunRecord
from clip_exp.training import opening

STEPS = (10, 20)


def write_run(folder: Path, config: TrainConfig) -> None:
    """Write `config.yaml`, `run.json`, `metrics.csv` and two checkpoints as training does."""
    folder.mkdir(parents=True)
    opening.Opening(folder, False, config, config, {}).begin(["max_steps=30"])
    (folder / "metrics.csv").write_text("step,train/loss\n" + "".join(f"{step},1.5\n" for step in range(1, 24)))
    record, io = RunRecord(folder), SafeCheckpointIO()
    io.metadata = {"best": False, "metrics": {"val/loss": 1.25}}
    io.run_copy, io.on_saved = record.run_copy(), record.acknowledge
    for step in STEPS:
        state = {
            "state_dict": {"model.weight": torch.full((3,), float(step))},
            "global_step": step,
            "optimizer_states": [{"state": {"weight": {"exp_avg": torch.ones(3)}}, "param_groups": []}],
        }
        io.save_checkpoint(state, folder / "checkpoints" / f"step-{step:06d}")


Act = Callable[[Path, random.Random], str]
Contents = dict[str, dict[str, object]]  # of files, by checkpoint or run file


def damage(folder: Path, intact: Contents, chance: random.Random) -> str:
    """Damage one to three parts of a run: files or whole checkpoints. Says what was done."""
    done: list[str] = []
    while not damaged_parts(folder, intact):
        done += [chance.choice(ACTS)(folder, chance) for _ in range(chance.choice((1, 1, 2, 3)))]
    return "; ".join(done)


def damaged_parts(folder: Path, intact: Contents) -> set[str]:
    """The checkpoints and run files that are not what they were, or are new."""
    now = contents_of(folder)
    return {name for name in intact | now if intact.get(name) != now.get(name)}


def contents_of(folder: Path) -> Contents:
    """What the files of a run's checkpoints, and its `run.json` and `config.yaml`, say."""
    contents: Contents = {path.name: {} for path in folder.glob("checkpoints/step-*")}
    for file in _files(folder):
        part = file.parent.name if file.parent.name in contents else file.name
        contents.setdefault(part, {})[file.name] = _meaning(file.read_bytes())
    return contents


def _files(folder: Path) -> list[Path]:
    run_files = [path for path in (folder / "run.json", folder / "config.yaml") if path.is_file()]
    return [*run_files, *sorted(path for path in folder.glob("checkpoints/step-*/*"))]


def _meaning(content: bytes) -> object:
    """JSON may be laid out otherwise, and still says the same."""
    try:
        return json.dumps(json.loads(content), sort_keys=True)
    except (ValueError, RecursionError):
        return content


def rewrite(change: Callable[[bytes, random.Random], bytes]) -> Act:
    def act(folder: Path, chance: random.Random) -> str:
        if not (files := _files(folder)):
            return "nothing"
        file = chance.choice(files)
        file.write_bytes(change(file.read_bytes(), chance))
        return f"{change.__name__} {file.parent.name}/{file.name}"

    return act


def truncate(content: bytes, chance: random.Random) -> bytes:
    return content[: chance.randrange(len(content))] if content else content


def flip(content: bytes, chance: random.Random) -> bytes:
    if not content:
        return content
    place = chance.randrange(len(content))
    return content[:place] + bytes([content[place] ^ (1 << chance.randrange(8))]) + content[place + 1 :]


def zero(content: bytes, chance: random.Random) -> bytes:
    start = chance.randrange(len(content) + 1)
    return content[:start] + bytes(len(content) - start)


def replace(content: bytes, chance: random.Random) -> bytes:
    return chance.choice(
        (
            b"",
            b"{}",
            b"[]",
            b"null",
            b'{"files": {}}',
            b'{"step": NaN}',
            b"\xff\xfe",
            b"[" * 5000,
            b'{"a":' * 5000,
            b"9" * 5000,
        )
    )


def edit(content: bytes, chance: random.Random) -> bytes:
    """Change a value or remove a key of JSON; other files get a byte more."""
    try:
        values = json.loads(content)
    except ValueError:
        return content + b"\0"
    if not isinstance(values, dict) or not values:
        return content + b"\0"
    key = chance.choice(sorted(values))
    if chance.random() < 0.3:
        del values[key]
    else:
        values[key] = chance.choice((None, -1, 1e400, "x", [], {}, 23, True, 10**30))
    return json.dumps(values).encode()


def delete(folder: Path, chance: random.Random) -> str:
    if not (files := _files(folder)):
        return "nothing"
    file = chance.choice(files)
    file.unlink()
    return f"delete {file.parent.name}/{file.name}"


def rename(folder: Path, chance: random.Random) -> str:
    """Rename a file, or a checkpoint to another step."""
    if not (found := [*_files(folder), *sorted(folder.glob("checkpoints/step-*"))]):
        return "nothing"
    path = chance.choice(found)
    target = path.with_name(f"{path.name}.bak" if path.is_file() else f"step-{chance.randrange(30, 90):06d}")
    path.rename(target)
    return f"rename {path.name} to {target.name}"


def swap(folder: Path, chance: random.Random) -> str:
    """Swap a file, or all of them, between the two checkpoints."""
    one, two = (folder / "checkpoints" / f"step-{step:06d}" for step in STEPS)
    names = sorted(path.name for path in one.glob("*") if (two / path.name).exists())
    if names and chance.random() < 0.7:
        names = [chance.choice(names)]
    for name in names:
        (one / name).rename(one / "aside")
        (two / name).rename(one / name)
        (one / "aside").rename(two / name)
    return f"swap {', '.join(names)}"


def remove_checkpoints(folder: Path, chance: random.Random) -> str:
    found = sorted(folder.glob("checkpoints/step-*"))
    doomed = folder / "checkpoints" if not found or chance.random() < 0.5 else chance.choice(found)
    shutil.rmtree(doomed, ignore_errors=True)
    return f"remove {doomed.name}"


ACTS: tuple[Act, ...] = (
    *map(rewrite, (truncate, flip, flip, zero, replace, edit, edit)), delete, rename, swap, remove_checkpoints,
)  # fmt: skip
