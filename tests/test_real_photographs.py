"""Tests with real photographs and captions from CLIP_EXP_DATA, from a table to scores."""

import json
from pathlib import Path

import pytest

from tests.conftest import Run
from tests.runs import Train

WITHOUT_DEEPSPEED = """
import sys

sys.modules["deepspeed"] = None  # importing it fails
from clip_exp.cli import run

if __name__ == "__main__":  # loader workers import this file
    sys.exit(run("evaluate", sys.argv[1:]))
"""


@pytest.mark.exhaustive
def test_a_sharded_run_on_photographs_is_scored_in_one_process_without_deepspeed(
    real_data: Path, train: Train, command: Run, tmp_path: Path
) -> None:
    run = train(
        "model=vit_tiny", "data=csv", f"data.train={real_data}/flickr8k/train.csv", f"data.val={real_data}/flickr8k/dev.csv",
        "strategy=deepspeed_stage_3", "trainer.accelerator=cpu", "trainer.devices=2", "global_batch_size=16", "max_steps=3", "data.num_workers=0",
    )  # fmt: skip
    (tmp_path / "score.py").write_text(WITHOUT_DEEPSPEED)
    scored = command(
        str(tmp_path / "score.py"), f"run={run.folder}", "task=[auto,image_folder,imagenet]", f"task.image_folder.root={real_data}/flowers/test",
        f"task.imagenet.root={real_data}/imagenet_val_sample", "task.imagenet.templates=simple", f"output_dir={tmp_path}", cwd=tmp_path,
    )  # fmt: skip
    assert scored.returncode == 0, scored.stdout + scored.stderr
    results = {path.stem: json.loads(path.read_text()) for path in (run.folder / "eval").glob("*.json")}
    assert results.keys() == {"val_retrieval", "image_folder", "imagenet"}
    for name in ("recall@1_i2t", "recall@10_t2i", "median_rank_i2t"):
        assert results["val_retrieval"]["metrics"][name] == pytest.approx(
            run.summary["metrics"][f"val/{name}"], abs=0.01
        )
    assert results["image_folder"]["protocol"]["images"] == 200
    imagenet = results["imagenet"]["protocol"]
    assert (imagenet["images"], imagenet["classes"], imagenet["classes_without_images"]) == (150, 1000, 850)


def test_flagai_tables_train_unchanged(real_data: Path, train: Train) -> None:
    folder = real_data / "flagai_layout"
    run = train(
        "model=vit_nano", "data=csv", f"data.train={folder}/pairs.csv", f"data.image_root={folder}/img", "global_batch_size=10", "max_steps=2",
        "data.num_workers=0",
    )  # fmt: skip
    assert run.summary["steps"] == 2
    assert not (run.folder / "bad_samples.csv").exists()
