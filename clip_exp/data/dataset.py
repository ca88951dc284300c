"""Samples by position: of the training stream, of a validation table, of a list of pictures.

What a sample holds depends on its position, the table and the seed alone, so it is the same in whichever worker, rank or
restart it is made.
"""

from collections.abc import Callable
from functools import lru_cache

from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from clip_exp.config.schema import AugmentationConfig, OnBadImage
from clip_exp.data.batches import BadPicture, EvalSample, Sample, caption_id
from clip_exp.data.files import BadImage, ImageLimits
from clip_exp.data.images import decode, decode_rgb
from clip_exp.data.order import Permutation
from clip_exp.data.pictures import Pictures
from clip_exp.data.randomness import Draws, hash64
from clip_exp.data.rows import Rows, group_by_picture
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
    """Training samples by position in the stream (`clip_exp.data.order`), without end.

    Args:
        table: of pairs.
        rows: of the stream (`clip_exp.data.rows`).
        image_size: side of the pictures, pixels.
        tokenizer: of the captions.
        seed: of order, captions, crops and replacements.
        augmentation: of the crops.
        on_bad_image: raise, or take another row that depends on the seed, the epoch and the bad row alone.
        limits: of the pictures.
    """

    def __init__(
        self,
        table: PairTable,
        rows: Rows,
        *,
        image_size: int,
        tokenizer: Tokenizes,
        seed: int,
        augmentation: AugmentationConfig,
        on_bad_image: OnBadImage = OnBadImage.replace,
        limits: ImageLimits = DEFAULT_LIMITS,
    ) -> None:
        self.table, self.rows = table, rows
        self.image_size, self.seed, self.augmentation = image_size, seed, augmentation
        self.on_bad_image, self.limits = on_bad_image, limits
        self.tokenizer = tokenizer

    def __getitem__(self, position: int) -> Sample:
        epoch, i = divmod(position, len(self.rows))
        wanted = row = _permutation(len(self.rows), self.seed, epoch)[i]
        bad: list[BadPicture] = []
        while True:
            table_row = self.rows.table_row(row, self.seed, epoch)
            try:
                image = self._image(table_row, epoch, row)
            except BadImage as error:
                bad.append(BadPicture(self.table.path(table_row), str(error)))
                self._check(bad, table_row)
                row = hash64(_REPLACEMENT, self.seed, epoch, wanted, len(bad)) % len(self.rows)
            else:
                return self._sample(image, table_row, row, tuple(bad))

    def _image(self, table_row: int, epoch: int, row: int) -> Tensor:
        image = decode_rgb(self.table.read_picture(table_row, self.limits), self.limits)
        return train_transform(image, self.image_size, Draws(_CROP, self.seed, epoch, row), self.augmentation)

    def _sample(self, image: Tensor, table_row: int, row: int, bad: tuple[BadPicture, ...]) -> Sample:
        truncated_before = self.tokenizer.truncated
        tokens = self.tokenizer.encode(self.table.caption(table_row))
        truncated = self.tokenizer.truncated > truncated_before
        return Sample(image, tokens, caption_id(tokens), self.rows.picture(row), bad, truncated)

    def _check(self, bad: list[BadPicture], table_row: int) -> None:
        if self.on_bad_image is OnBadImage.error:
            raise PictureError(unreadable(self.table, table_row, bad[-1].reason, "data.on_bad_image=replace"))
        if len(bad) >= _MAX_REPLACEMENTS:
            raise PictureError(
                f"{len(bad)} pictures drawn in a row cannot be read, such as {bad[0].path!r} ({bad[0].reason}): "
                f"look at the table {self.table.parts[0].file} and at data.image_root, now {self.table.root}."
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
        class_names: distinct labels, sorted; a row with an empty label belongs to none. Empty without labels.
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
        self._order, self._offsets = group_by_picture(table.image_index())
        labels = set() if table.labels is None else set(table.labels.unique().to_pylist())
        self.class_names: list[str] = sorted(labels - {""})

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, index: int) -> EvalSample:
        rows: list[int] = self._order[self._offsets[index] : self._offsets[index + 1]].tolist()
        label = self.table.label(rows[0]) if self.table.labels is not None else ""
        token_lists = (
            [] if self.table.captions is None else [self.tokenizer.encode(self.table.caption(r)) for r in rows]
        )
        image, bad = self._image(rows[0])
        return EvalSample(
            index=index,
            image=image,
            token_lists=token_lists,
            caption_indices=rows if token_lists else [],
            label=self.class_names.index(label) if label else -1,
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
            return None, (BadPicture(self.table.path(row), str(error)),)


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


@lru_cache(maxsize=4)
def _permutation(n: int, seed: int, epoch: int) -> Permutation:
    return Permutation(n, seed, epoch)
