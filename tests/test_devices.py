"""Tests that `accelerator` and `devices` mean the same in training and evaluation, and that typos are reported without torch."""

import builtins
import io
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from clip_exp import devices
from clip_exp.devices import parse_devices, resolve_accelerator, usable_cores
from clip_exp.errors import ConfigError


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make torch find a number of GPUs."""

    def find(count: int) -> None:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)

    return find


@pytest.mark.parametrize(
    ("devices", "requested", "listed"),
    [("auto", None, None), (-1, None, None), ("-1", None, None), (3, 3, None), ("3", 3, None), ([2, 0], 2, [2, 0])],
)
def test_devices_are_auto_a_number_or_a_list(devices: Any, requested: int | None, listed: list[int] | None) -> None:
    found = parse_devices("auto", devices)
    assert (found.requested, found.gpus) == (requested, listed)


@pytest.mark.parametrize("devices", [0, "0", [], "two", "²", [0, 0], ["0"], [[0]], [-1], 1.5, None, -2])
def test_other_devices_are_refused_by_the_name_of_their_key(devices: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_devices("auto", devices, "trainer.")
    assert str(caught.value) == (
        f"trainer.devices={devices} must be auto, a number greater than 0, or a list of distinct GPU indices."
    )


def test_both_keys_are_checked_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_devices("tpu", 0)
    assert str(caught.value).splitlines() == [
        "accelerator=tpu must be one of auto, cpu, gpu, cuda.",
        "devices=0 must be auto, a number greater than 0, or a list of distinct GPU indices.",
    ]
    with pytest.raises(
        ConfigError,
        match=r"^devices=\[0, 1\] lists GPUs, but accelerator=cpu: set a number of CPU processes instead\.$",
    ):
        parse_devices("cpu", [0, 1])


@pytest.mark.parametrize(
    ("accelerator", "devices", "found", "problem"),
    [
        ("gpu", "auto", 0, "x.accelerator=gpu, but torch finds no GPU: use x.accelerator=cpu, or install"),
        ("gpu", 2, 0, "x.accelerator=gpu, but torch finds no GPU"),
        ("auto", [0], 0, "x.devices=[0] lists GPUs, but torch finds no GPU"),
        ("auto", [0, 2], 2, "x.devices=[0, 2] must be indices from 0 to 1: this machine has 2 GPUs."),
        ("gpu", 4, 2, "x.devices=4 requests 4 GPUs, but this machine has 2."),
        ("auto", 4, 2, "x.devices=4 requests 4 GPUs, but this machine has 2."),
        ("auto", 4, 0, None),
        ("cpu", 4, 2, None),
        ("gpu", 2, 2, None),
        ("auto", [1], 2, None),
        ("auto", "auto", 2, None),
    ],
)
def test_gpus_that_the_machine_lacks_are_refused(
    gpus: Any, accelerator: str, devices: Any, found: int, problem: str | None
) -> None:
    gpus(found)
    requested = parse_devices(accelerator, devices, "x.")
    if problem is None:
        requested.check_gpus()
    else:
        with pytest.raises(ConfigError) as caught:
            requested.check_gpus()
        assert str(caught.value).startswith(problem)


@pytest.mark.parametrize(
    ("accelerator", "devices", "found", "count"),
    [("auto", "auto", 0, 1), ("auto", "auto", 8, 8), ("cpu", "auto", 8, 1), ("cpu", 3, 0, 3), ("gpu", [3, 5], 8, 2)],
)
def test_one_process_per_device(gpus: Any, accelerator: str, devices: Any, found: int, count: int) -> None:
    gpus(found)
    assert parse_devices(accelerator, devices).count() == count


def test_listed_gpus_are_chosen_from_the_visible_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert parse_devices("gpu", [2, 0]).environment() == {"CUDA_VISIBLE_DEVICES": "2,0"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,7")
    assert parse_devices("gpu", [2, 0]).environment() == {"CUDA_VISIBLE_DEVICES": "7,4"}
    assert parse_devices("gpu", 2).environment() == {}


def test_auto_is_a_gpu_where_there_is_one(gpus: Any) -> None:
    gpus(1)
    assert [resolve_accelerator(name) for name in ("auto", "gpu", "cuda", "cpu")] == ["cuda", "cuda", "cuda", "cpu"]
    gpus(0)
    assert [resolve_accelerator(name) for name in ("auto", "cpu")] == ["cpu", "cpu"]
    with pytest.raises(ConfigError, match="finds no GPU: use accelerator=cpu"):
        resolve_accelerator("gpu")
    with pytest.raises(ConfigError, match="accelerator=tpu must be one of auto, cpu, gpu, cuda"):
        resolve_accelerator("tpu")


def test_an_unknown_accelerator_is_reported_by_every_command_before_torch_is_imported() -> None:
    code = (
        "import sys, clip_exp\nfrom clip_exp.cli import run\nfrom clip_exp.errors import ConfigError\n"
        "assert run('train', ['trainer.accelerator=tpu']) == 2\n"
        "for command in ('evaluate', 'predict', 'rank', 'search'):\n"
        "    assert run(command, ['accelerator=tpu']) == 2\n"
        "try:\n    clip_exp.load('vit_nano', accelerator='tpu')\n"
        "except ConfigError as error:\n    print(error, file=sys.stderr)\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("accelerator=tpu must be one of auto, cpu, gpu, cuda.") == 6


def test_checking_the_text_imports_no_torch() -> None:
    code = (
        "import sys\nfrom clip_exp.devices import parse_devices\n"
        "parse_devices('auto', 'auto').check_gpus()\nparse_devices('cpu', 2).check_gpus()\nassert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("affinity", "quota", "variable", "usable"),
    [
        (64, "max 100000", None, 64),
        (6, "max 100000", None, 6),
        (64, "400000 100000", None, 4),
        (64, "150000 100000", None, 2),
        (2, "400000 100000", None, 2),
        (64, "max 100000", "3", 3),
    ],
)
def test_usable_cores_are_those_of_the_affinity_the_containers_quota_and_the_variable(
    affinity: int, quota: str, variable: str | None, usable: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    usable_cores()  # imports what reads other files
    read, exists, name = builtins.open, os.path.exists, "/sys/fs/cgroup/cpu.max"
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(affinity)))
    monkeypatch.setattr(os.path, "exists", lambda path: path == name or exists(path))
    monkeypatch.setattr(
        builtins,
        "open",
        lambda path, *more, **options: io.StringIO(quota) if path == name else read(path, *more, **options),
    )
    if variable:
        monkeypatch.setenv("LOKY_MAX_CPU_COUNT", variable)
    assert usable_cores() == usable


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({}, 1000),
        ({"memory.max": "max", "memory.current": "900", "memory.stat": "inactive_file 0"}, 1000),
        ({"memory.max": "1500", "memory.current": "1400", "memory.stat": "anon 700\ninactive_file 600"}, 700),
        (
            {
                "memory/memory.limit_in_bytes": "800",
                "memory/memory.usage_in_bytes": "500",
                "memory/memory.stat": "total_inactive_file 100",
            },
            400,
        ),
    ],
    ids=["no container", "no limit", "control groups 2", "control groups 1"],
)
def test_free_memory_is_that_of_the_container_without_files_that_can_be_dropped(
    files: dict[str, str], free: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "memory").mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(f"{text}\n")
    monkeypatch.setattr(devices, "CGROUPS", tmp_path)
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=1000))
    assert devices.free_memory() == free
