"""Training by the command line on WebDataset shards."""

import pytest
import torch

from tests.data.tables.shard_files import jpeg, write_shard
from tests.runs import Train

OVERRIDES = (
    "model=vit_nano", "data=csv", "global_batch_size=16", "precision=32-true", "trainer.accelerator=cpu",
    "log_every_n_steps=1", "resume=never",
)  # fmt: skip


def test_a_real_shard_trains_and_validates(train: Train, real_data) -> None:
    shard = real_data / "webdataset" / "cc12m-train-0000.tar"
    run = train(
        *OVERRIDES, f"data.train={shard}", f"data.val={shard}", "data.num_workers=2", "data.caption_key=caption",
        "max_steps=4", "val_every_n_steps=4", "optimizer.lr=1e-3",
    )  # fmt: skip
    assert len(run.losses) == 4
    assert run.summary["samples_seen"] == 64
    assert any(key.startswith("val/recall@1") for key in run.metrics[-1])
    assert not (run.folder / "bad_samples.csv").exists()


def test_two_ranks_on_twenty_shards_compute_what_one_process_does(train: Train, tmp_path) -> None:
    for shard in range(20):
        contents = {}
        for sample in range(3):
            key = f"{shard:02d}{sample:04d}"
            image = b"<html>" if (shard, sample) == (7, 1) else jpeg(3 * shard + sample)
            contents |= {f"{key}.jpg": image, f"{key}.txt": f"image {sample} of shard {shard}", f"{key}.json": {}}
        write_shard(tmp_path / f"pairs-{shard:04d}.tar", contents)
    overrides = (*OVERRIDES, f"data.train={tmp_path}/pairs-{{0000..0019}}.tar", "max_steps=8")
    alone = train(*overrides, "data.num_workers=0")
    ranks = train(*overrides, "data.num_workers=1", "trainer.devices=2", "strategy=ddp")
    assert len(alone.losses) == 8
    assert ranks.losses == pytest.approx(alone.losses, rel=1e-5)
    torch.testing.assert_close(ranks.weights, alone.weights, rtol=0, atol=1e-4)
    for run in (alone, ranks):
        (_, bad) = (run.folder / "bad_samples.csv").read_text().splitlines()
        assert bad.startswith(f"{tmp_path}/pairs-0007.tar/070001.jpg,not an image")
