"""Samples by position, the batches that they become, and the worker processes that make them.

A sample is of the training stream, of a validation table, or of a list of pictures. What it holds depends on its position, the table
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
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from clip_exp.config.data import AugmentationConfig, OnBadImage
from clip_exp.data.files import BadImage, ImageLimits
from clip_exp.data.images import Preprocessing, decode, decode_rgb, eval_transform, train_transform
from clip_exp.data.pictures import Pictures, label_of_images
from clip_exp.data.randomness import Draws, hash64
from clip_exp.data.stream import Stream, StreamSource, needs_full_paths
from clip_exp.data.tables.table import PairTable
from clip_exp.devices import usable_cores
from clip_exp.errors import DataError
from clip_exp.ranks.group import local_world_size
from clip_exp.text.tokenizer import Tokenizes

# Samples and batches.


class BadPicture(NamedTuple):
    """A picture that could not be used."""

    path: str  # as it is written in the table
    reason: str


@dataclass(frozen=True)
class Sample:
    """A training sample; `image` uint8 [3, S, S], in memory [S, S, 3]."""

    image: Tensor
    tokens: list[int]
    caption_id: int
    image_id: int
    bad: tuple[BadPicture, ...] = ()
    truncated: bool = False


@dataclass(frozen=True)
class EvalSample:
    """A validation picture, uint8 [3, S, S], with its captions; None for a picture that was left out."""

    index: int
    image: Tensor | None
    token_lists: list[list[int]]
    caption_indices: list[int]
    label: int
    bad: tuple[BadPicture, ...] = ()


class Batch(NamedTuple):
    """A training batch of one rank.

    Equal captions have equal `caption_id`, equal pictures equal `image_id`, on every rank.
    """

    image: Tensor  # uint8 [B, 3, S, S], in memory [B, S, S, 3]
    tokens: Tensor  # int64 [B, L], padded by the tokenizer
    caption_id: Tensor  # int64 [B]
    image_id: Tensor  # int64 [B]
    bad: tuple[BadPicture, ...] = ()  # pictures that were replaced on the way to this batch
    truncated: int = 0  # captions that were cut to the context length


class EvalBatch(NamedTuple):
    """A validation batch of one rank: B pictures with all their captions, T in total."""

    index: Tensor  # type: ignore[assignment]  # int64 [B], which picture of the validation set
    image: Tensor  # uint8 [B, 3, S, S]
    tokens: Tensor  # int64 [T, L]
    caption_image: Tensor  # int64 [T], the picture that a caption belongs to, as in `index`
    caption_index: Tensor  # int64 [T], which caption of the validation set
    caption_id: Tensor  # int64 [T], equal for equal captions
    label: Tensor  # int64 [B], index of the class, -1 without one
    bad: tuple[BadPicture, ...] = ()  # pictures that were left out


# Datasets: samples by position.

_CROP, _REPLACEMENT = 6, 7  # what is drawn
_MAX_REPLACEMENTS = 100
DEFAULT_LIMITS = ImageLimits()


class PictureError(DataError):
    """A picture that the policy does not forgive.

    A DataLoader raises a worker's error again as its class with the worker's traceback as the message; this class takes its
    own message back out of that.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message.rpartition(f"{type(self).__qualname__}: ")[2].strip())


class TrainPairs(Dataset[Sample]):
    """Training samples by position in the stream, without end.

    Args:
        stream: which rows they are.
        image_size: side of the pictures, pixels.
        tokenizer: of the captions.
        augmentation: of the pictures.
        on_bad_image: raise, or take another row of the same source that depends on the seed, the epoch and the bad row alone.
        limits: of the pictures.
    """

    def __init__(
        self,
        stream: Stream,
        *,
        image_size: int,
        tokenizer: Tokenizes,
        augmentation: AugmentationConfig,
        on_bad_image: OnBadImage = OnBadImage.replace,
        limits: ImageLimits = DEFAULT_LIMITS,
    ) -> None:
        self.stream = stream
        self.image_size, self.augmentation = image_size, augmentation
        self.on_bad_image, self.limits = on_bad_image, limits
        self.tokenizer = tokenizer

    def __getitem__(self, position: int) -> Sample:
        source, epoch, wanted = self.stream[position]
        row = wanted
        bad: list[BadPicture] = []
        while True:
            table_row = source.rows.table_row(row, source.seed, epoch)
            try:
                image = self._image(source, table_row, epoch, row)
            except BadImage as error:
                bad.append(BadPicture(source.picture_name(table_row), str(error)))
                self._check(bad, source.table, table_row)
                row = hash64(_REPLACEMENT, source.seed, epoch, wanted, len(bad)) % len(source.rows)
            else:
                return self._sample(image, source, table_row, tuple(bad))

    def _image(self, source: StreamSource, table_row: int, epoch: int, row: int) -> Tensor:
        image = decode_rgb(source.table.read_picture(table_row, self.limits), self.limits)
        return train_transform(image, self.image_size, Draws(_CROP, source.seed, epoch, row), self.augmentation)

    def _sample(self, image: Tensor, source: StreamSource, table_row: int, bad: tuple[BadPicture, ...]) -> Sample:
        truncated_before = self.tokenizer.truncated
        tokens = self.tokenizer.encode(source.table.caption(table_row))
        truncated = self.tokenizer.truncated > truncated_before
        return Sample(image, tokens, caption_id(tokens), source.image_id(table_row), bad, truncated)

    def _check(self, bad: list[BadPicture], table: PairTable, table_row: int) -> None:
        if self.on_bad_image is OnBadImage.error:
            raise PictureError(unreadable(table, table_row, bad[-1].reason, "data.on_bad_image=replace"))
        if len(bad) >= _MAX_REPLACEMENTS:
            raise PictureError(
                f"{len(bad)} pictures drawn in a row cannot be read, such as {bad[0].path!r} ({bad[0].reason}): "
                f"look at the table {table.parts[0].file} and at data.image_root, now {table.root}."
            )


class EvalPairs(Dataset[EvalSample]):
    """The distinct pictures of a validation table, each with all its captions, by the published protocol.

    Args:
        table: of pairs, with labels or without.
        preprocessing: of the pictures.
        tokenizer: of the captions.
        on_bad_image: raise, or leave the picture and its captions out.
        limits: of the pictures.

    Attributes:
        class_names: distinct labels, sorted; a picture with an empty label belongs to none. Empty without labels.

    Raises: DataError where two rows give a picture different labels.
    """

    def __init__(
        self,
        table: PairTable,
        *,
        preprocessing: Preprocessing,
        tokenizer: Tokenizes,
        on_bad_image: OnBadImage = OnBadImage.replace,
        limits: ImageLimits = DEFAULT_LIMITS,
    ) -> None:
        self.table, self.preprocessing = table, preprocessing
        self.on_bad_image, self.limits = on_bad_image, limits
        self.tokenizer = tokenizer
        labels = [""] * table.pictures if table.labels is None else label_of_images(table)
        self.class_names: list[str] = sorted(set(labels) - {""})
        position = {"": -1, **{name: index for index, name in enumerate(self.class_names)}}
        self._labels = np.array([position[label] for label in labels], dtype=np.int32)

    def __len__(self) -> int:
        return self.table.pictures

    def __getitem__(self, index: int) -> EvalSample:
        rows: list[int] = self.table.rows_of(index).tolist()
        token_lists = (
            [] if self.table.captions is None else [self.tokenizer.encode(self.table.caption(r)) for r in rows]
        )
        image, bad = self._image(rows[0])
        return EvalSample(
            index=index,
            image=image,
            token_lists=token_lists,
            caption_indices=rows if token_lists else [],
            label=int(self._labels[index]),
            bad=bad,
        )

    def _image(self, row: int) -> tuple[Tensor | None, tuple[BadPicture, ...]]:
        try:
            picture = decode(self.table.read_picture(row, self.limits), self.limits)
            size, _, _, interpolation, resize_mode = self.preprocessing
            return eval_transform(picture, size, interpolation, resize_mode), ()
        except BadImage as error:
            if self.on_bad_image is OnBadImage.error:
                raise PictureError(unreadable(self.table, row, str(error), "data.on_bad_image=replace")) from error
            name = self.table.image_path(row) if needs_full_paths(self.table) else self.table.path(row)
            return None, (BadPicture(name, str(error)),)


class EvalImages(Dataset[EvalSample]):
    """Pictures without captions. One that cannot be used is passed on with its reason: what to do about it is decided later.

    Args:
        pictures: where they come from.
        transform: a picture to uint8 [3, S, S]; picklable.
        max_image_pixels: see `open_image`.
    """

    def __init__(
        self, pictures: Pictures, transform: Callable[[Image.Image], Tensor], max_image_pixels: int = 200_000_000
    ) -> None:
        self.pictures, self.transform, self.max_image_pixels = pictures, transform, max_image_pixels

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> EvalSample:
        try:
            image = self.transform(self.pictures.open(index, self.max_image_pixels))
        except BadImage as error:
            return EvalSample(index, None, [], [], -1, (BadPicture(self.pictures.name(index), str(error)),))
        return EvalSample(index, image, [], [], -1)


def unreadable(table: PairTable, row: int, reason: str, forgiving: str) -> str:
    """The message for a picture of a table that cannot be used."""
    return (
        f"The picture {table.path(row)!r} ({table.where(row)}) cannot be read: {reason}. Relative paths start from "
        f"{table.part(row).root} (data.image_root). Repair it, or go on without such pictures: {forgiving}."
    )


@dataclass(frozen=True)
class Collate:
    """Samples to a `Batch`; captions are padded by the tokenizer, to a multiple of `multiple` where it may choose."""

    tokenizer: Tokenizes
    multiple: int = 1

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        return Batch(
            image=stack([sample.image.permute(1, 2, 0) for sample in samples]).permute(0, 3, 1, 2),
            tokens=self.tokenizer.pad([sample.tokens for sample in samples], self.multiple),
            caption_id=_int64(sample.caption_id for sample in samples),
            image_id=_int64(sample.image_id for sample in samples),
            bad=tuple(bad for sample in samples for bad in sample.bad),
            truncated=sum(sample.truncated for sample in samples),
        )


@dataclass(frozen=True)
class EvalCollate:
    """Samples to an `EvalBatch`, pictures that were left out not counted; it may hold none at all."""

    tokenizer: Tokenizes
    image_size: int
    multiple: int = 1

    def __call__(self, samples: Sequence[EvalSample]) -> EvalBatch:
        good = [sample for sample in samples if sample.image is not None]
        images = [sample.image for sample in good if sample.image is not None]
        token_lists = [tokens for sample in good for tokens in sample.token_lists]
        return EvalBatch(
            index=_int64(sample.index for sample in good),
            image=stack(images) if images else torch.empty(0, 3, self.image_size, self.image_size, dtype=torch.uint8),
            tokens=self.tokenizer.pad(token_lists, self.multiple),
            caption_image=_int64(sample.index for sample in good for _ in sample.token_lists),
            caption_index=_int64(index for sample in good for index in sample.caption_indices),
            caption_id=_int64(caption_id(tokens) for tokens in token_lists),
            label=_int64(sample.label for sample in good),
            bad=tuple(bad for sample in samples for bad in sample.bad),
        )


def stack(images: list[Tensor]) -> Tensor:
    """Stack images; a worker process does so in the memory that it shares with training, which saves a copy of the batch."""
    return default_collate(images)


def caption_id(tokens: Sequence[int]) -> int:
    """A hash of what the model sees of a caption, int64, the same in every process."""
    return int.from_bytes(blake2b(array("i", tokens).tobytes(), digest_size=8).digest(), "little", signed=True)


def _int64(values: Iterable[int]) -> Tensor:
    return torch.tensor(list(values), dtype=torch.int64)


# Worker processes, and the shared memory that their batches come through.

T_co = TypeVar("T_co", covariant=True)
MOST_BESIDE_CPU_TRAINING = 8  # workers
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
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with, args=(parent.pid,), daemon=True).start()


def _end_with(parent: int) -> None:
    while True:
        if signal.sigwaitinfo({signal.SIGTERM}).si_pid == parent:
            os._exit(0)


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
    return free if device_type == "cuda" else min(MOST_BESIDE_CPU_TRAINING, free)


def cores_per_rank(local_world_size: int) -> int:
    """Cores of this machine that the process may use, shared equally by the machine's ranks."""
    return max(1, usable_cores() // max(local_world_size, 1))


@contextmanager
def killed_workers_are_told(key: str) -> Iterator[None]:
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
    if _tells_of_shared_memory(error):
        largest = max(_loaders, key=lambda loader: loader.shared_bytes, default=None)
        return DataError(f"Shared memory ran out. {_advice(largest, _shared_memory(), key)}")
    if not _tells_of_killed_worker(error):
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


def _tells_of_shared_memory(error: BaseException) -> bool:
    """By torch's words for a full /dev/shm, raised or as the cause; or by a loader that could not make its semaphores there."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOSPC and _is_from_loader(error)
    causes = (error, error.__cause__)
    return isinstance(error, RuntimeError) and any(_NO_SHARED_MEMORY.search(str(cause)) for cause in causes)


def _tells_of_killed_worker(error: BaseException) -> bool:
    """By torch's words, or by a connection that broke under its loader before the worker was seen to be dead."""
    if isinstance(error, RuntimeError):
        return str(error).startswith("DataLoader worker")
    return isinstance(error, ConnectionError | EOFError) and _is_from_loader(error)


def _is_from_loader(error: BaseException) -> bool:
    return any(frame.f_code.co_filename == _LOADER for frame, _ in traceback.walk_tb(error.__traceback__))
