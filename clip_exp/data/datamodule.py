"""LightningDataModule for image-text pairs, which assembles the stream, the data sets and the loaders.

`PairsDataModule.train_dataloader` iterates over the global order of `data.stream`. `StreamSampler` gives each rank its
contiguous slice of every global batch, so the samples of a step do not depend on the number of ranks. The checkpoint
stores two things: the number of samples seen, and a fingerprint of the data, which is compared when the run is resumed.
"""

import hashlib
import json
import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from pytorch_lightning import LightningDataModule
from torch.utils.data import DataLoader, Sampler

from clip_exp.config.base import shown
from clip_exp.config.data import DataConfig
from clip_exp.data.bad_samples import VALIDATION, BadSamples
from clip_exp.data.files import ImageLimits
from clip_exp.data.generated import resolve_generated
from clip_exp.data.image_sets import warn_similar_labels
from clip_exp.data.images import Preprocessing
from clip_exp.data.loader import (
    Batch,
    Collate,
    EvalBatch,
    EvalCollate,
    EvalPairs,
    TrainPairs,
    WorkerLoader,
    count_workers,
)
from clip_exp.data.pairs import Items
from clip_exp.data.preflight import VAL, changes, fingerprint, stream_changes
from clip_exp.data.reading import ReadLimit
from clip_exp.data.stream import INDEX, Sources, Stream, open_all
from clip_exp.data.transform import build_transform
from clip_exp.errors import CheckpointError, ConfigError, DataError
from clip_exp.ranks import group
from clip_exp.text.tokenizer import Tokenizes

log = logging.getLogger(__name__)

EVAL_BATCH_SIZE = 64  # images


@dataclass(eq=False)
class StreamSampler(Sampler[list[int]]):
    """Batch sampler that yields this rank's contiguous slice of every global batch, as positions of the stream.

    A batch may span two epochs, so no row is ever dropped.
    """

    global_batch_size: int  # samples per optimizer step over all ranks; a multiple of `world_size`
    rank: int = 0
    world_size: int = 1
    start_sample: int = 0  # number of samples that were seen before
    total_samples: int | None = None  # position at which the stream ends; None: infinite

    def __post_init__(self) -> None:
        if self.global_batch_size % self.world_size:
            raise ValueError(
                f"global_batch_size={self.global_batch_size} is not divisible by the number of ranks ({self.world_size})"
            )
        self.local_batch_size = self.global_batch_size // self.world_size

    def __iter__(self) -> Iterator[list[int]]:
        step_start = self.start_sample
        # Contiguous slices, not every n-th sample: the gathered global batch is then in the same order for any number
        # of ranks.
        while self.total_samples is None or step_start < self.total_samples:
            first = step_start + self.rank * self.local_batch_size
            yield list(range(first, first + self.local_batch_size))
            step_start += self.global_batch_size


@dataclass(eq=False)
class EvalSampler(Sampler[list[int]]):
    """Batch sampler for validation, with the same number of indices on every rank.

    If the images do not divide evenly, the last indices wrap around to the first images. The reader of the results
    drops duplicates.
    """

    count: int
    batch_size: int
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        self._per_rank = -(-self.count // self.world_size)

    def __len__(self) -> int:
        return -(-self._per_rank // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        for start in range(0, self._per_rank, self.batch_size):
            steps = range(start, min(start + self.batch_size, self._per_rank))
            yield [(step * self.world_size + self.rank) % self.count for step in steps]


class TimedLoader:
    """Loader that measures how long training waits for batches.

    The first batch is not counted, because it includes the start of the workers.

    Args:
        loader: loader of the batches.
        on_wait: called before each wait but that for the first batch.
    """

    def __init__(self, loader: "DataLoader[Batch]", on_wait: Callable[[], None] = lambda: None) -> None:
        self.loader = loader
        self.on_wait = on_wait
        self.waited_s = 0.0

    def __iter__(self) -> Iterator[Batch]:
        batches = iter(self.loader)
        yield from islice(batches, 1)
        while True:
            self.on_wait()
            started_s = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            finally:
                self.waited_s += time.perf_counter() - started_s
            yield batch


class PairsDataModule(LightningDataModule):
    """Data of a training run. Its state is the number of samples seen and a fingerprint of the data.

    Rank, world size and device come from the Trainer. Without a Trainer, there is one process on the CPU.

    Args:
        config: data configuration.
        preprocessing: image preprocessing of the model.
        tokenizer: tokenizer for the captions.
        global_batch_size: samples per optimizer step over all ranks.
        total_steps: optimizer step at which the stream ends; None: infinite. May be set after `setup`, when `num_rows`
            is known.
        seed: seed of the order, the captions and the crops.
        output_dir: folder for the table indexes and for generated data.
        pad_multiple: length of the token batches is padded to a multiple of this number.
        run_dir: folder of the run, for `bad_samples.csv`. May be set later, before the loaders are created.
        opened: opened data of `config`, to avoid opening it again; None for generated data.

    Attributes:
        stream, val: training stream and validation images (None without validation), available after `setup`.
        class_names: labels of the validation data, in the order of `EvalBatch.label`; empty without labels.
        bad_samples, bad_val_samples: distinct images that could not be used, with their reasons.
        truncated: number of the samples seen with a truncated caption or other text.
        on_train_batch: callback for each training batch, before the batch is copied to the device.
        on_wait: callback before each wait for a training batch.
    """

    def __init__(
        self,
        config: DataConfig,
        *,
        preprocessing: Preprocessing,
        tokenizer: Tokenizes,
        global_batch_size: int,
        total_steps: int | None = None,
        seed: int = 0,
        output_dir: str | Path = "outputs",
        pad_multiple: int = 1,
        run_dir: Path | None = None,
        opened: Sources | None = None,
    ) -> None:
        super().__init__()
        self._opened = opened
        self.config, self.seed = config, seed
        self.preprocessing, self.tokenizer, self.pad_multiple = preprocessing, tokenizer, pad_multiple
        self.global_batch_size, self.total_steps = global_batch_size, total_steps
        self.output_dir, self.run_dir = Path(output_dir), run_dir
        self.start_sample = 0
        self.truncated = 0
        self.on_train_batch: Callable[[], None] = lambda: None
        self.on_wait: Callable[[], None] = lambda: None
        self.stream: Stream | None = None
        self.val: Items | None = None
        self.bad_samples: BadSamples | None = None
        self.bad_val_samples: BadSamples | None = None
        self.class_names: list[str] = []
        self._train_loader: TimedLoader | None = None

    def setup(self, stage: str | None = None) -> None:
        """Open the tables, or generate them. Further calls do nothing.

        Raises: ConfigError, DataError; see `open_sources`.
        """
        if self.stream is not None:
            return
        config = resolve_generated(self.config, self.output_dir)
        opened = self._opened or open_all(config, self.output_dir / INDEX)
        self.stream, self.val = Stream(opened.train, config, self.seed), opened.val
        if self.val is not None:
            self._eval_pairs = EvalPairs(
                self.val,
                preprocessing=self.preprocessing,
                tokenizer=self.tokenizer,
                on_bad_image=config.on_bad_image,
                limits=ImageLimits.of(config),
            )
            self.class_names = self.val.class_names
            warn_similar_labels(self.class_names, f"data.val={shown(config.val)}")
        self._fingerprint = fingerprint(opened, config)

    @property
    def num_rows(self) -> int:
        """Number of samples per epoch: the rows of all sources, regardless of their weights."""
        return len(self._stream)

    def images_of_step(self, step: int) -> list[str]:
        """Return the names of the images of an optimizer step, counted from 1, as written in the table."""
        names = []
        for position in range((step - 1) * self.global_batch_size, step * self.global_batch_size):
            source, _, row = self._stream[position]
            names.append(source.rows.image_name(row))
        return names

    @property
    def _stream(self) -> Stream:
        self.setup()
        assert self.stream is not None
        return self.stream

    @property
    def has_validation(self) -> bool:
        """True if there is validation data."""
        self.setup()
        return self.val is not None

    @property
    def val_images(self) -> int | None:
        """Number of validation images; None without validation data."""
        self.setup()
        return None if self.val is None else len(self.val)

    @property
    def data_wait_s(self) -> float:
        """Total time that training has waited for batches, in seconds."""
        return 0.0 if self._train_loader is None else self._train_loader.waited_s

    def train_dataloader(self) -> TimedLoader:
        """Return a loader of this rank's batches, from `start_sample` to `total_steps` or infinite."""
        stream, config = self._stream, self.config
        self.bad_samples = self._open_bad_samples(stream.images, "training")
        dataset = TrainPairs(
            stream,
            image_size=self.preprocessing.size,
            tokenizer=self.tokenizer,
            augmentation=config.augmentation,
            transform=build_transform(config.transform, self.preprocessing.size),
            on_bad_image=config.on_bad_image,
            limits=ImageLimits.of(config),
        )
        rank, world_size = self._rank_and_world_size()
        total = None if self.total_steps is None else self.total_steps * self.global_batch_size
        sampler = StreamSampler(self.global_batch_size, rank, world_size, self.start_sample, total)
        collate = Collate(self.tokenizer, self.pad_multiple)
        # Tokens are small in comparison, so they are not counted.
        features = sum(math.prod(shape) for shape in stream.sources[0].rows.shapes.values() if shape is not None)
        sample_bytes = self._image_bytes + 4 * features
        loader = self._loader(dataset, sampler, collate, sampler.local_batch_size * sample_bytes)
        if group.is_main() and (shortage := loader.shortage("data.num_workers")):
            log.warning(shortage)
        self._train_loader = TimedLoader(loader, lambda: self.on_wait())
        return self._train_loader

    def val_dataloader(self) -> "DataLoader[EvalBatch] | list[Any]":
        """Return a loader of this rank's part of the validation images; an empty list without `data.val`."""
        self.setup()
        if self.val is None:
            return []
        dataset = self._eval_pairs
        self.bad_val_samples = self._open_bad_samples(len(dataset), "validation", VALIDATION)
        rank, world_size = self._rank_and_world_size()
        sampler = EvalSampler(len(dataset), EVAL_BATCH_SIZE, rank, world_size)
        collate = EvalCollate(self.tokenizer, self.preprocessing.size, self.pad_multiple)
        return self._loader(dataset, sampler, collate, EVAL_BATCH_SIZE * self._image_bytes)

    def limited_val_batches(self, limit: float | None) -> int | float:
        """Return `trainer.limit_val_batches` for Lightning: a fraction is at least one batch, which Lightning would refuse."""
        if limit is None or isinstance(limit, int):
            return 1.0 if limit is None else limit
        # Without a Trainer, which is about to be built
        batches = len(EvalSampler(len(self._eval_pairs), EVAL_BATCH_SIZE, group.rank(), group.world_size()))
        return max(1, int(limit * batches))

    @property
    def _image_bytes(self) -> int:
        return 3 * self.preprocessing.size**2

    def _open_bad_samples(self, images: int, what: str, mark: str = "") -> BadSamples:
        file = None if self.run_dir is None else self.run_dir / "bad_samples.csv"
        return BadSamples(images, self.config.max_bad_fraction, what=what, mark=mark, file=file)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Record the bad images and truncated captions that the workers reported with this batch.

        Raises: DataError if the fraction of bad images exceeds `data.max_bad_fraction`.
        """
        # Counted here, in the training process, because the objects of a worker process are copies. Lightning calls
        # this hook once per batch that is used, so batches that were prefetched and never used do not count.
        if isinstance(batch, Batch):
            self.on_train_batch()
            if batch.truncated and not self.truncated:
                log.warning(
                    "Captions longer than %d tokens are truncated (model.text.context_length).",
                    self.tokenizer.context_length,
                )
            self.truncated += batch.truncated
            if batch.bad and self.bad_samples is not None:
                self.bad_samples.add(batch.bad)
            return batch._replace(bad=(), truncated=0)
        if isinstance(batch, EvalBatch):
            if batch.bad and self.bad_val_samples is not None:
                self.bad_val_samples.add(batch.bad)
            return batch._replace(bad=())
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Return `samples_seen`, the samples used by optimizer steps over all ranks, and `data`, the fingerprint."""
        self.setup()
        # From the steps, not from the loader: workers prefetch batches that training has not seen yet.
        steps = 0 if self.trainer is None else self.trainer.global_step
        return {"samples_seen": steps * self.global_batch_size, "data": self._fingerprint}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue after the samples that were seen. Must be called before `train_dataloader`.

        Raises: CheckpointError if the data has changed. With `data.allow_changed`, a warning is logged instead.
        """
        if (problem := self.changed_since(state_dict)) is not None:
            if not self.config.allow_changed:
                raise CheckpointError(problem)
            log.warning("%s Continuing with the new data (data.allow_changed=true).", problem.partition("\n")[0])
        if group.is_main() and (unverified := self._unverified()):
            log.warning(
                "Resuming without knowing whether the data has changed: only the length of %s is compared. Give it an attribute "
                "`fingerprint` that changes with the data.",
                " and ".join(unverified),
            )
        self.start_sample = int(state_dict["samples_seen"])

    def _unverified(self) -> list[str]:
        """Return the names of the data sets whose content is not part of the fingerprint."""
        origins = [source.rows.origin for source in self._stream.sources]
        origins += [] if self.val is None else self.val.origins
        return [*dict.fromkeys(origin.name for origin in origins if not origin.verified)]

    def require_same_tables(self, gather: Callable[[dict[str, str]], list[dict[str, str]]]) -> None:
        """Check that all ranks read the same rows.

        Otherwise they would train on different samples and could wait for each other forever.

        Args:
            gather: function that returns the values of all ranks for the value of this rank.

        Raises: DataError on every rank if the rows differ.
        """
        self.setup()
        stream = {key: value for key, value in self._fingerprint.items() if key != VAL}
        tables = {"data.train": stream, "data.val": self._fingerprint[VAL]}
        digests = {key: hashlib.sha256(json.dumps(read).encode()).hexdigest() for key, read in tables.items()}
        all_ranks = gather(digests)
        for key in digests:
            if len({of_rank[key] for of_rank in all_ranks}) > 1:
                raise DataError(
                    f"{key} does not have the same rows on all ranks: a table was replaced during the start, or nodes have different "
                    "copies. Make the files equal on all nodes and start again."
                )

    def changed_since(self, state_dict: dict[str, Any]) -> str | None:
        """Return a message if the data differs from that of a saved state, else None.

        A state of an older version has no fingerprint, so it is accepted.
        """
        self.setup()
        before: dict[str, Any] = state_dict.get("data") or {}
        found = changes(before, self._fingerprint) if before else []
        if not found:
            return None
        which, why = "validation", "Scores before and after the change would not be comparable"
        if stream_changes(before, self._fingerprint):
            which, why = "training", "Some samples would be repeated and others skipped"
        return (
            f"The {which} data has changed since the checkpoint: {'; '.join(found)}.\n  {why}. Restore the data, start a new run "
            "(resume=never), or continue anyway (data.allow_changed=true)."
        )

    def _rank_and_world_size(self) -> tuple[int, int]:
        rank, world_size = (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)
        if self.global_batch_size % world_size:
            raise ConfigError(
                f"global_batch_size={self.global_batch_size} is not divisible by the number of devices ({world_size}): "
                f"set it to a multiple of {world_size}."
            )
        return rank, world_size

    def _loader(
        self, dataset: Any, sampler: StreamSampler | EvalSampler, collate: Any, batch_bytes: int
    ) -> "WorkerLoader[Any]":
        device_type = "cpu" if self.trainer is None else self.trainer.strategy.root_device.type
        workers = count_workers(self.config.num_workers, group.local_world_size(), device_type)
        # Workers for validation start again at each validation, so do not start more than there are batches.
        if isinstance(sampler, EvalSampler):
            workers = min(workers, len(sampler))
        return WorkerLoader(
            dataset,
            batch_bytes=batch_bytes,
            limit=ReadLimit(self.config.timeout_s, "data.timeout_s"),
            batch_sampler=sampler,
            num_workers=workers,
            collate_fn=collate,
            pin_memory=device_type == "cuda",
            persistent_workers=isinstance(sampler, StreamSampler) and workers > 0,
        )
