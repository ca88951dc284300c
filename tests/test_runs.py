"""Tests of run folders: exclusive, found again by their configuration, and free of secrets."""

import errno
import fcntl
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from clip_exp import runs
from clip_exp.config.model import ModelConfig
from clip_exp.config.training import TrainConfig
from clip_exp.errors import CheckpointError, ConfigError
from clip_exp.models.families.clip import ViTConfig
from clip_exp.models.families.siglip import SigLIPTextConfig
from clip_exp.text.tokenizer import build_tokenizer
from clip_exp.training import opening
from clip_exp.training.opening import open_run
from tests.checkpoints.test_folders import write
from tests.compose import train_config
from tests.encoders import write_siglip_tokenizer
from tests.text.test_tokenizer import TEXTS


def choose(config: TrainConfig) -> tuple[Path, bool]:
    """Return the folder of a run, and whether the run has finished."""
    found = open_run(config)
    return found.folder, found.finished


def test_folders_made_at_once_differ(tmp_path) -> None:
    made: list[str] = []
    threads = [
        threading.Thread(target=lambda: made.append(str(runs.create_run_folder(tmp_path, "train", "x"))))
        for _ in range(20)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(made)) == 20


def test_a_folder_that_cannot_be_made_is_a_storage_error(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="output_dir"):
        runs.create_run_folder(tmp_path / "file", "train", "x")


def test_secrets_do_not_reach_a_run_folder(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "abcdef0123456789")
    config = train_config(f"output_dir={tmp_path}")
    folder, _ = choose(config)
    opening.Opening(folder, False, config, config, {}).begin(
        ["data.train=https://user:hunter2@host/x.csv", "x=abcdef0123456789"]
    )
    text = "".join(path.read_text() for path in folder.rglob("*") if path.is_file())
    assert "abcdef0123456789" not in text
    assert "hunter2" not in text
    assert "https://***@host/x.csv" in text


def test_what_does_not_change_the_result_does_not_change_the_fingerprint() -> None:
    one = opening.fingerprint(train_config())
    same = (
        "strategy=ddp",
        "trainer.devices=2",
        "output_dir=elsewhere",
        "data.num_workers=3",
        "resume=never",
        "micro_batch_size=8",
    )
    assert all(opening.fingerprint(train_config(override)) == one for override in same)
    other = (
        "seed=1",
        "optimizer.lr=1e-3",
        "global_batch_size=64",
        "model=vit_tiny",
        "trainer.gradient_clip_val=2",
        "max_steps=3",
    )
    assert len({opening.fingerprint(train_config(override)) for override in other} | {one}) == len(other) + 1


def test_auto_resumes_the_unfinished_run_and_finds_the_finished_one(tmp_path) -> None:
    config = train_config(f"output_dir={tmp_path}")
    folder, _ = choose(config)
    opening.Opening(folder, False, config, config, {}).begin([])
    assert choose(config) == (folder, False), "a start without a checkpoint does not leave its folder behind"
    write(folder, 10)
    assert choose(config) == (folder, False)
    opening.Opening(folder, False, config, config, {}).begin([])
    assert len(runs.RunRecord(folder).values["resumed"]) == 1
    runs.RunRecord(folder).finish("finished")
    assert choose(config) == (folder, True)
    assert choose(train_config(f"output_dir={tmp_path}", "seed=4"))[0] != folder
    assert choose(train_config(f"output_dir={tmp_path}", "resume=never"))[0] != folder


def test_a_named_run_is_resumed_longer_but_not_with_other_changes(tmp_path) -> None:
    config = train_config(f"output_dir={tmp_path}", "max_steps=6")
    folder, _ = choose(config)
    opening.Opening(folder, False, config, config, {}).begin([])
    write(folder, 6)
    runs.RunRecord(folder).finish("finished")
    before = (folder / "config.yaml").read_text()
    assert choose(train_config("max_steps=9", f"resume={folder}")) == (folder, False)
    assert choose(train_config("max_steps=6", f"resume={folder}")) == (folder, True)
    with pytest.raises(ConfigError, match=r"other values of .*model\.name.*optimizer\.lr"):
        choose(
            train_config(
                "max_steps=9", f"resume={folder}", "model=vit_tiny", "optimizer.lr=1e-2", "name=vit_nano_digits"
            )
        )
    assert (folder / "config.yaml").read_text() == before


def test_metrics_of_older_versions_are_read_under_their_present_names(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text("step,lr,samples_per_s,val/zeroshot_top1\n1,0.5,8.0,\n2,,,0.25\n")
    assert runs.read_metrics(path) == [
        {"step": 1, "train/lr": 0.5, "train/samples_per_s": 8.0},
        {"step": 2, "val/top1": 0.25},
    ]
    path.write_text("step,train/lr,lr\n1,0.5,0.25\n")
    assert runs.read_metrics(path) == [{"step": 1, "train/lr": 0.5, "lr": 0.25}], "lr is a custom callback's"


def test_the_monitor_of_a_run_of_an_older_version_gets_its_present_name(tmp_path: Path) -> None:
    config = train_config(f"output_dir={tmp_path}", "data.label_key=label", "monitor=val/top1")
    folder, _ = choose(config)
    opening.Opening(folder, False, config, config, {}).begin([])
    path = folder / "config.yaml"
    path.write_text(path.read_text().replace("monitor: val/top1", "monitor: val/zeroshot_top1"))
    assert runs.read_config(folder)[0].monitor == "val/top1"


def test_a_resume_that_names_nothing_is_refused(tmp_path) -> None:
    with pytest.raises(ConfigError, match="resume"):
        choose(train_config(f"output_dir={tmp_path}", f"resume={tmp_path}/none"))


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Make writing of every new file fail with an error number."""

    def fail_with(number: int) -> None:
        def write(path: Path, text: str, **options: object) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(Path, "write_text", write)

    return fail_with


def test_a_start_that_cannot_be_recorded_is_a_storage_error(tmp_path, full_disk) -> None:
    full_disk(errno.ENOSPC)
    with pytest.raises(CheckpointError, match=r"run\.json cannot be written: No space left on device"):
        runs.RunRecord(tmp_path).start([])
    assert list(tmp_path.iterdir()) == []


def test_the_end_of_a_run_is_recorded_on_a_full_disk(tmp_path, full_disk) -> None:
    record = runs.RunRecord(tmp_path)
    record.start([])
    for number in (errno.ENOSPC, errno.EDQUOT):
        full_disk(number)
        record.finish("failed", error=[os.strerror(number)], exit_code=4)
        noted = json.loads((tmp_path / "run.json").read_text())
        assert (noted["status"], noted["error"], noted["exit_code"]) == ("failed", [os.strerror(number)], 4)
    record.finish("finished")
    assert "error" not in json.loads((tmp_path / "run.json").read_text()), "what is shorter is written whole, too"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_values_that_cannot_be_recorded_cause_a_warning(number: int, tmp_path, full_disk, caplog) -> None:
    record = runs.RunRecord(tmp_path)
    record.start([])
    before = (tmp_path / "run.json").read_text()
    full_disk(number)
    record.update(facts="x " * 10_000)  # more than the file's blocks hold
    assert "run.json cannot be written" in caplog.text
    assert (tmp_path / "run.json").read_text() == before


def test_a_later_success_removes_an_earlier_error(tmp_path) -> None:
    runs.RunRecord(tmp_path).start([])
    runs.RunRecord(tmp_path).finish("failed", error=["no room"], exit_code=4)
    runs.RunRecord(tmp_path).start([])
    runs.RunRecord(tmp_path).finish("finished")
    assert {"error", "exit_code"}.isdisjoint(runs.RunRecord(tmp_path).values)


def test_a_folder_in_use_is_refused_with_its_owner(tmp_path) -> None:
    with runs.lock(tmp_path), pytest.raises(ConfigError, match="is in use by process"), runs.lock(tmp_path):
        raise AssertionError("locked twice")
    with runs.lock(tmp_path):
        pass


def test_a_run_is_opened_on_a_file_system_without_locks_and_both_terminal_and_log_warn(
    tmp_path, no_locks, capsys
) -> None:
    config = train_config(f"output_dir={tmp_path}")
    folder, _ = choose(config)
    for _ in range(2):  # also where another process has it
        with runs.lock(folder), runs.lock(folder):
            opening.Opening(folder, False, config, config, {}).begin([])
    expected = f"{folder} cannot be locked, since its file system does not support locks (Function not implemented; "
    for text in (capsys.readouterr().err, (folder / "train.log").read_text(encoding="utf-8")):
        assert expected in text
        assert "Do not start two processes in this folder at once" in text


def test_a_lock_held_by_another_process_does_not_count_as_unsupported(
    tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(descriptor: int, operation: int) -> None:
        raise BlockingIOError(errno.EWOULDBLOCK, os.strerror(errno.EWOULDBLOCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(ConfigError, match="is in use by another process"), runs.lock(tmp_path):
        raise AssertionError("locked twice")


WRITTEN = [
    ".lock", "train.log", "metrics.csv", "run.json", "config.yaml", "summary.json", "report.html", "bad_samples.csv", "checkpoints",
    "eval", "wandb", "tensorboard", "checkpoints/step-000010", "eval/auto.json", "tensorboard/version_0/hparams.yaml",
]  # fmt: skip


@pytest.mark.parametrize("written", WRITTEN)
@pytest.mark.parametrize("target", ["file", "folder", "nothing"])
def test_nothing_is_written_through_a_link_in_a_run_folder(written: str, target: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("theirs")
    (tmp_path / "folder").mkdir()
    link = tmp_path / "run" / written
    link.parent.mkdir(parents=True)
    link.symlink_to(tmp_path / target)
    with pytest.raises(CheckpointError, match=rf"{link} is a symbolic link, .* remove it"), runs.lock(tmp_path / "run"):
        raise AssertionError("locked")
    assert (tmp_path / "file").read_text() == "theirs"
    assert list((tmp_path / "folder").iterdir()) == []
    assert not (tmp_path / "nothing").exists()


def test_a_pipe_in_a_run_folder_is_refused_before_it_blocks(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "train.log")
    with pytest.raises(CheckpointError, match=r"train\.log is neither a file nor a folder"), runs.lock(tmp_path):
        raise AssertionError("locked")


def test_a_run_folder_may_be_a_link_and_so_may_its_parents_and_wandbs_own_links_stay(tmp_path: Path) -> None:
    (tmp_path / "disk" / "run" / "wandb" / "run-1").mkdir(parents=True)
    (tmp_path / "disk" / "run" / "wandb" / "latest-run").symlink_to("run-1")
    (tmp_path / "outputs").symlink_to("disk")
    (tmp_path / "disk" / "alias").symlink_to("run")
    with runs.lock(tmp_path / "outputs" / "alias"):
        assert (tmp_path / "disk" / "run" / ".lock").is_file()


def test_a_folder_that_cannot_be_locked_is_a_storage_error(tmp_path) -> None:
    with pytest.raises(CheckpointError, match=r"gone cannot be locked: .*output_dir"), runs.lock(tmp_path / "gone"):
        pass


def test_a_run_keeps_its_tokenizer_when_the_original_is_gone(tmp_path: Path) -> None:
    folder = write_siglip_tokenizer(tmp_path / "original")
    text = SigLIPTextConfig(width=8, layers=1, heads=1, context_length=16, vocab_size=300, tokenizer=str(folder))
    model = ModelConfig(
        name="small", embed_dim=8, image=ViTConfig(image_size=32, patch_size=8, width=8, layers=1, heads=1), text=text
    )
    expected = build_tokenizer(text)(TEXTS)
    run_dir = tmp_path / "run"
    runs.save_tokenizer(model, run_dir)
    folder.rename(tmp_path / "elsewhere")
    moved = run_dir.rename(tmp_path / "moved")
    assert torch.equal(build_tokenizer(runs.with_saved_tokenizer(model, moved).text)(TEXTS), expected)
    assert runs.with_saved_tokenizer(model, tmp_path / "another") is model
