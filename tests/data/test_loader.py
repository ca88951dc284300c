import hashlib
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.utils.data import Dataset

from clip_exp.data.files import ImageLimits
from clip_exp.data.image_sets import ImageFiles
from clip_exp.data.images import eval_transform, preprocessing_of
from clip_exp.data.loader import (
    Batch,
    EvalImages,
    EvalPairs,
    UnreadableImage,
    UnreadableImageError,
    WorkerLoader,
    report_killed_workers,
)
from clip_exp.data.pairs import TableItems
from clip_exp.data.tables.open import read_table
from clip_exp.errors import DataError
from clip_exp.models.families.clip import ViTConfig
from clip_exp.text.tokenizer import Tokenizer
from tests.data.conftest import noise, write_table
from tests.exhaustive import repeat_beyond

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork.*:DeprecationWarning")


def digest(batches: list[Batch]) -> str:
    state = hashlib.sha256()
    for batch in batches:
        for tensor in batch[:4]:
            state.update(tensor.numpy().tobytes())
        state.update(repr((batch.bad, batch.truncated)).encode())
    return state.hexdigest()


def read(module) -> list[Batch]:
    return list(module.train_dataloader())


class Place:
    """Stand-in for the Trainer, with the attributes that a data module uses."""

    def __init__(self, rank: int, world_size: int, global_step: int = 0) -> None:
        self.global_rank, self.world_size, self.global_step = rank, world_size, global_step
        self.strategy = type("Strategy", (), {"root_device": torch.device("cpu")})()


def test_pixels_and_order_do_not_depend_on_workers(pairs, build):
    batches = read(build(pairs, total_steps=15))
    for workers in (1, 2):
        assert digest(read(build(pairs, total_steps=15, num_workers=workers))) == digest(batches)
    assert digest(read(build(pairs, total_steps=15, seed=1))) != digest(batches)


def test_ranks_share_out_the_batches_of_one_process(pairs, build):
    whole = read(build(pairs, total_steps=8))
    halves = []
    for rank in range(2):
        module = build(pairs, total_steps=8)
        module.trainer = Place(rank, 2)
        halves.append(read(module))
    for batch, *parts in zip(whole, *halves, strict=True):
        assert torch.equal(batch.image, torch.cat([part.image for part in parts]))
        assert torch.equal(batch.caption_id, torch.cat([part.caption_id for part in parts]))


def test_a_restart_in_the_middle_of_an_epoch_sees_the_same_samples(pairs, build):
    whole = read(build(pairs, total_steps=15))
    for step in (1, 5, 6, 14):
        first = build(pairs, total_steps=15)
        first.trainer = Place(0, 1, global_step=step)
        assert first.state_dict()["samples_seen"] == 4 * step
        second = build(pairs, total_steps=15, num_workers=2 if step == 5 else 0)
        second.load_state_dict(first.state_dict())
        assert digest(read(second)) == digest(whole[step:])


def test_every_image_comes_once_per_epoch_with_one_of_its_captions(pairs, build):
    module = build(pairs, global_batch_size=23, total_steps=12)
    assert module.num_rows == 23
    third = set()
    for batch in read(module):
        assert sorted(batch.image_id.tolist()) == list(range(23))
        assert len(set(batch.caption_id.tolist())) == 23
        third.add(batch.caption_id[batch.image_id == 3].item())
    assert len(third) == 3


def test_every_pair_comes_once_per_epoch_where_all_captions_are_asked_for(pairs, build):
    from clip_exp.config.data import Captions

    module = build(pairs, global_batch_size=25, total_steps=2, captions=Captions.all)
    assert module.num_rows == 25
    for batch in read(module):
        assert len(set(batch.caption_id.tolist())) == 25
        assert batch.image_id.bincount().tolist() == [1, 1, 1, 3, *[1] * 19]


def test_images_are_cropped_differently_in_each_epoch(pairs, build):
    one, two = read(build(pairs, global_batch_size=23, total_steps=2))
    by_id = [batch.image[batch.image_id.argsort()] for batch in (one, two)]
    assert not torch.equal(*by_id)


def test_equal_captions_have_equal_ids_and_tokens_are_trimmed(tmp_path, build):
    for i in range(4):
        noise(i).save(tmp_path / f"{i}.png")
    captions = ["A  dog", "a dog", "a cat", "two cats on a mat"]
    file = write_table(tmp_path / "t.csv", [["filepath", "title"], *([f"{i}.png", c] for i, c in enumerate(captions))])
    (batch,) = read(build(file, total_steps=1))
    assert len(set(batch.caption_id.tolist())) == 3
    assert batch.tokens.shape == (4, 7)
    assert batch.tokens.dtype == batch.caption_id.dtype == torch.int64
    assert batch.image.dtype == torch.uint8


def test_truncated_captions_are_counted(pairs, build, caplog):
    module = build(pairs, global_batch_size=23, total_steps=2)
    module.tokenizer.context_length = 5
    for batch in read(module):
        assert batch.truncated == 23
        assert module.on_before_batch_transfer(batch, 0).truncated == 0
    assert module.truncated == 46
    assert len([r for r in caplog.records if "model.text.context_length" in r.getMessage()]) == 1


def spoil(pairs: Path) -> dict[str, str]:
    (pairs.parent / "04.png").unlink()
    (pairs.parent / "07.jpg").write_bytes(b"")
    return {"04.png": "no such file", "07.jpg": "empty file"}


def test_bad_images_are_replaced_alike_on_workers_ranks_and_restarts(pairs, build):
    spoiled = spoil(pairs)
    whole = read(build(pairs, total_steps=15))
    assert {path for batch in whole for path, _ in batch.bad} == set(spoiled)
    assert all(batch.image.shape == (4, 3, 16, 16) for batch in whole)
    assert not {4, 7} & {i for batch in whole for i in batch.image_id.tolist()}
    assert digest(read(build(pairs, total_steps=15, num_workers=2))) == digest(whole)
    later = build(pairs, total_steps=15)
    later.load_state_dict({"samples_seen": 28})
    assert digest(read(later)) == digest(whole[7:])


def test_each_bad_file_is_recorded_once_with_its_reason(pairs, build, tmp_path):
    spoiled = spoil(pairs)
    module = build(pairs, total_steps=20, num_workers=1, run_dir=tmp_path)
    for batch in module.train_dataloader():
        assert module.on_before_batch_transfer(batch, 0).bad == ()
    assert module.bad_samples.reasons == spoiled
    lines = (tmp_path / "bad_samples.csv").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "path,reason"
    assert sorted(lines[1:]) == sorted(f"{path},{reason}" for path, reason in spoiled.items())


def test_too_many_bad_images_end_the_run(pairs, build):
    spoil(pairs)
    module = build(pairs, total_steps=20, max_bad_fraction=0.05)
    batches = read(module)
    with pytest.raises(DataError, match=r"2 of 23 training images.*data\.max_bad_fraction=0\.05"):
        list(map(module.on_before_batch_transfer, batches, range(20)))


@pytest.mark.parametrize("workers", [0, 1])
def test_error_policy_names_file_line_reason_and_the_way_out(pairs, build, workers):
    from clip_exp.config.data import OnBadImage

    spoil(pairs)
    (pairs.parent / "07.jpg").write_bytes((pairs.parent / "05.jpg").read_bytes())
    module = build(pairs, total_steps=8, on_bad_image=OnBadImage.error, num_workers=workers)
    with pytest.raises(DataError) as error:
        read(module)
    message = str(error.value)
    assert message.startswith(f"The image '04.png' ({pairs}, line 8) cannot be read: no such file.")
    assert "data.on_bad_image=replace" in message
    assert "data.image_root" in message
    assert "Traceback" not in message
    assert error.value.exit_code == 3


def test_a_wrong_image_root_is_reported_instead_of_searched_for_ever(pairs, build):
    with pytest.raises(
        UnreadableImageError, match=r"100 images drawn in a row cannot be read.*no such file.*data\.image_root"
    ):
        read(build(pairs, image_root=str(pairs.parent / "elsewhere")))


def test_an_error_keeps_its_message_through_a_workers_wrapping():
    from torch._utils import ExceptionWrapper

    try:
        raise UnreadableImageError("The image is bad: really.\nSecond line: too.")
    except UnreadableImageError:
        wrapped = ExceptionWrapper(where="in DataLoader worker process 0")
    with pytest.raises(UnreadableImageError) as error:
        wrapped.reraise()
    assert str(error.value) == "The image is bad: really.\nSecond line: too."


def test_validation_images_come_with_all_their_captions(pairs):
    table = read_table(pairs)
    dataset = EvalPairs(
        TableItems(table),
        preprocessing=preprocessing_of(ViTConfig(image_size=16, patch_size=8, width=8, layers=1, heads=1)),
        tokenizer=Tokenizer(77),
    )
    assert len(dataset) == 23
    sample = dataset[3]
    assert sample.caption_indices == [3, 4, 5]
    assert len(sample.token_lists) == 3
    assert sample.label == -1


def test_images_are_read_without_captions_and_bad_ones_are_passed_on_with_their_reason(pairs):
    dataset = EvalImages(
        ImageFiles([pairs.parent / "00.png", pairs.parent / "missing.png"]),
        partial(eval_transform, size=16),
        ImageLimits(),
    )
    good, bad = dataset[0], dataset[1]
    assert good.image is not None
    assert good.image.shape == (3, 16, 16)
    assert (bad.image, bad.bad) == (None, (UnreadableImage(str(pairs.parent / "missing.png"), "no such file"),))


def test_signals_for_the_run_leave_the_workers_alone(pairs, build, monkeypatch):
    """A scheduler's SIGTERM or Ctrl-C goes to the whole group; the step that is being saved still needs its batch."""

    def start_a_thread(_: int) -> None:
        """Start a thread in the worker early, as torch's function may."""
        threading.Thread(target=threading.Event().wait, daemon=True).start()

    monkeypatch.setattr(torch, "set_num_threads", start_a_thread)
    before = {process.pid for process in multiprocessing.active_children()}
    batches = iter(build(pairs, total_steps=None, num_workers=1).train_dataloader())
    next(batches)
    (worker,) = {process.pid for process in multiprocessing.active_children()} - before
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        subprocess.run(["kill", f"-{number.value}", str(worker)], check=True)
    time.sleep(0.2)
    for _ in range(10):
        assert len(next(batches).image) == 4
    os.kill(worker, signal.SIGTERM)
    for _ in range(100):
        if Path(f"/proc/{worker}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
            break
        time.sleep(0.05)
    else:
        pytest.fail("the worker outlived its parent's SIGTERM")


ENDS = """
import multiprocessing, sys
from multiprocessing import resource_tracker
from torch.utils.data import TensorDataset
import torch
from clip_exp.data.loader import WorkerLoader

if __name__ == "__main__":
    multiprocessing.set_start_method(sys.argv[1])
    resource_tracker.ensure_running()  # as anything that shares memory does; starting it sets SIGTERM free again
    batches = iter(WorkerLoader(TensorDataset(torch.zeros(8, 1)), num_workers=1, persistent_workers=True))
    next(batches)
"""


@pytest.mark.parametrize("method", repeat_beyond(("fork", "spawn"), ("fork", "forkserver", "spawn")))
def test_a_process_ends_though_its_workers_still_wait_for_work(tmp_path, method):
    """At exit, Python terminates the remaining processes and waits for them without a timeout."""
    (tmp_path / "ends.py").write_text(ENDS)
    subprocess.run([sys.executable, "ends.py", method], cwd=tmp_path, check=True, timeout=60)


class Killed(Dataset[int]):
    """Data set whose second item kills the worker."""

    def __getitem__(self, index: int) -> int:
        if index:
            os.kill(os.getpid(), signal.SIGKILL)
        return index


def reset(*_: object, **__: object) -> None:
    raise ConnectionResetError


# torch may report it again when the loader is deleted.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_killed_worker_is_an_error_with_a_remedy_whatever_the_process_is_doing(monkeypatch):
    reported = r"killed by a signal, usually because memory ran out\. Use fewer workers \(data\.num_workers\)"
    for use in (list, lambda batches: (next(batches), time.sleep(5))):
        batches = iter(WorkerLoader(Killed(), sampler=[0, 1], num_workers=1))
        with pytest.raises(DataError, match=reported), report_killed_workers("data.num_workers"):
            use(batches)
    broken = iter(WorkerLoader(Killed(), sampler=[0], num_workers=1))
    monkeypatch.setattr(broken.batches._data_queue, "get", reset)
    with pytest.raises(DataError, match=reported), report_killed_workers("data.num_workers"):
        next(broken)
    with pytest.raises(ConnectionResetError), report_killed_workers("data.num_workers"):
        reset()
    with pytest.raises(RuntimeError, match="of another kind"), report_killed_workers("data.num_workers"):
        raise RuntimeError("of another kind")
