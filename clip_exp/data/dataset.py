"""Samples by position: of the training stream, of a validation table, of a list of pictures.

What a sample holds depends on its position, the table and the seed alone, so it is the same in whichever worker, rank or
restart it is made.
"""

from collections.abc import Callable

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from clip_exp.config.data_schema import AugmentationConfig, OnBadImage
from clip_exp.data.batches import BadPicture, EvalSample, Sample, caption_id
from clip_exp.data.files import BadImage, ImageLimits
from clip_exp.data.images import decode, decode_rgb
from clip_exp.data.pictures import Pictures
from clip_exp.data.randomness import Draws, hash64
from clip_exp.data.stream import Stream, StreamSource, needs_full_paths
from clip_exp.data.tables.labels import label_of_images
from clip_exp.data.tables.table import PairTable
from clip_exp.data.transforms import Preprocessing, eval_transform, train_transform
from clip_exp.errors import DataError
from clip_exp.text.build import Tokenizes

_CROP, _REPLACEMENT = 6, 7
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
