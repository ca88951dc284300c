"""Command `clip-exp make-shards`: writes a data set as WebDataset shards or Parquet files, on all cores. Does not import torch."""

import multiprocessing
import os
import signal
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clip_exp.config.base import plain, typed_keys
from clip_exp.config.base import problems as broken
from clip_exp.config.commands import MakeShardsConfig, ShardFormat
from clip_exp.config.data import DataConfig, OnBadImage
from clip_exp.data import preflight
from clip_exp.data.files import ImageLimits, kind_of
from clip_exp.data.generated import resolve_generated
from clip_exp.data.manifest import LEFT_OUT, Manifest, Part, check_folder, open_manifest, unwritable
from clip_exp.data.stream import INDEX, open_train_tables
from clip_exp.devices import usable_cores
from clip_exp.errors import PREEMPTED_EXIT_CODE, CheckpointError, ConfigError, DataError, Problems
from clip_exp.progress import progress
from clip_exp.ranks.failure import STOP_SIGNALS, Stopped, stop_on_signals
from clip_exp.ranks.watchdog import signal_at_end_of_parent
from clip_exp.reports.html import command_line
from clip_exp.shards.files import ShardFile, shard_file
from clip_exp.shards.samples import LeftOut, Sample, Samples
from clip_exp.storage import atomic_file, file_sha256


def make_shards(config: MakeShardsConfig, arguments: Sequence[str] = ()) -> int:
    """Write the shards that are not written yet; return the exit code.

    Args:
        arguments: arguments of the command line; each of their keys must have an effect.

    Raises:
        ConfigError: a key is invalid, a table does not exist, or the folder has other content.
        DataError: a table cannot be read, too many rows or images are bad, or an image is and `data.on_bad_image` is `error`.
        CheckpointError: the folder cannot be written, or a file that was read back differs from what was written.
    """
    problems, folder = Problems(), Path()
    problems.add(*broken(config, typed_keys(arguments)), *preflight.check_files(config.data))
    with problems:
        folder = check_folder(config.output)
    problems.raise_if_any()
    data = resolve_generated(config.data, Path(config.output_dir))
    job = _open_job(config, data, folder)
    try:
        with stop_on_signals(), open_manifest(folder, _about(config, job)) as manifest:
            _write_missing(config, job, manifest)
            with unwritable(folder):
                manifest.list_left_out()
    except Stopped as stopped:
        print(f"{stopped} The same command continues from what is finished in {folder}.", file=sys.stderr, flush=True)
        return PREEMPTED_EXIT_CODE
    _print_summary(config, data, job, manifest)
    return 0


class _NothingLeft(Exception):
    """All images of a shard are bad. A tar without samples could not be read."""


@dataclass(frozen=True)
class Job:
    """Task of writing shards, which the processes get when they start."""

    folder: Path
    samples: Samples
    size: int  # samples per shard
    file: ShardFile
    stop_at_bad: bool  # a bad image is an error

    @property
    def shards(self) -> int:
        """Number of shards."""
        return -(-len(self.samples) // self.size)

    def numbers(self, shard: int) -> range:
        """Return the numbers of the samples of a shard."""
        return range(shard * self.size, min((shard + 1) * self.size, len(self.samples)))

    def name(self, shard: int) -> str:
        """Return the name of the file of a shard."""
        return f"{shard:05d}{self.file.ending}"

    def write(self, shard: int) -> Part:
        """Write a shard under a temporary name, read it back, and rename it.

        Raises:
            DataError: an image is bad, and that is an error.
            CheckpointError: the file differs from what was written.
            OSError: the file cannot be written.
        """
        left_out: list[LeftOut] = []

        def good() -> Iterator[Sample]:
            for found in self.samples.read(self.numbers(shard)):
                if isinstance(found, Sample):
                    yield found
                elif self.stop_at_bad:
                    raise DataError(self.samples.unreadable(found))
                else:
                    left_out.append(found)

        # Taken before the images are read, so that a change in between is found by the next start.
        inputs = self.samples.fingerprint(self.numbers(shard))
        path = self.folder / self.name(shard)
        try:
            with atomic_file(path) as temporary:
                written = list(self.file.write(temporary, good()))
                if not written:
                    raise _NothingLeft
                if list(self.file.read(temporary)) != written:
                    raise CheckpointError(
                        f"{path} was read back, and differs from what was written: check the disk and the memory, and repeat the "
                        "same command."
                    )
                facts = {"bytes": temporary.stat().st_size, "sha256": file_sha256(temporary)}
        except _NothingLeft:
            path.unlink(missing_ok=True)  # of an earlier start, when its images were good
            return Part(shard, [], 0, inputs, [*left_out])
        return Part(shard, [self.name(shard)], len(written), inputs, [*left_out], facts)


def _open_job(config: MakeShardsConfig, data: DataConfig, folder: Path) -> Job:
    """Open and check the tables.

    Raises:
        ConfigError, DataError: see `make_shards`.
    """
    tables = [table for _, table in open_train_tables(data, Path(config.output_dir) / INDEX)]
    if found := [problem for table in tables for problem in preflight.check_origin("data.train", table, data)]:
        raise DataError("\n".join(found))
    samples = Samples(tuple(tables), data.captions, ImageLimits.of(data))
    if samples.several_captions and data.columns:
        raise ConfigError(
            "data.columns has a value for each row, but some images have several rows: set data.captions=all to make each row a sample."
        )
    file = shard_file(config.format, samples.several_captions, samples.shapes)
    return Job(folder.absolute(), samples, config.shard_size, file, data.on_bad_image is OnBadImage.error)


def _about(config: MakeShardsConfig, job: Job) -> dict[str, Any]:
    """Return what determines the shards."""
    data = config.data
    keys = ("captions", "columns", "max_rows", "filter", "max_image_pixels", "max_image_bytes", "image_formats")
    tables = job.samples.tables
    files = {
        f"{name}{f' of source {number}' if len(tables) > 1 else ''}": file
        for number, table in enumerate(tables, start=1)
        for name, file in table.fingerprint().items()
    }
    return {
        "format": plain(config.format),
        "shard_size": config.shard_size,
        **{f"data.{key}": plain(getattr(data, key)) for key in keys},
        "the number of samples": len(job.samples),
        **files,
    }


def _write_missing(config: MakeShardsConfig, job: Job, manifest: Manifest) -> None:
    """Write the shards that are not finished, or whose images have changed since."""
    workers = min(config.num_workers or usable_cores(), job.shards)
    with _pool(workers, job) as pool, progress(len(job.samples), f"{job.shards:,} shards") as advance:
        # One task per shard; a few are submitted ahead, since there may be millions.
        ahead = iter(range(job.shards))
        running: dict[Future[Part | None], int] = {}
        while True:
            while len(running) < 2 * workers and (shard := next(ahead, None)) is not None:
                finished = manifest.finished.get(shard)
                running[pool.submit(_write, shard, finished.inputs if finished else None)] = shard
            if not running:
                return
            for done in wait(running, return_when=FIRST_COMPLETED).done:
                part = done.result()
                if part is not None:
                    manifest.add(part)
                    _check_left_out(config.data, job, manifest)
                advance(len(job.numbers(running.pop(done))))


_job: Job  # of a process that writes shards


def _write(shard: int, finished: str | None) -> Part | None:
    """Write a shard; return None if it is finished, and its images are those of `finished`."""
    if finished is not None and _job.samples.fingerprint(_job.numbers(shard)) == finished:
        return None
    return _job.write(shard)


def _start(job: Job, parent: int) -> None:
    """Prepare a process that writes shards. It ends with its parent, which handles the stop signals."""
    global _job
    _job = job
    signal_at_end_of_parent(signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def _pool(workers: int, job: Job) -> Iterator[ProcessPoolExecutor]:
    """Yield processes that write shards; kill them if the block ends by an exception.

    Raises:
        DataError: a process was killed.
        CheckpointError: the folder cannot be written.
    """
    others = {*multiprocessing.active_children()}
    # Forked, so that the tables are not copied
    context = multiprocessing.get_context("fork")
    pool = ProcessPoolExecutor(workers, context, _start, (job, os.getpid()))
    try:
        # The first task starts all processes, before there are threads.
        pool.submit(os.getpid).result()
        with unwritable(job.folder):
            yield pool
        pool.shutdown()
    except BrokenProcessPool as error:
        raise DataError(
            "A process that writes shards was killed by a signal, usually because memory ran out. Use fewer (num_workers=…); the same "
            "command continues."
        ) from error
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in {*multiprocessing.active_children()} - others:
            process.kill()
            process.join()


def _check_left_out(data: DataConfig, job: Job, manifest: Manifest) -> None:
    """Check that not too many images are bad.

    Raises:
        DataError: the fraction of bad images exceeds `data.max_bad_fraction`.
    """
    if manifest.bad > data.max_bad_fraction * len(job.samples):
        path, reason, where = manifest.left_out[0]
        raise DataError(
            f"{manifest.bad:,} of {len(job.samples):,} images cannot be used, more than data.max_bad_fraction="
            f"{data.max_bad_fraction:g}; the first is {path!r} ({where}): {reason}. Check data.image_root, repair the images, or "
            "increase data.max_bad_fraction."
        )


def _print_summary(config: MakeShardsConfig, data: DataConfig, job: Job, manifest: Manifest) -> None:
    parts = manifest.finished.values()
    size = sum(part.facts["bytes"] for part in parts if part.files) / 1e6
    folder = Path(config.output or "").expanduser()
    print(f"written: {folder}/*{job.file.ending} ({manifest.rows:,} samples, {size:,.1f} MB)")
    if manifest.left_out:
        kinds = Counter(kind_of(reason) for _, reason, _ in manifest.left_out).most_common()
        listed = ", ".join(f"{count:,} {kind}" for kind, count in kinds)
        print(f"left out: {len(manifest.left_out):,} images ({listed}), listed in {folder / LEFT_OUT}")
    if bad_rows := sum(table.skipped for table in job.samples.tables):
        print(f"skipped: {bad_rows:,} bad rows; clip-exp check-data lists them")
    read = ["data=csv", f"data.train={folder}/*{job.file.ending}"]
    if config.format is ShardFormat.parquet:
        read += ["data.image_key=image", "data.caption_key=caption"]
    elif job.samples.several_captions:
        read.append("data.caption_key=captions")
    read += [f"data.columns=[{','.join(data.columns)}]"] if data.columns else []
    print(f"next: {command_line('train', read)}")
