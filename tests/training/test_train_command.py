"""The train command as a user meets it: what it leaves behind, sweeps, loggers, options, and its errors."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from clip_exp.checkpoints.folders import best, checkpoints, latest, step_of
from clip_exp.data.files import kind_of
from clip_exp.training.opening import flatten
from tests.conftest import REPOSITORY, Run
from tests.runs import TINY, Finished, Train, run_folders
from tests.training.tracking import tensorboard_hparams, wandb_run


def test_digits_reach_95_percent_zero_shot(digits: Finished) -> None:
    assert digits.summary["metrics"]["val/top1"] >= 0.95
    assert digits.summary["seconds"] < 300


def test_a_run_folder_holds_what_the_readme_says(single: Finished) -> None:
    names = {path.name for path in single.folder.iterdir()}
    assert {
        "config.yaml",
        "run.json",
        "metrics.csv",
        "summary.json",
        "report.html",
        "report.png",
        "train.log",
        "checkpoints",
    } <= names
    assert single.record["status"] == "finished"
    assert single.record["steps"] == 20
    with (single.folder / "metrics.csv").open() as handle:
        header = next(csv.reader(handle))
    assert header[:10] == [
        "step",
        "samples_seen",
        "epoch",
        "train/loss",
        "train/lr",
        "train/grad_norm",
        "train/logit_scale",
        "train/samples_per_s",
        "train/data_wait_s",
        "train/compute_s",
    ]
    assert [row["step"] for row in single.metrics] == list(range(1, 21))
    assert single.metrics[-1]["samples_seen"] == 20 * 16
    rates = [row["train/lr"] for row in single.metrics]
    assert rates[:2] == pytest.approx([0.5e-3, 1e-3]), "a tenth of the run is warm-up; the rate is the step's own"
    assert 0 < rates[-1] < rates[2]
    assert {"val/loss", "val/recall@1_i2t", "val/recall@10_t2i"} <= set(single.metrics[-1])
    assert [path.name for path in checkpoints(single.folder)] == ["step-000010", "step-000020"]
    assert "data:image/png;base64," in (single.folder / "report.html").read_text()


def test_the_next_command_is_printed(single: Finished) -> None:
    assert f"run={single.folder}" in single.output.split("next:")[-1]
    assert "step 20/20" in single.output
    assert "samples/s" in single.output


def test_a_sweep_runs_each_job_in_its_own_folder(command, tmp_path) -> None:
    result = command(
        "train.py", "optimizer.lr=1e-3,3e-4", "max_steps=4", f"output_dir={tmp_path}", "-m", cwd=tmp_path
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    folders = run_folders(tmp_path)
    assert [folder.name[-2:] for folder in folders] == ["-0", "-1"]
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in folders]
    assert [summary["steps"] for summary in summaries] == [4, 4]
    assert summaries[0]["metrics"].keys() == summaries[1]["metrics"].keys()
    assert summaries[0]["metrics"] != summaries[1]["metrics"]


def test_jobs_that_compute_the_same_have_folders_of_their_own_and_find_them_again(command, tmp_path) -> None:
    tiny = [word for word in TINY if not word.startswith("resume")]
    sweep = (*tiny, "max_steps=1", "micro_batch_size=4,8", f"output_dir={tmp_path}", "-m")
    for already in (0, 2):
        result = command("train.py", *sweep, cwd=tmp_path)
        assert result.returncode == 0, result.stdout + result.stderr
        folders = run_folders(tmp_path)
        assert [yaml.safe_load((folder / "config.yaml").read_text())["micro_batch_size"] for folder in folders] == [
            4,
            8,
        ]
        assert result.stdout.count("this run is already finished") == already
    jobs = [json.loads((folder / "run.json").read_text())["job"] for folder in folders]
    assert [(job["number"], job["overrides"]) for job in jobs] == [
        (0, ["micro_batch_size=4"]),
        (1, ["micro_batch_size=8"]),
    ]


def test_a_strategy_on_one_device_leaves_the_next_job_of_a_sweep_alone(command, tmp_path) -> None:
    result = command(
        "train.py",
        *TINY,
        "optimizer.lr=1e-3,3e-4",
        "max_steps=1",
        "strategy=ddp",
        f"output_dir={tmp_path}",
        "-m",
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    records = [json.loads((folder / "run.json").read_text()) for folder in run_folders(tmp_path)]
    assert [(record["status"], record["ranks"]) for record in records] == [("finished", 1)] * 2


def test_each_job_of_a_sweep_over_two_devices_runs_once(command, tmp_path) -> None:
    result = command(
        "train.py", *TINY, "optimizer.lr=1e-3,3e-4", "max_steps=3", "strategy=ddp", "trainer.devices=2", f"output_dir={tmp_path}", "-m",
        cwd=tmp_path,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    records = [json.loads((folder / "run.json").read_text()) for folder in run_folders(tmp_path)]
    assert [(record["status"], record["ranks"], record["steps"]) for record in records] == [("finished", 2, 3)] * 2


def test_a_sweep_continues_after_a_failed_job_and_ends_with_its_code(command, tmp_path) -> None:
    result = command("train.py", "global_batch_size=0,64", "max_steps=2", f"output_dir={tmp_path}", "-m", cwd=tmp_path)
    assert result.returncode == 2
    assert "global_batch_size=0 must be greater than 0" in result.stderr
    assert [json.loads((folder / "run.json").read_text())["status"] for folder in run_folders(tmp_path)] == ["finished"]


def test_monitor_keeps_the_best_checkpoint_and_patience_stops(train: Train) -> None:
    run = train(
        *TINY, "max_steps=40", "val_every_n_steps=2", "monitor=val/loss", "patience=2", "min_delta=0", "optimizer.lr=0.3",
        "scheduler=constant", "scheduler.warmup_steps=1", "checkpoint_every_n_steps=2",
    )  # fmt: skip
    losses = {row["step"]: row["val/loss"] for row in run.metrics if "val/loss" in row}
    best_step = min(losses, key=lambda step: losses[step])
    assert step_of(best(run.folder)) == best_step
    assert run.record["best_checkpoint"].endswith(f"step-{best_step:06d}")
    assert run.summary["steps"] == best_step + 2 * 2 < 40


def test_averaged_weights_follow_the_formula(train: Train, tmp_path) -> None:
    run = train(
        *TINY, "max_steps=3", "checkpoint_every_n_steps=1", "callbacks.ema_decay=0.5", "callbacks.progress=none"
    )
    second, third = (run.folder / "checkpoints" / f"step-00000{step}" for step in (2, 3))
    before, raw = load_file(second / "ema.safetensors"), load_file(third / "model.safetensors")
    expected = {name: 0.5 * before[name] + 0.5 * raw[name] for name in raw}
    torch.testing.assert_close(load_file(third / "ema.safetensors"), expected)


def test_an_unreachable_wandb_server_does_not_stop_a_run_and_loggers_get_its_configuration(train: Train) -> None:
    run = train(
        *TINY,
        "max_steps=2",
        "logger=[csv,tensorboard,wandb]",
        "logger.wandb.tags=[red,blue]",
        WANDB_BASE_URL="http://127.0.0.1:9",
        WANDB_API_KEY="0" * 40,
        WANDB_SILENT="true",
    )
    assert run.record["status"] == "finished"
    assert "logging offline" in (run.folder / "train.log").read_text()
    hparams = tensorboard_hparams(run.folder / "tensorboard")
    config, tags = wandb_run(next(run.folder.glob("wandb/offline-run-*/*.wandb")))
    written = yaml.safe_load((run.folder / "config.yaml").read_text())
    assert {key: config[key] for key in written} == written
    assert tags == ["red", "blue"]
    assert config["git"] == run.record["git"]
    assert hparams["optimizer.betas"] == "[0.9, 0.98]"
    assert (hparams["max_steps"], hparams["loss.max_logit_scale"], hparams["model.name"]) == (2, "null", "vit_nano")
    assert set(flatten({**written, "git": config["git"]})) <= set(hparams)


WITH_BACKEND = """
import sys
from functools import partialmethod
import torch

torch.nn.Module.compile = partialmethod(torch.nn.Module.compile, backend="{backend}")
from clip_exp.cli import run

sys.exit(run("train", sys.argv[1:]))
"""


@pytest.mark.exhaustive  # towers of every family are compiled in tests/models
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_towers_train_close_to_plain_ones(backend: str, train: Train, command: Run, tmp_path: Path) -> None:
    """Towers of one layer: the code of each is compiled. inductor, which is what torch takes by itself, takes a minute for them."""
    (tmp_path / "compiled.py").write_text(WITH_BACKEND.format(backend=backend))
    shallow = ("model.image.layers=1", "model.text.layers=1")
    overrides = (*TINY, *shallow, "max_steps=10", "log_every_n_steps=1", "val_every_n_steps=5")
    plain = train(*overrides)
    result = command(str(tmp_path / "compiled.py"), *overrides, "compile=true", f"output_dir={tmp_path}", cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert Finished(run_folders(tmp_path)[-1], result.stdout).losses == pytest.approx(plain.losses, rel=1e-4)


def test_a_run_starts_from_the_weights_of_another(single: Finished, train: Train) -> None:
    weights = latest(single.folder) / "model.safetensors"
    run = train(*TINY, "max_steps=1", "log_every_n_steps=1", f"pretrained={weights}")
    assert run.losses[0] < single.losses[0]


def write_pairs(folder: Path, source: Finished, rows: int = 32) -> Path:
    """A table over a run's drawn scenes, in a folder of its own."""
    scenes = next((source.folder.parents[2] / "data").glob("shapes-*"))
    shutil.copytree(scenes / "train", folder / "train")
    lines = (scenes / "train.csv").read_text().splitlines()
    (folder / "pairs.csv").write_text("\n".join(lines[: rows + 1]) + "\n")
    return folder / "pairs.csv"


CSV = ("model=vit_nano", "data=csv", "global_batch_size=8", "max_steps=2", "data.num_workers=0", "log_every_n_steps=1")


def test_what_was_wrong_with_the_data_is_listed_and_reported_at_the_end(
    single: Finished, train: Train, tmp_path
) -> None:
    pairs = write_pairs(tmp_path, single)
    (tmp_path / "train" / "000003.png").write_bytes(b"<html>not found</html>")
    (tmp_path / "train" / "000005.png").unlink()
    with pairs.open("a") as table:
        table.write(
            "a.png,one,field too many\n" + f"train/000006.png,{'a long caption ' * 40}\n./train/000007.png,\u00a0\n"
        )
    run = train(*CSV, "max_steps=12", f"data.train={pairs}", "data.on_bad_row=skip")
    with (run.folder / "bad_samples.csv").open() as handle:
        reasons = {row["path"]: row["reason"] for row in csv.DictReader(handle)}
    assert sorted(reasons) == ["train/000003.png", "train/000005.png"]
    kinds = {kind_of(reason): 1 for reason in reasons.values()}
    assert run.summary["bad_images"] == {"training": kinds}
    assert "no such file" in kinds
    assert list(run.summary["bad_rows"]["training"].values()) == [1]
    assert run.summary["empty_captions"] == {"training": {"count": 1, "fraction": pytest.approx(1 / 34)}}
    assert run.record["rows"] == 32, "the path of another spelling is one of theirs"
    assert "1 of 34 captions are empty or blank" in (run.folder / "train.log").read_text()
    assert 0 < run.summary["truncated_fraction"] < 0.2
    report = (run.folder / "report.html").read_text()
    for output in (run.output, report):
        assert "2 of training" in output
        assert "1 no such file" in output
        assert "listed in bad_samples.csv" in output
        assert "1 of training" in output, "the bad row"
        assert "1 of training (2.9" in output, "the empty caption"
        assert "of the training captions" in output, "the captions that were cut"


def test_an_unreadable_image_under_error_ends_with_code_3(single: Finished, command, tmp_path) -> None:
    pairs = write_pairs(tmp_path, single)
    (tmp_path / "train" / "000003.png").unlink()
    result = command(
        "train.py",
        *CSV,
        "max_steps=8",
        f"data.train={pairs}",
        "data.on_bad_image=error",
        f"output_dir={tmp_path}/o",
        cwd=tmp_path,
    )
    assert result.returncode == 3
    assert "train/000003.png" in result.stderr
    assert "data.on_bad_image=replace" in result.stderr
    assert "Traceback" not in result.stderr
    assert json.loads((run_folders(tmp_path / "o")[0] / "run.json").read_text())["exit_code"] == 3


def test_ranks_agree_on_the_code_and_give_one_message(single: Finished, command, tmp_path) -> None:
    pairs = write_pairs(tmp_path, single)
    (tmp_path / "train" / "000003.png").unlink()
    overrides = (
        "strategy=ddp",
        "trainer.devices=2",
        "trainer.accelerator=cpu",
        "max_steps=8",
        "data.on_bad_image=error",
    )
    result = command("train.py", *CSV, *overrides, f"data.train={pairs}", f"output_dir={tmp_path}/o", cwd=tmp_path)
    assert result.returncode == 3, result.stderr
    assert result.stderr.count("train/000003.png") == 1
    assert "Traceback" not in result.stderr


BAD_INPUT = {
    "missing table": (["data.train=none.csv"], 2, "none.csv does not exist"),
    "missing column": (["data.train=pairs.csv", "data.caption_key=caption"], 3, "title"),
    "zero batch": (["data.train=pairs.csv", "global_batch_size=0"], 2, "must be greater than 0"),
    "no gpu": (["data.train=pairs.csv", "trainer.accelerator=gpu"], 2, "finds no GPU"),
    "unknown model": (["model=vit_b33"], 2, "did you mean 'vit_b32'"),
}


@pytest.mark.parametrize(("overrides", "code", "expected"), BAD_INPUT.values(), ids=BAD_INPUT.keys())
def test_bad_input_gives_its_code_and_one_message(overrides, code, expected, refused, tmp_path) -> None:
    if "trainer.accelerator=gpu" in overrides and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    (tmp_path / "pairs.csv").write_text("filepath,title\n" + "a.png,a dog\n" * 20)
    result = refused("train.py", *CSV, "global_batch_size=1", *overrides, cwd=tmp_path)
    assert result.returncode == code, result.stderr
    assert expected in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pairs.csv"]


def test_a_read_only_output_folder_ends_with_code_4(command, tmp_path) -> None:
    (tmp_path / "outputs").write_text("a file where the folder should be")
    result = command("train.py", "max_steps=2", cwd=tmp_path)
    assert result.returncode == 4
    assert "output_dir" in result.stderr


@pytest.mark.parametrize("value", ["https://me:{secret}@host/{{}}", "{secret} {{}}"], ids=["address", "environment"])
def test_a_configured_secret_is_refused_and_not_repeated(value: str, command, tmp_path) -> None:
    secret = "s3cret-" + os.urandom(8).hex()
    template = value.format(secret=secret)
    result = command("train.py", "max_steps=1", f"data.templates=['{template}']", cwd=tmp_path, MY_SECRET_KEY=secret)
    assert result.returncode == 2
    assert "data.templates contains" in result.stderr
    assert secret not in result.stdout + result.stderr
    assert list(tmp_path.iterdir()) == []


def test_no_secret_of_the_environment_reaches_the_run_folder(train: Train) -> None:
    secret = "s3cret-" + os.urandom(8).hex()
    run = train(
        *TINY,
        "max_steps=1",
        "logger=wandb",
        "logger.wandb.mode=offline",
        MY_SECRET_KEY=secret,
        WANDB_API_KEY=secret * 2,
    )
    texts = [path.read_bytes() for path in run.folder.rglob("*") if path.is_file()]
    assert not any(secret.encode() in text for text in texts)


def test_a_killed_rank_ends_the_run_with_code_6_and_leaves_no_process(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, str(REPOSITORY / "train.py"), *TINY, "max_steps=100000", "log_every_n_steps=1", "trainer.devices=2", f"output_dir={tmp_path}"],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 120
        while not list(tmp_path.glob("train/*/*/metrics.csv")) and time.monotonic() < deadline:
            time.sleep(0.2)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(children[1]), signal.SIGKILL)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 6, errors
    assert "was killed by signal 9 (SIGKILL)" in errors
    assert not any(Path(f"/proc/{child}").exists() for child in children)
    assert json.loads((run_folders(tmp_path)[0] / "run.json").read_text())["status"] == "failed"


@pytest.mark.exhaustive  # in `make test`, tests/ranks holds that ranks wait for those of an earlier start
def test_a_run_whose_launcher_alone_is_killed_is_resumed_at_once(single: Finished, tmp_path: Path) -> None:
    arguments = [
        *(word for word in TINY if not word.startswith("resume")), "max_steps=20", "log_every_n_steps=1", "trainer.devices=2",
        "checkpoint_every_n_steps=4", "val_every_n_steps=10", f"output_dir={tmp_path}",
    ]  # fmt: skip
    start = [sys.executable, str(REPOSITORY / "train.py"), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(start, cwd=tmp_path, stdout=subprocess.DEVNULL, env=environment) as process:
        deadline = time.monotonic() + 120
        while not list(tmp_path.glob("train/*/*/checkpoints/step-*")) and time.monotonic() < deadline:
            time.sleep(0.05)
        process.kill()
    done = subprocess.run(start, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (folder,) = run_folders(tmp_path)
    assert Finished(folder, done.stdout).losses == pytest.approx(single.losses, rel=1e-5)
