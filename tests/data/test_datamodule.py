import csv
import logging
import time
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch

from clip_exp.config.data import Captions, GenerateConfig, Generator
from clip_exp.data import loader
from clip_exp.data.bad_samples import VALIDATION, BadSamples
from clip_exp.data.datamodule import EvalSampler, TimedLoader
from clip_exp.data.loader import UnreadableImage
from clip_exp.errors import ConfigError, DataError
from tests.data.conftest import noise, write_table
from tests.data.test_loader import Place


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("count", [1, 5, 23, 64])
def test_ranks_get_equally_many_validation_batches_and_miss_nothing(count, world_size):
    ranks = [list(EvalSampler(count, 8, rank, world_size)) for rank in range(world_size)]
    assert len({tuple(map(len, batches)) for batches in ranks}) == 1
    assert len(ranks[0]) == len(EvalSampler(count, 8, 0, world_size))
    indices = [i for batches in ranks for batch in batches for i in batch]
    assert set(indices) == set(range(count))
    assert len(indices) < count + world_size


def labeled(folder: Path) -> Path:
    records = [["filepath", "title", "kind"]]
    for i in range(5):
        noise(i).save(folder / f"v{i}.png")
        records += [[f"v{i}.png", f"{variant} of {i}", ["cat", "dog", ""][i % 3]] for variant in ("one", "two")]
    return write_table(folder / "val.csv", records)


def test_validation_batches_hold_images_captions_and_labels(pairs, build, tmp_path):
    module = build(pairs, val=labeled(tmp_path), label_key="kind")
    (batch,) = module.val_dataloader()
    assert module.class_names == ["cat", "dog"]
    assert batch.index.tolist() == [0, 1, 2, 3, 4]
    assert batch.label.tolist() == [0, 1, -1, 0, 1]
    assert batch.caption_image.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert batch.caption_index.tolist() == list(range(10))
    assert batch.image.shape == (5, 3, 16, 16)
    assert batch.tokens.shape == (10, 5)


def test_validation_labels_lose_their_blanks_and_those_that_are_alike_are_reported(pairs, build, tmp_path, caplog):
    val = labeled(tmp_path)
    val.write_text(val.read_text().replace("one of 3,cat", "one of 3,cat ").replace("of 4,dog", "of 4,Dog"))
    module = build(pairs, val=val, label_key="kind")
    (batch,) = module.val_dataloader()
    assert module.class_names == ["Dog", "cat", "dog"]
    assert batch.label.tolist() == [1, 2, -1, 1, 0]
    assert "2 labels differ only in case or blanks" in caplog.text
    assert "'Dog' and 'dog'" in caplog.text


def test_bad_validation_images_are_left_out_and_counted(pairs, build, tmp_path):
    val = labeled(tmp_path)
    (tmp_path / "v1.png").unlink()
    module = build(pairs, val=val, label_key="kind", run_dir=tmp_path, max_bad_fraction=0.3)
    (batch,) = module.val_dataloader()
    assert batch.index.tolist() == [0, 2, 3, 4]
    assert set(batch.caption_image.tolist()) == {0, 2, 3, 4}
    module.on_before_batch_transfer(batch, 0)
    assert module.bad_val_samples.reasons == {"v1.png": "no such file"}
    assert "v1.png,validation: no such file" in (tmp_path / "bad_samples.csv").read_text(encoding="utf-8")


def test_batches_of_training_are_announced_before_their_copy_to_the_device_and_no_others(pairs, build, tmp_path):
    module = build(pairs, val=labeled(tmp_path))
    announced: list[None] = []
    module.on_train_batch = lambda: announced.append(None)
    module.on_before_batch_transfer(next(iter(module.val_dataloader())), 0)
    assert len(announced) == 0
    module.on_before_batch_transfer(next(iter(module.train_dataloader())), 0)
    assert len(announced) == 1


def test_a_validation_batch_of_bad_images_alone_is_empty(pairs, build, tmp_path):
    val = labeled(tmp_path)
    for i in range(5):
        (tmp_path / f"v{i}.png").unlink()
    module = build(pairs, val=val)
    (batch,) = module.val_dataloader()
    assert batch.image.shape == (0, 3, 16, 16)
    with pytest.raises(DataError, match="5 of 5 validation images"):
        module.on_before_batch_transfer(batch, 0)


def test_generated_data_is_made_below_the_output_folder(build, tmp_path):
    module = build(None, generate=GenerateConfig(kind=Generator.digits, rows=40, val_rows=10), label_key="label")
    assert module.num_rows == 40
    assert module.class_names == sorted(module.class_names)
    assert set(module.class_names) <= {"zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"}
    assert next(iter(module.val_dataloader())).image.shape == (10, 3, 16, 16)
    assert [path.name for path in (tmp_path / "outputs" / "data").iterdir()] == ["digits-v1-40x10-seed0"]


def test_rows_can_be_limited_to_the_first(pairs, build):
    assert build(pairs, max_rows=5).num_rows == 4
    assert build(pairs, max_rows=5, captions=Captions.all).num_rows == 5


def test_a_batch_that_the_ranks_cannot_share_is_refused(pairs, build):
    module = build(pairs, global_batch_size=5)
    module.trainer = Place(0, 2)
    with pytest.raises(ConfigError, match=r"global_batch_size=5 is not divisible by the number of devices \(2\)"):
        module.train_dataloader()
    with pytest.raises(ConfigError, match=r"^data\.train has no value"):
        build(None).setup()


def test_the_start_of_the_workers_is_not_waited_for_data(monkeypatch):
    now_s = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now_s[0])

    class Loader:
        def __iter__(self):
            for batch, seconds in enumerate((30, 2, 3)):
                now_s[0] += seconds
                yield batch

    loader = TimedLoader(Loader())
    assert list(loader) == [0, 1, 2]
    assert loader.waited_s == 5


def test_ranks_that_read_different_tables_are_refused_on_all_of_them(pairs, build):
    """A table may be replaced between the starts of two ranks."""
    module = build(str(pairs), val=str(pairs))
    tables = []
    module.require_same_tables(lambda own: tables.append(own) or [own, own])
    pairs.write_text(pairs.read_text().replace("caption 0 of image 7", "another caption"))
    module = build(str(pairs), val=str(pairs))
    with pytest.raises(DataError, match=r"data\.train does not have the same rows on all ranks"):
        module.require_same_tables(lambda own: [*tables, own])
    module = build(str(pairs))
    with pytest.raises(DataError, match=r"data\.val does not have the same rows on all ranks"):
        module.require_same_tables(lambda own: [{**own, "data.val": "x"}, own])


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")  # on fewer cores than the test pretends
@pytest.mark.parametrize(("device_type", "count"), [("cpu", 8), ("cuda", 15)])
def test_the_loaders_have_a_worker_per_core_on_a_gpu_and_none_without_a_batch(
    pairs, build, monkeypatch, device_type, count
):
    monkeypatch.setattr("clip_exp.data.loader.usable_cores", lambda: 16)
    module = build(pairs, val=str(pairs), num_workers=None)
    module.trainer = Place(0, 1)
    module.trainer.strategy.root_device = torch.device(device_type)
    assert module.train_dataloader().loader.num_workers == count
    assert len(module.val_dataloader()) == module.val_dataloader().num_workers == 1


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
def test_training_warns_before_its_batches_are_more_than_the_shared_memory(pairs, build, monkeypatch, caplog):
    """Four images of 16 x 16 in each of 2 x 3 batches."""
    for free, warns in ((3 * 16 * 16 * 4 * 6, False), (3 * 16 * 16 * 4 * 6 - 1, True)):
        monkeypatch.setattr(loader, "_shared_memory", lambda free=free: loader._SharedMemory(64 << 20, free))
        build(pairs, num_workers=3).train_dataloader()
        assert ("Training may run out of shared memory" in caplog.text) == warns
    assert "(data.num_workers). With data.num_workers=0 no shared memory is needed." in caplog.text
    caplog.clear()
    build(pairs, num_workers=0).train_dataloader()
    assert not caplog.text


def test_ranks_and_restarts_share_one_record_of_bad_images(tmp_path, caplog):
    file = tmp_path / "bad_samples.csv"
    one, two = (BadSamples(100, 0.03, what="training", file=file) for _ in range(2))
    val = BadSamples(10, 0.5, what="validation", mark=VALIDATION, file=file)
    with caplog.at_level(logging.WARNING):
        one.add([UnreadableImage("a.jpg", "no such file"), UnreadableImage('odd, "name".jpg', "empty file")])
        val.add([UnreadableImage("v.jpg", "empty file")])
        two.add([UnreadableImage("a.jpg", "no such file"), UnreadableImage("b.jpg", "cut, short")])
        one.add([UnreadableImage("a.jpg", "no such file")])
    with open(file, newline="", encoding="utf-8") as stream:
        records = list(csv.reader(stream))
    assert records[0] == ["path", "reason"]
    assert [path for path, _ in records[1:]] == ["a.jpg", 'odd, "name".jpg', "v.jpg", "b.jpg"]
    assert len(two) == 3
    assert len(val) == 1
    restarted = BadSamples(100, 0.03, what="training", file=file)
    with pytest.raises(DataError, match="4 of 100"):
        restarted.add([UnreadableImage("c.jpg", "empty file")])


def test_without_locks_ranks_still_share_one_record_of_bad_images(tmp_path, no_locks):
    file = tmp_path / "bad_samples.csv"
    one, two = (BadSamples(100, 0.5, what="training", file=file) for _ in range(2))
    one.add([UnreadableImage("a.jpg", "no such file")])
    two.add([UnreadableImage("b.jpg", "empty file")])
    assert set(two.reasons) == {"a.jpg", "b.jpg"}
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


class Recorder(pl.LightningModule):
    """Module with a parameter that records its batches."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen: list[list[int]] = []
        self.validated: list[int] = []

    def training_step(self, batch, batch_idx):
        assert batch.bad == ()
        self.seen.append(batch.caption_id.tolist())
        return self.weight.sum()

    def validation_step(self, batch, batch_idx):
        self.validated += batch.index.tolist()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(module, data, steps: int, folder: Path, ckpt: Path | None = None) -> pl.Trainer:
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=steps,
        max_epochs=-1,
        check_val_every_n_epoch=None,
        val_check_interval=5,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(module, datamodule=data, ckpt_path=ckpt, weights_only=True)
    return trainer


@pytest.mark.filterwarnings("ignore::pytorch_lightning.utilities.warnings.PossibleUserWarning")
@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")  # Lightning 2.6 with torch 2.14
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork.*:DeprecationWarning")
def test_lightning_sees_the_same_stream_after_a_restart_in_the_middle_of_an_epoch(pairs, build, tmp_path):
    (pairs.parent / "04.png").unlink()
    whole, first, second = Recorder(), Recorder(), Recorder()
    val = labeled(tmp_path)
    fit(whole, build(pairs, val=val, total_steps=20), 20, tmp_path)
    trainer = fit(first, build(pairs, val=val, total_steps=20), 9, tmp_path)
    trainer.save_checkpoint(tmp_path / "nine.ckpt")
    data = build(pairs, val=val, total_steps=20, num_workers=2, run_dir=tmp_path)
    fit(second, data, 20, tmp_path, tmp_path / "nine.ckpt")
    assert len(whole.seen) == 20
    assert first.seen == whole.seen[:9]
    assert second.seen == whole.seen[9:]
    assert whole.validated == [0, 1, 2, 3, 4] * 4
    assert data.bad_samples.reasons == {"04.png": "no such file"}
