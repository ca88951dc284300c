"""Data sets that decode one sample, collate functions that build batches, and the DataLoader with its workers.

    TrainPairs, EvalPairs, EvalImages    data sets: position -> sample
    Collate, EvalCollate                 samples -> batch
    WorkerLoader                         DataLoader that handles signals and reports a lack of shared memory

A sample depends only on its position, the table and the seed. It is the same in any worker, on any rank and after a
restart.
"""

import errno
import inspect
import multiprocessing
import os
import re
import signal
import threading
import time
import traceback
import weakref
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass
from functools import partial
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from clip_exp.config.data import AugmentationConfig, OnBadImage
from clip_exp.data.decoders import image_decoder
from clip_exp.data.files import BadImage, ImageLimits
from clip_exp.data.image_sets import ImageSet
from clip_exp.data.images import Preprocessing, eval_transform, to_pil, to_rgb, train_transform
from clip_exp.data.pairs import Items, int64_hash
from clip_exp.data.randomness import Draws, hash64
from clip_exp.data.reading import DEFAULT_LIMIT, ReadLimit, Slots, WatchedBatches, given_up, reading
from clip_exp.data.stream import Stream
from clip_exp.data.transform import CustomTransform
from clip_exp.devices import usable_cores
from clip_exp.errors import DataError, SampleError
from clip_exp.ranks import watchdog
from clip_exp.ranks.group import local_world_size, rank, world_size
from clip_exp.text.tokenizer import Tokenizes

# Samples and batches.


class UnreadableImage(NamedTuple):
    """Image that could not be used."""

    path: str  # as written in the table
    reason: str


@dataclass(frozen=True)
class Sample:
    """Training sample. `image` is uint8 [3, S, S], stored as [S, S, 3] (channels last)."""

    image: Tensor
    tokens: list[int]
    caption_id: int
    image_id: int
    columns: dict[str, list[int] | np.ndarray]  # further columns: ids of a text, or float32 numbers
    bad: tuple[UnreadableImage, ...] = ()
    truncated: bool = False


@dataclass(frozen=True)
class EvalSample:
    """Validation image, uint8 [3, S, S], with its captions. `image` is None if the image was left out."""

    index: int
    image: Tensor | None
    token_lists: list[list[int]]
    caption_indices: list[int]
    label: int
    bad: tuple[UnreadableImage, ...] = ()


class Batch(NamedTuple):
    """Training batch of one rank.

    Equal captions have equal `caption_id` and equal images have equal `image_id`, across all ranks. The losses use them
    to find pairs of a global batch that match although they are not the same row.
    """

    image: Tensor  # uint8 [B, 3, S, S], stored as [B, S, S, 3]
    tokens: Tensor  # int64 [B, L], padded by the tokenizer
    caption_id: Tensor  # int64 [B]
    image_id: Tensor  # int64 [B]
    # Further columns by name (`data.columns`): int64 [B, L], tokens of texts, or float32 [B, ...], numbers
    columns: dict[str, Tensor] = {}  # noqa: RUF012 - a default of a NamedTuple
    bad: tuple[UnreadableImage, ...] = ()  # images that were replaced while this batch was built
    truncated: int = 0  # number of samples with a caption or another text that was truncated to the context length


class EvalBatch(NamedTuple):
    """Validation batch of one rank: B images with all their captions, T in total."""

    index: Tensor  # type: ignore[assignment]  # int64 [B], index of the image in the validation set
    image: Tensor  # uint8 [B, 3, S, S]
    tokens: Tensor  # int64 [T, L]
    caption_image: Tensor  # int64 [T], index of the image that a caption belongs to, as in `index`
    caption_index: Tensor  # int64 [T], index of the caption in the validation set
    caption_id: Tensor  # int64 [T], equal for equal captions
    label: Tensor  # int64 [B], index of the class, -1 without one
    bad: tuple[UnreadableImage, ...] = ()  # images that were left out


# Data sets: samples by position.

# First integer of a random key, so that different uses of one seed are independent.
_CROP, _REPLACEMENT = 6, 7
# So many bad images in a row mean a wrong data.image_root, not some damaged files.
_MAX_REPLACEMENTS = 100
DEFAULT_LIMITS = ImageLimits()
# Override with which a run continues without bad images
REPLACE = "data.on_bad_image=replace"


class UnreadableImageError(SampleError):
    """Error raised for an unreadable image that `data.on_bad_image` does not allow to be replaced or left out."""


@dataclass(eq=False)
class TrainPairs(Dataset[Sample]):
    """Infinite data set of training samples, indexed by position in the stream."""

    stream: Stream
    _: KW_ONLY
    image_size: int  # side of the images, pixels
    tokenizer: Tokenizes
    augmentation: AugmentationConfig
    transform: CustomTransform | None = None  # instead of the random crop and augmentation
    # Raise, or replace the image by another row of the same source, chosen by the seed, the epoch and the bad row
    # alone.
    on_bad_image: OnBadImage = OnBadImage.replace
    limits: ImageLimits = DEFAULT_LIMITS

    def __getitem__(self, position: int) -> Sample:
        # Random numbers are keyed by (seed, epoch, row), never taken from a generator whose state depends on earlier
        # samples. That makes crops, captions and replacements independent of the number of workers and ranks and of
        # restarts.
        source, epoch, original_row = self.stream[position]
        row = original_row
        bad: list[UnreadableImage] = []
        while True:
            reading(source.rows.image_name(row))
            try:
                pair = source.load(epoch, row, self.limits)
                image = to_rgb(pair.image, self.limits)
                if self.transform is not None:
                    image = self.transform(image, source.seed, epoch, row)
                else:
                    draws = Draws(_CROP, source.seed, epoch, row)
                    image = train_transform(image, self.image_size, draws, self.augmentation)
                break
            except BadImage as error:
                bad.append(UnreadableImage(source.rows.image_name(row), str(error)))
            if self.on_bad_image is OnBadImage.error:
                raise UnreadableImageError(source.rows.unreadable(row, bad[-1].reason, REPLACE))
            if len(bad) >= _MAX_REPLACEMENTS:
                raise UnreadableImageError(
                    f"{len(bad)} images drawn in a row cannot be read, such as {bad[0].path!r} ({bad[0].reason}). Check "
                    f"{source.rows.origin.source}."
                )
            # Replace within the same source, so that the mixture of sources stays exact. The caption comes with the new
            # row.
            row = hash64(_REPLACEMENT, source.seed, epoch, original_row, len(bad)) % len(source.rows)
        truncated_before = self.tokenizer.truncated
        tokens = self.tokenizer.encode(pair.caption)
        columns = {name: self._encoded(value) for name, value in pair.columns.items()}
        truncated = self.tokenizer.truncated > truncated_before
        return Sample(image, tokens, caption_id(tokens), pair.image_id, columns, tuple(bad), truncated)

    def _encoded(self, value: str | np.ndarray) -> list[int] | np.ndarray:
        return self.tokenizer.encode(value) if isinstance(value, str) else value


@dataclass(eq=False)
class EvalPairs(Dataset[EvalSample]):
    """Data set of the distinct validation images, each with all its captions.

    Images are preprocessed as in published evaluations.
    """

    items: Items  # with or without labels
    _: KW_ONLY
    preprocessing: Preprocessing
    tokenizer: Tokenizes
    # Raise, or leave the image and its captions out. In validation no other image can replace it.
    on_bad_image: OnBadImage = OnBadImage.replace
    limits: ImageLimits = DEFAULT_LIMITS

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> EvalSample:
        reading(self.items.image_name(index))
        try:
            item = self.items.load(index, self.limits)
            size, _, _, interpolation, resize_mode = self.preprocessing
            image = eval_transform(to_pil(item.image, self.limits), size, interpolation, resize_mode)
        except BadImage as error:
            if self.on_bad_image is OnBadImage.error:
                raise UnreadableImageError(self.items.unreadable(index, str(error), REPLACE)) from error
            return EvalSample(index, None, [], [], -1, (UnreadableImage(self.items.image_name(index), str(error)),))
        token_lists = [self.tokenizer.encode(caption) for caption in item.captions]
        return EvalSample(index, image, token_lists, item.caption_indices, item.label)


@dataclass(eq=False)
class EvalImages(Dataset[EvalSample]):
    """Data set of images without captions.

    For an unreadable image, the sample has the reason, and the caller decides what to do.
    """

    images: ImageSet
    transform: Callable[[Image.Image], Tensor]  # maps an image to uint8 [3, S, S]; must be picklable
    limits: ImageLimits

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> EvalSample:
        reading(self.images.name(index))
        try:
            image = self.transform(self.images.open(index, self.limits))
        except BadImage as error:
            return EvalSample(index, None, [], [], -1, (UnreadableImage(self.images.name(index), str(error)),))
        return EvalSample(index, image, [], [], -1)


@dataclass(frozen=True)
class Collate:
    """Collate function from `Sample`s to a `Batch`.

    The tokenizer pads captions and other texts, to a multiple of `multiple` if it can choose.
    """

    tokenizer: Tokenizes
    multiple: int = 1

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        # Stack in the memory layout [S, S, 3] as uint8, and return a view as [3, S, S]. Conversion to channels-first
        # float runs on the device, which is faster and moves a quarter of the bytes. In a worker, `default_collate`
        # stacks directly into shared memory.
        columns = {name: [sample.columns[name] for sample in samples] for name in samples[0].columns}
        numbers = {name: torch.from_numpy(np.stack(values)) for name, values in columns.items() if _are_numbers(values)}
        texts = {name: values for name, values in columns.items() if name not in numbers}
        # Padded together, since captions and other texts are encoded together.
        token_lists: list[Any] = [sample.tokens for sample in samples]
        token_lists += [tokens for values in texts.values() for tokens in values]
        tokens, *others = self.tokenizer.pad(token_lists, self.multiple).chunk(1 + len(texts))
        return Batch(
            image=default_collate([sample.image.permute(1, 2, 0) for sample in samples]).permute(0, 3, 1, 2),
            tokens=tokens,
            caption_id=_int64(sample.caption_id for sample in samples),
            image_id=_int64(sample.image_id for sample in samples),
            columns={**dict(zip(texts, others, strict=True)), **numbers},
            bad=tuple(bad for sample in samples for bad in sample.bad),
            truncated=sum(sample.truncated for sample in samples),
        )


def _are_numbers(values: list[Any]) -> bool:
    return isinstance(values[0], np.ndarray)


@dataclass(frozen=True)
class EvalCollate:
    """Collate function from `EvalSample`s to an `EvalBatch`.

    Images that were left out are skipped, so a batch may be empty.
    """

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
    """Return an int64 hash of the tokens that the model sees, equal in every process."""
    return int64_hash(array("i", tokens).tobytes())


def _int64(values: Iterable[int]) -> Tensor:
    return torch.tensor(list(values), dtype=torch.int64)


# Worker processes, and the shared memory through which they pass batches.

T_co = TypeVar("T_co", covariant=True)
MAX_WORKERS_ON_CPU = 8  # chosen automatically, if training computes on the CPU
SHARED_MEMORY = "/dev/shm"
PARENT_S = 2.0  # time between looks of a worker at its parent
ORPHAN_S = 6.0  # time for a worker without a parent to end by itself: torch looks every five seconds
_LOADER = inspect.getfile(DataLoader)
# torch's messages: "unable to allocate shared memory(shm) for file </torch_1_2_3>: No space left on device (28)",
# "unable to write to file </torch_…>", and for a worker killed by SIGBUS: "It is possible that dataloader's workers are
# out of shared memory."
_NO_SHARED_MEMORY = re.compile(r"shared memory ?\(shm\)|file </torch_|workers are out of shared memory")


class WorkerLoader(DataLoader[T_co]):
    """DataLoader whose workers ignore the run's signals (`init_worker`), and which reports a lack of shared memory.

    A worker that makes no progress ends the wait for it (`data.reading`).

    Args:
        batch_bytes: approximate size of a batch; 0: unknown.
        limit: longest wait for a worker that makes no progress.
        options: arguments of `torch.utils.data.DataLoader`.
    """

    def __init__(
        self, dataset: Dataset[Any], *, batch_bytes: int = 0, limit: ReadLimit = DEFAULT_LIMIT, **options: Any
    ) -> None:
        workers = options.get("num_workers", 0)
        image_decoder()
        super().__init__(dataset, timeout=limit.tick_s if workers else 0, **options)
        self.batch_bytes, self.limit = batch_bytes, limit
        if workers:
            self.collate_fn = _IntoSharedMemory(self.collate_fn)
            _loaders.add(self)
        self.collate_fn = _AfterReading(self.collate_fn)

    def __iter__(self) -> Iterator[T_co]:  # type: ignore[override]  # torch declares the class of its iterator
        if not self.num_workers:
            return super().__iter__()
        return WatchedBatches(self._start, self.limit, _of_this_rank)

    def _start(self) -> tuple[Iterator[T_co], Slots]:
        """Start the workers, unless those of an earlier call are persistent and have not been shut down."""
        # torch may start threads in a worker before it calls `init_worker`. They inherit the signal mask that is set
        # here. A thread that did not block SIGTERM would receive it, and the worker would end.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        try:
            if self._iterator is None or getattr(self._iterator, "_shutdown", False):
                self._iterator, self.slots = None, Slots.create(self.num_workers)
            in_main_thread = threading.current_thread() is threading.main_thread()
            self.worker_init_fn = partial(init_worker, slots=self.slots, in_main_thread=in_main_thread)
            return super().__iter__(), self.slots
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    @property
    def shared_bytes(self) -> int:
        """Approximate shared memory used by the batches of all workers of all ranks of this machine."""
        return local_world_size() * self.num_workers * (self.prefetch_factor or 0) * self.batch_bytes

    def shortage(self, key: str) -> str | None:
        """Return a warning if the free shared memory is too small for the workers' batches, else None.

        Args:
            key: configuration key for the number of workers, for the message.
        """
        memory = _shared_memory()
        if memory is None or self.shared_bytes <= memory.free:
            return None
        return f"Training may run out of shared memory. {_advice(self, memory, key)}"


_loaders: "weakref.WeakSet[WorkerLoader[Any]]" = (
    weakref.WeakSet()
)  # loaders with workers, for the message about shared memory


def _of_this_rank() -> str:
    return f" of rank {rank()}" if world_size() > 1 else ""


@dataclass(frozen=True)
class _AfterReading:
    """Collate function that first reports that the rows of the batch were read."""

    collate: Callable[[Any], Any]

    def __call__(self, samples: Any) -> Any:
        reading("")
        return self.collate(samples)


@dataclass(frozen=True)
class _IntoSharedMemory:
    """Collate function that returns tensors in shared memory.

    Otherwise a thread of the worker moves them there. When memory runs out, that thread prints the error and drops the
    batch, and training waits for the batch forever.
    """

    collate: Callable[[Any], Any]

    def __call__(self, samples: Any) -> Any:
        batch = self.collate(samples)
        for tensor in _tensors(batch):
            if tensor.numel():
                tensor.share_memory_()
        return batch


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in a batch, also those in its tuples, lists and dictionaries."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list | dict):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _tensors(inner)


def init_worker(worker: int, slots: Slots, in_main_thread: bool) -> None:
    """Report rows in this worker's slot, and ignore the signals that stop or preempt a run.

    The training process handles them, and needs more batches to finish its step.

    Ctrl-C and the signals of a scheduler reach the whole process group. SIGTERM from the parent process still ends the
    worker, because a DataLoader stops its workers that way.

    Args:
        worker: number of the worker.
        slots: slots of the loader's workers.
        in_main_thread: whether the parent's main thread started this process, so that the kernel may report the end of that thread.
    """
    slots.use(worker)
    if in_main_thread:
        # A stopped worker would never notice that its parent has ended. It is not killed, since it may be creating a file in
        # shared memory, which would stay.
        watchdog.signal_at_end_of_parent(signal.SIGCONT)
    for ignored in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(ignored, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None and hasattr(signal, "sigtimedwait"):
        parent_id, started_by = parent.pid, os.getppid()

        def end_with_parent() -> None:
            # Not `parent.is_alive()`, which waits for workers that were forked later, too.
            while os.getppid() == started_by:
                received = signal.sigtimedwait({signal.SIGTERM}, PARENT_S)
                if received is not None and received.si_pid == parent_id:
                    os._exit(0)
            # torch ends a worker without a parent, but not one that waits for its row.
            time.sleep(ORPHAN_S)
            os._exit(0)

        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=end_with_parent, daemon=True).start()


def count_workers(requested: int | None, local_world_size: int, device_type: str = "cpu") -> int:
    """Return the number of workers per rank: as requested, or one per core of the rank except one for training.

    Training on a CPU uses the same cores, and is so slow that 8 workers keep up with it.

    Args:
        requested: number in the configuration; None: choose automatically.
        local_world_size: number of ranks on this machine.
        device_type: device of the rank, `cpu` or `cuda`.
    """
    if requested is not None:
        return requested
    free = max(1, cores_per_rank(local_world_size) - 1)
    return free if device_type == "cuda" else min(MAX_WORKERS_ON_CPU, free)


def cores_per_rank(local_world_size: int) -> int:
    """Return the number of cores per rank: the cores that the process may use, divided by the ranks of this machine."""
    return max(1, usable_cores() // max(local_world_size, 1))


@contextmanager
def report_killed_workers(key: str) -> Iterator[None]:
    """Turn errors that a killed worker causes into a DataError with advice.

    Use it around all code that runs while a `WorkerLoader` has workers: torch raises in arbitrary code when a worker
    dies.

    Args:
        key: configuration key for the number of workers, for the message.

    Raises: DataError if a worker was killed or shared memory ran out.
    """
    try:
        yield
    except (RuntimeError, OSError, EOFError) as error:
        explained = explain_worker_failure(error, key)
        if explained is None:
            raise
        raise explained from error


def explain_worker_failure(error: BaseException, key: str) -> DataError | None:
    """Return the error to raise instead if a worker was killed or shared memory ran out; None for any other error.

    Args:
        key: configuration key for the number of workers, for the message.
    """
    from_loader = any(frame.f_code.co_filename == _LOADER for frame, _ in traceback.walk_tb(error.__traceback__))
    if isinstance(error, OSError):  # raised by a loader that could not create its semaphores in /dev/shm
        full = error.errno == errno.ENOSPC and from_loader
    else:  # recognized by torch's message, in the error or in its cause
        causes = (error, error.__cause__)
        full = isinstance(error, RuntimeError) and any(_NO_SHARED_MEMORY.search(str(cause)) for cause in causes)
    if full:
        largest = max(_loaders, key=lambda loader: loader.shared_bytes, default=None)
        return DataError(f"Shared memory ran out. {_advice(largest, _shared_memory(), key)}")
    # Recognized by torch's message, or by a connection of the loader that broke before torch noticed the dead worker.
    killed = isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker")
    if not killed and not (isinstance(error, ConnectionError | EOFError) and from_loader):
        return None
    return given_up() or DataError(
        "A data loader worker was killed by a signal, usually because memory ran out. Use fewer workers "
        f"({key}), or decrease data.max_image_pixels."
    )


class _SharedMemory(NamedTuple):
    size: int  # bytes
    free: int


def _shared_memory() -> _SharedMemory | None:
    try:
        state = os.statvfs(SHARED_MEMORY)
    except OSError:  # a system without /dev/shm
        return None
    return _SharedMemory(state.f_frsize * state.f_blocks, state.f_frsize * state.f_bavail)


def _advice(loader: WorkerLoader[Any] | None, memory: _SharedMemory | None, key: str) -> str:
    sentences = []
    if memory is not None:
        size, free = _megabytes(memory.size), _megabytes(memory.free)
        sentences.append(f"Worker processes pass batches through {SHARED_MEMORY}, which has {size}, {free} free.")
    if loader is not None and loader.shared_bytes:
        workers = local_world_size() * loader.num_workers
        batches = f"{workers} x {loader.prefetch_factor} batches of {_megabytes(loader.batch_bytes)}"
        sentences.append(
            f"About {_megabytes(loader.shared_bytes)} are needed: {batches} (workers x prefetched batches)."
        )
    sentences.append(
        "Enlarge it (docker run --shm-size=16g or --ipc=host; in Kubernetes an emptyDir with medium: Memory, mounted at "
        f"{SHARED_MEMORY}), or use fewer workers ({key}). With {key}=0 no shared memory is needed."
    )
    return " ".join(sentences)


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.{0 if count >= 1e7 else 1}f} MB"
