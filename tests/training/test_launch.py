"""One process trains on what it has checked: nothing that is in memory already is read from the disk again."""

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from matplotlib.figure import Figure
from PIL import Image

from clip_exp.config import files
from clip_exp.data import preflight, stream
from clip_exp.ranks import launch
from clip_exp.training.launch import train_here
from tests.compose import train_config
from tests.data.conftest import noise, write_table

RUN = (
    "model=vit_nano", "data=csv", "data.num_workers=0", "global_batch_size=4", "max_steps=2", "precision=32-true",
    "trainer.accelerator=cpu", "callbacks.progress=none", "name=run",
)  # fmt: skip


@pytest.fixture
def overrides(tmp_path: Path) -> list[str]:
    """A run of two steps on a table of eight images, with another table to validate on."""
    for i in range(8):
        noise(i).save(tmp_path / f"{i}.png")
    rows = [[f"{i}.png", f"image {i}"] for i in range(8)]
    tables = {
        name: write_table(tmp_path / f"{name}.csv", [["filepath", "title"], *rows[first:]])
        for name, first in (("train", 0), ("val", 4))
    }
    return [*RUN, *(f"data.{name}={file}" for name, file in tables.items()), f"output_dir={tmp_path}/outputs"]


def opened_and_read(monkeypatch: pytest.MonkeyPatch, overrides: list[str]) -> tuple[list[str], list[str]]:
    """Train; return the tables that were opened, and the configurations that were read from files, in order."""
    monkeypatch.setattr(Figure, "savefig", lambda _, path, **__: Image.new("RGB", (1, 1)).save(path))
    tables: list[str] = []
    open_configured, read_yaml = stream.open_configured, files.read_yaml

    def noting(config: Any, paths: Any, **options: Any) -> Any:
        tables.extend(Path(path).name for path in ([paths] if isinstance(paths, str) else paths))
        return open_configured(config, paths, **options)

    with (
        mock.patch.object(stream, "open_configured", noting),
        mock.patch.object(files, "read_yaml", wraps=read_yaml) as reading,
    ):
        code = train_here(train_config(*overrides), overrides)[1]
    assert code == 0
    return tables, [call.args[0].name for call in reading.call_args_list]


@pytest.mark.parametrize("more", [[], ["data.train=[{{path: {train}, weight: 2}}, {{path: {val}, weight: 1}}]"]])
def test_one_process_opens_each_table_once_and_does_not_read_its_configuration_back(
    more: list[str], overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = {name: str(tmp_path / f"{name}.csv") for name in ("train", "val")}
    given = [*overrides, *(override.format(**places) for override in more)]
    assert opened_and_read(monkeypatch, given) == (["train.csv", "val.csv", *(["val.csv"] if more else [])], [])
    assert list((tmp_path / "outputs").glob("train/run/*/config.yaml"))


def test_a_run_that_resumes_reads_the_earlier_runs_configuration_and_still_opens_each_table_once(
    overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened_and_read(monkeypatch, overrides)
    (folder,) = (tmp_path / "outputs" / "train" / "run").iterdir()
    tables, read = opened_and_read(monkeypatch, [*overrides, "max_steps=3", f"resume={folder}"])
    assert tables == ["train.csv", "val.csv"]
    assert set(read) == {"config.yaml"}


def test_ranks_are_given_the_folder_alone(overrides: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """They open what its `config.yaml` says by themselves: tables are not pickled to them."""
    run_ranks = mock.Mock(return_value=launch.Ended(0, "finished"))
    monkeypatch.setattr(launch, "run_ranks", run_ranks)
    opening = mock.patch.object(preflight, "open_all", wraps=stream.open_all)
    with opening as opened:
        folder, _ = train_here(train_config(*overrides, "trainer.devices=2"), overrides)
    assert opened.call_count == 1
    work, given, ranks, _ = run_ranks.call_args.args
    assert (work.__qualname__, given, ranks) == ("train_in", folder, 2)
    assert files.read_run_config(folder).trainer.devices == 2
