"""Samples by position, the batches that they become, and the worker processes that make them.

A sample is of the training stream, of a validation table, or of a list of images. What it holds depends on its position, the table
and the seed alone, so it is the same in whichever worker, rank or restart it is made.
"""

import errno
import inspect
import multiprocessing
import os
import re
import signal
import threading
import traceback
import weakref
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass
from hashlib import blake2b
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from clip_exp.config.data import AugmentationConfig, OnBadImage
from clip_exp.data.files import BadImage, ImageLimits
from clip_exp.data.image_sets import ImageSet, label_of_images
from clip_exp.data.images import Preprocessing, decode, decode_rgb, eval_transform, train_transform
from clip_exp.data.randomness import Draws, hash64
from clip_exp.data.stream import Stream, needs_full_paths
from clip_exp.data.tables.table import PairTable
from clip_exp.devices import usable_cores
from clip_exp.errors import DataError
from clip_exp.ranks.group import local_world_size
from clip_exp.text.tokenizer import Tokenizes

# Samples and batches.


class UnreadableImage(NamedTuple):
    """An image that could not be used."""

    path: str  # as it is written in the table
    reason: str


@dataclass(frozen=True)
class Sample:
    """A training sample; `image` uint8 [3, S, S], in memory [S, S, 3]."""

    image: Tensor
    tokens: list[int]
    caption_id: int
    image_id: int
    bad: tuple[UnreadableImage, ...] = ()
    truncated: bool = False


@dataclass(frozen=True)
class EvalSample:
    """A validation image, uint8 [3, S, S], with its captions; None for an image that was left out."""

    index: int
    image: Tensor | None
    token_lists: list[list[int]]
    caption_indices: list[int]
    label: int
    bad: tuple[UnreadableImage, ...] = ()


class Batch(NamedTuple):
    """A training batch of one rank.

    Equal captions have equal `caption_id`, equal images equal `image_id`, on every rank.
    """

    image: Tensor  # uint8 [B, 3, S, S], in memory [B, S, S, 3]
    tokens: Tensor  # int64 [B, L], padded by the tokenizer
    caption_id: Tensor  # int64 [B]
    image_id: Tensor  # int64 [B]
    bad: tuple[UnreadableImage, ...] = ()  # images that were replaced on the way to this batch
    truncated: int = 0  # captions that were cut to the context length


class EvalBatch(NamedTuple):
    """A validation batch of one rank: B images with all their captions, T in total."""

    index: Tensor  # type: ignore[assignment]  # int64 [B], which image of the validation set
    image: Tensor  # uint8 [B, 3, S, S]
    tokens: Tensor  # int64 [T, L]
    caption_image: Tensor  # int64 [T], the image that a caption belongs to, as in `index`
    caption_index: Tensor  # int64 [T], which caption of the validation set
    caption_id: Tensor  # int64 [T], equal for equal captions
    label: Tensor  # int64 [B], index of the class, -1 without one
    bad: tuple[UnreadableImage, ...] = ()  # images that were left out


# Datasets: samples by position.

_CROP, _REPLACEMENT = 6, 7  # what is drawn
_MAX_REPLACEMENTS = 100
DEFAULT_LIMITS = ImageLimits()


class UnreadableImageError(DataError):
    """An image that the policy does not forgive.

    A DataLoader raises a worker's error again as its class with the worker's traceback as the message; this class takes its
    own message back out of that.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message.rpartition(f"{type(self).__qualname__}: ")[2].strip())


@dataclass(eq=False)
class TrainPairs(Dataset[Sample]):
    """Training samples by position in the stream, without end."""

    stream: Stream
    _: KW_ONLY
    image_size: int  # side of the images, pixels
    tokenizer: Tokenizes
    augmentation: AugmentationConfig
    # Raise, or take another row of the same source that depends on the seed, the epoch and the bad row alone.
    on_bad_image: OnBadImage = OnBadImage.replace
    limits: ImageLimits = DEFAULT_LIMITS

    def __getitem__(self, position: int) -> Sample:
        # All that is drawn for a sample is keyed by what it is for, (seed, epoch, row), never by what was drawn before it.
        source, epoch, wanted = self.stream[position]
        row = wanted
        bad: list[UnreadableImage] = []
        while True:
            table_row = source.rows.table_row(row, source.seed, epoch)
            try:
                image = decode_rgb(source.table.read_image(table_row, self.limits), self.limits)
                draws = Draws(_CROP, source.seed, epoch, row)
                image = train_transform(image, self.image_size, draws, self.augmentation)
                break
            except BadImage as error:
                bad.append(UnreadableImage(source.image_name(table_row), str(error)))
            if self.on_bad_image is OnBadImage.error:
                raise UnreadableImageError(
                    unreadable(source.table, table_row, bad[-1].reason, "data.on_bad_image=replace")
                )
            if len(bad) >= _MAX_REPLACEMENTS:
                raise UnreadableImageError(
                    f"{len(bad)} images drawn in a row cannot be read, such as {bad[0].path!r} ({bad[0].reason}): look at the "
                    f"table {source.table.parts[0].path} and at data.image_root, now {source.table.root}."
                )
            # From the same source, so that the sources keep their shares; the caption comes with the new row.
            row = hash64(_REPLACEMENT, source.seed, epoch, wanted, len(bad)) % len(source.rows)
        truncated_before = self.tokenizer.truncated
        tokens = self.tokenizer.encode(source.table.caption(table_row))
        truncated = self.tokenizer.truncated > truncated_before
        return Sample(image, tokens, caption_id(tokens), source.image_id(table_row), tuple(bad), truncated)


@dataclass(eq=False)
class EvalPairs(Dataset[EvalSample]):
    """The distinct images of a validation table, each with all its captions, by the published protocol.

    Attributes:
        class_names: distinct labels, sorted; an image with an empty label belongs to none. Empty without labels.

    Raises: DataError where two rows give an image different labels.
    """

    table: PairTable  # with labels or without
    _: KW_ONLY
    preprocessing: Preprocessing
    tokenizer: Tokenizes
    on_bad_image: OnBadImage = OnBadImage.replace  # raise, or leave the image and its captions out
    limits: ImageLimits = DEFAULT_LIMITS

    def __post_init__(self) -> None:
        table = self.table
        labels = [""] * table.images if table.labels is None else label_of_images(table)
        self.class_names: list[str] = sorted(set(labels) - {""})
        position = {"": -1, **{name: index for index, name in enumerate(self.class_names)}}
        self._labels = np.array([position[label] for label in labels], dtype=np.int32)

    def __len__(self) -> int:
        return self.table.images

    def __getitem__(self, index: int) -> EvalSample:
        rows: list[int] = self.table.rows_of(index).tolist()
        token_lists = (
            [] if self.table.captions is None else [self.tokenizer.encode(self.table.caption(r)) for r in rows]
        )
        image: Tensor | None = None
        bad: tuple[UnreadableImage, ...] = ()
        try:
            decoded = decode(self.table.read_image(rows[0], self.limits), self.limits)
            size, _, _, interpolation, resize_mode = self.preprocessing
            image = eval_transform(decoded, size, interpolation, resize_mode)
        except BadImage as error:
            if self.on_bad_image is OnBadImage.error:
                raise UnreadableImageError(
                    unreadable(self.table, rows[0], str(error), "data.on_bad_image=replace")
                ) from error
            name = self.table.image_path(rows[0]) if needs_full_paths(self.table) else self.table.path(rows[0])
            bad = (UnreadableImage(name, str(error)),)
        caption_indices = rows if token_lists else []
        return EvalSample(index, image, token_lists, caption_indices, int(self._labels[index]), bad)


@dataclass(eq=False)
class EvalImages(Dataset[EvalSample]):
    """Images without captions. One that cannot be used is passed on with its reason: what to do about it is decided later."""

    images: ImageSet
    transform: Callable[[Image.Image], Tensor]  # an image to uint8 [3, S, S]; picklable
    max_image_pixels: int = 200_000_000  # see `open_image`

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> EvalSample:
        try:
            image = self.transform(self.images.open(index, self.max_image_pixels))
        except BadImage as error:
            return EvalSample(index, None, [], [], -1, (UnreadableImage(self.images.name(index), str(error)),))
        return EvalSample(index, image, [], [], -1)


def unreadable(table: PairTable, row: int, reason: str, forgiving: str) -> str:
    """The message for an image of a table that cannot be used."""
    return (
        f"The image {table.path(row)!r} ({table.where(row)}) cannot be read: {reason}. Relative paths start from "
        f"{table.part(row).root} (data.image_root). Repair it, or go on without such images: {forgiving}."
    )


@dataclass(frozen=True)
class Collate:
    """Samples to a `Batch`; captions are padded by the tokenizer, to a multiple of `multiple` where it may choose."""

    tokenizer: Tokenizes
    multiple: int = 1

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        # Images are stacked as they lie in memory, uint8 [S, S, 3]: what takes them apart and makes them float runs on the device.
        # In a worker, `default_collate` stacks into the memory that it shares with training, which saves a copy of the batch.
        return Batch(
            image=default_collate([sample.image.permute(1, 2, 0) for sample in samples]).permute(0, 3, 1, 2),
            tokens=self.tokenizer.pad([sample.tokens for sample in samples], self.multiple),
            caption_id=_int64(sample.caption_id for sample in samples),
            image_id=_int64(sample.image_id for sample in samples),
            bad=tuple(bad for sample in samples for bad in sample.bad),
            truncated=sum(sample.truncated for sample in samples),
        )


@dataclass(frozen=True)
class EvalCollate:
    """Samples to an `EvalBatch`, images that were left out not counted; it may hold none at all."""

    tokenizer: Tokenizes
    image_size: int
    multiple: int = 1

    def __call__(self, samples: Sequence[EvalSample]) -> EvalBatch:
        good = [sample for sample in samples if sample.image is not None]
        images = [sample.image for sample in good if sample.image is not None]
        token_lists = [tokens for sample in good for tokens in sample.token_lists]
        size = self.image_size
        return EvalBatch(
            index=_int64(sample.index for sample in good),
            image=default_collate(images) if images else torch.empty(0, 3, size, size, dtype=torch.uint8),
            tokens=self.tokenizer.pad(token_lists, self.multiple),
            caption_image=_int64(sample.index for sample in good for _ in sample.token_lists),
            caption_index=_int64(index for sample in good for index in sample.caption_indices),
            caption_id=_int64(caption_id(tokens) for tokens in token_lists),
            label=_int64(sample.label for sample in good),
            bad=tuple(bad for sample in samples for bad in sample.bad),
        )


def caption_id(tokens: Sequence[int]) -> int:
    """A hash of what the model sees of a caption, int64, the same in every process."""
    return int.from_bytes(blake2b(array("i", tokens).tobytes(), digest_size=8).digest(), "little", signed=True)


def _int64(values: Iterable[int]) -> Tensor:
    return torch.tensor(list(values), dtype=torch.int64)


# Worker processes, and the shared memory that their batches come through.

T_co = TypeVar("T_co", covariant=True)
MAX_WORKERS_ON_CPU = 8  # workers
SHARED_MEMORY = "/dev/shm"
_LOADER = inspect.getfile(DataLoader)
# "unable to allocate shared memory(shm) for file </torch_1_2_3>: No space left on device (28)", "unable to write to file
# </torch_…>", and of a worker that SIGBUS ended: "It is possible that dataloader's workers are out of shared memory."
_NO_SHARED_MEMORY = re.compile(r"shared memory ?\(shm\)|file </torch_|workers are out of shared memory")


class WorkerLoader(DataLoader[T_co]):
    """A DataLoader whose workers leave the run's signals alone (`init_worker`) and report where shared memory runs out.

    Args:
        batch_bytes: about the size of a batch; 0: unknown.
        options: of the DataLoader.
    """

    def __init__(self, dataset: Dataset[Any], *, batch_bytes: int = 0, **options: Any) -> None:
        super().__init__(dataset, worker_init_fn=init_worker, **options)
        self.batch_bytes = batch_bytes
        if self.num_workers:
            self.collate_fn = _IntoSharedMemory(self.collate_fn)
            _loaders.add(self)

    def __iter__(self) -> Iterator[T_co]:  # type: ignore[override]  # torch names the class of its own iterator
        # torch may start threads in a worker before it calls `init_worker`. They inherit what is blocked here; one that did not
        # block SIGTERM would take it, and end the worker.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        try:
            return super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    @property
    def shared_bytes(self) -> int:
        """About the shared memory that the batches of all workers of this machine's ranks take."""
        return local_world_size() * self.num_workers * (self.prefetch_factor or 0) * self.batch_bytes

    def shortage(self, key: str) -> str | None:
        """Return a warning where the shared memory that is free now is too small for the workers' batches, else None.

        Args:
            key: of the configuration, for the number of workers.
        """
        memory = _shared_memory()
        if memory is None or self.shared_bytes <= memory.free:
            return None
        return f"Training may run out of shared memory. {_advice(self, memory, key)}"


_loaders: "weakref.WeakSet[WorkerLoader[Any]]" = weakref.WeakSet()  # with workers


@dataclass(frozen=True)
class _IntoSharedMemory:
    """A collate function whose tensors are in shared memory, which workers pass them through, when it returns.

    Otherwise a thread of the worker would move them there, and where memory runs out it prints the error and drops the batch:
    training would wait for it forever.
    """

    collate: Callable[[Any], Any]

    def __call__(self, samples: Any) -> Any:
        batch = self.collate(samples)
        for value in batch if isinstance(batch, tuple | list) else (batch,):
            if isinstance(value, Tensor) and value.numel():
                value.share_memory_()
        return batch


def init_worker(_worker: int) -> None:
    """Leave the signals that end or preempt a run to the training process, which still needs batches to finish its step.

    Ctrl-C and a scheduler's signals reach the whole process group. SIGTERM from the parent still ends the worker: that is how
    a DataLoader stops one.
    """
    for ignored in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(ignored, signal.SIG_IGN)
    parent = multiprocessing.parent_process()  # os.getppid() may be a fork server
    if parent is not None and hasattr(signal, "sigwaitinfo"):
        parent_id = parent.pid

        def end_with_parent() -> None:
            while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent_id:
                pass
            os._exit(0)

        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=end_with_parent, daemon=True).start()


def count_workers(requested: int | None, local_world_size: int, device_type: str = "cpu") -> int:
    """Worker processes per rank: as requested, or one for each of the rank's cores but the one that training keeps.

    Training on a CPU computes on the same cores, and so slowly that 8 workers keep up with it.

    Args:
        requested: by the configuration; None: choose.
        local_world_size: ranks of this machine.
        device_type: that the rank computes on, `cpu` or `cuda`.
    """
    if requested is not None:
        return requested
    free = max(1, cores_per_rank(local_world_size) - 1)
    return free if device_type == "cuda" else min(MAX_WORKERS_ON_CPU, free)


def cores_per_rank(local_world_size: int) -> int:
    """Cores of this machine that the process may use, shared equally by the machine's ranks."""
    return max(1, usable_cores() // max(local_world_size, 1))


@contextmanager
def report_killed_workers(key: str) -> Iterator[None]:
    """Around all that is done while a `WorkerLoader` has workers: torch tells of a killed one by an error in the midst of it.

    Args:
        key: of the configuration, for the number of workers.

    Raises: DataError where a worker was killed, or shared memory ran out.
    """
    try:
        yield
    except (RuntimeError, OSError, EOFError) as error:
        explained = explain_worker_failure(error, key)
        if explained is None:
            raise
        raise explained from error


def explain_worker_failure(error: BaseException, key: str) -> DataError | None:
    """Return what to report of an error that says that a worker was killed or that shared memory ran out; None of any other.

    Args:
        key: of the configuration, for the number of workers.
    """
    from_loader = any(frame.f_code.co_filename == _LOADER for frame, _ in traceback.walk_tb(error.__traceback__))
    if isinstance(error, OSError):  # by a loader that could not make its semaphores in /dev/shm
        full = error.errno == errno.ENOSPC and from_loader
    else:  # by torch's words, raised or as the cause
        causes = (error, error.__cause__)
        full = isinstance(error, RuntimeError) and any(_NO_SHARED_MEMORY.search(str(cause)) for cause in causes)
    if full:
        largest = max(_loaders, key=lambda loader: loader.shared_bytes, default=None)
        return DataError(f"Shared memory ran out. {_advice(largest, _shared_memory(), key)}")
    # By torch's words, or by a connection that broke under its loader before the worker was seen to be dead.
    killed = isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker")
    if not killed and not (isinstance(error, ConnectionError | EOFError) and from_loader):
        return None
    return DataError(
        "A worker process that reads images was killed from outside, mostly for lack of memory: use fewer of them "
        f"({key}), or lower data.max_image_pixels."
    )


class _SharedMemory(NamedTuple):
    size: int  # bytes
    free: int


def _shared_memory() -> _SharedMemory | None:
    try:
        state = os.statvfs(SHARED_MEMORY)
    except OSError:  # a system that keeps it elsewhere
        return None
    return _SharedMemory(state.f_frsize * state.f_blocks, state.f_frsize * state.f_bavail)


def _advice(loader: WorkerLoader[Any] | None, memory: _SharedMemory | None, key: str) -> str:
    sentences = []
    if memory is not None:
        size, free = _megabytes(memory.size), _megabytes(memory.free)
        sentences.append(f"Worker processes pass batches through {SHARED_MEMORY}, which has {size}, {free} of it free.")
    if loader is not None and loader.shared_bytes:
        workers = local_world_size() * loader.num_workers
        batches = f"{workers} x {loader.prefetch_factor} batches of {_megabytes(loader.batch_bytes)}"
        sentences.append(
            f"About {_megabytes(loader.shared_bytes)} are needed: {batches} (workers x what each prepares)."
        )
    sentences.append(
        "Enlarge it (docker run --shm-size=16g or --ipc=host; in Kubernetes an emptyDir with medium: Memory, mounted at "
        f"{SHARED_MEMORY}), or use fewer workers ({key}); {key}=0 needs none."
    )
    return " ".join(sentences)


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.{0 if count >= 1e7 else 1}f} MB"
