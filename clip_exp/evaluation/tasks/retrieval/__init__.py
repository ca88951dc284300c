"""Retrieval between images and captions: its configuration, data and score. Torch is imported only to score a model."""

import logging
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from clip_exp.config.base import Paths, Unused
from clip_exp.config.evaluation import Scale, TableConfig, TaskConfig
from clip_exp.evaluation.sets.validation import validation_table
from clip_exp.evaluation.task import Task

if TYPE_CHECKING:
    from clip_exp.config.training import TrainConfig
    from clip_exp.data.image_sets import TableImages
    from clip_exp.evaluation.evaluated_model import ComputeResult, EvaluatedModel

log = logging.getLogger(__name__)
LISTED_COPIES = 20  # most groups of copies, and names per group, that the evaluation settings list


class RetrievalTaskConfig(TableConfig, TaskConfig):
    """Recall@k between images and captions in both directions; any caption of the image is a hit."""

    kind: Literal["retrieval"] = "retrieval"
    table: Paths | None = Field(
        None,
        description="table with `image_key` and `caption_key`, shards, a pattern, or a list of them; null: the validation data of the run",
    )
    caption_key: str | list[str] = Field("title", description="column of captions, or several columns")

    title: ClassVar[str] = "Retrieval"
    headline: ClassVar[tuple[str, ...]] = ("recall@1_i2t", "recall@1_t2i", "median_rank_i2t", "median_rank_t2i")
    scales: ClassVar[dict[str, Scale]] = {"median_rank_i2t": Scale.rank, "median_rank_t2i": Scale.rank}

    unused: ClassVar[tuple[Unused, ...]] = (
        Unused(
            f"{' '.join(TableConfig.model_fields)} caption_key",
            lambda task: task.table is None,
            "without {at}table, since the validation data of the run are read as in training",
            "set that, or leave this out",
        ),
    )

    @property
    def of_validation(self) -> bool:
        return self.table is None

    def prepare(self, name: str, output_dir: str, run: "TrainConfig | None" = None) -> "list[RetrievalTask]":
        """Find the images and captions; rows with the same file are captions of one image."""
        if self.table is None:
            table = validation_table(run, f"task.{name}", output_dir)
            assert run is not None
            task = RetrievalTaskConfig(**table, caption_key=run.data.caption_key)
            return task._read(name, {"data_from": "validation data of the run"})
        return self._read(name, {})

    def _read(self, name: str, about: dict[str, Any]) -> "list[RetrievalTask]":
        from clip_exp.data.image_sets import TableImages
        from clip_exp.evaluation.sets.datasets import read_pairs, require_tables

        assert self.table is not None
        require_tables(self.table, f"task.{name}")
        pairs = read_pairs(self.table, f"task.{name}", self, caption_key=self.caption_key)
        assert pairs.captions is not None
        caption_image = pairs.image_index().tolist()
        first_row = {image: row for row, image in reversed(list(enumerate(caption_image)))}
        rows = [first_row[image] for image in range(len(first_row))]
        images = TableImages(pairs, rows, self.allow_outside_root)
        about = {**about, **pairs.shortcomings()}
        return [RetrievalTask(name, self, images, pairs.captions.to_pylist(), caption_image, str(self.table), about)]


@dataclass(frozen=True)
class RetrievalTask(Task):
    images: "TableImages"  # distinct images
    captions: list[str]
    caption_image: list[int]  # position in `images` of the image of each caption
    where: str
    about: dict[str, Any] = field(default_factory=dict)  # further evaluation settings about the data

    @property
    def metrics(self) -> list[str]:
        from clip_exp.reports.names import RETRIEVAL

        return RETRIEVAL

    @cached_property
    def copies(self) -> list[list[str]]:
        """Groups of names of images with the same bytes. May read all images."""
        from clip_exp.data.files import equal_contents

        groups = equal_contents([self.images.stored(index) for index in range(len(self.images))])
        named = [[self.images.name(index) for index in group] for group in groups]
        if named:
            log.warning(
                "%s: copies of images under other names: %d, such as %s. A caption of one copy counts as wrong for the others.",
                self.name,
                sum(len(group) - 1 for group in named),
                " and ".join(named[0][:2]),
            )
        return named

    def score(self, model: "EvaluatedModel") -> "ComputeResult":
        """Return a function that computes recall and median rank in both directions. Captions of unreadable images are left out."""
        import torch

        from clip_exp.evaluation.evaluated_model import absolute, counts
        from clip_exp.evaluation.retrieval import examples, retrieval
        from clip_exp.reports.evaluation import Result

        device = model.options.device
        encoded = model.encode_images(self.name, self.images)
        caption_image = torch.tensor(self.caption_image)
        kept = torch.isin(caption_image, encoded.kept)
        captions = [self.captions[i] for i in kept.nonzero().flatten().tolist()]
        text_features = model.encode_texts(f"{self.name}: captions", captions)

        def compute_result() -> Result:
            rows = torch.searchsorted(encoded.kept, caption_image[kept]).to(device)
            image_features = encoded.features.to(device)
            copies: dict[str, Any] = {}
            if self.copies:  # each copy is a wrong result for the captions of the others
                copies = {
                    "copied_images": len(self.copies),
                    "copies": sum(len(names) - 1 for names in self.copies),
                    "copies_listed": [" = ".join(names[:LISTED_COPIES]) for names in self.copies[:LISTED_COPIES]],
                }
            protocol = {
                "data": absolute(self.where),
                **counts(encoded),
                "captions": len(captions),
                **self.about,
                **copies,
                "image_to_text": "hit if any caption of the image is in the top k",
            }
            details = examples(image_features, text_features, rows, encoded.kept, captions, self.images, encoded.limits)
            return Result(retrieval(image_features, text_features, rows), protocol, details)

        return compute_result
