"""Zero-shot classification: its configuration, data and score. Torch is imported only to score a model."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from clip_exp.config.base import Texts
from clip_exp.config.evaluation import LabeledDataConfig, TaskConfig
from clip_exp.evaluation.task import Task

if TYPE_CHECKING:
    from torch import Tensor

    from clip_exp.evaluation.evaluated_model import ComputeResult, EvaluatedModel
    from clip_exp.evaluation.features import EncodedImages
    from clip_exp.evaluation.sets.labeled import LabeledImages
    from clip_exp.reports.evaluation import Result


class ZeroShotTaskConfig(LabeledDataConfig, TaskConfig):
    """Zero-shot classification: the embedding of a class is the average over its name in all templates."""

    kind: Literal["zero_shot"] = "zero_shot"
    templates: Texts = Field(
        "openai", description="openai (80), simple (7), a list, or a file with one template per line"
    )

    title: ClassVar[str] = "Zero-shot classification"

    def prepare(self, name: str, output_dir: str, run: Any = None) -> "list[ClassificationTask]":
        """Find the images and their labels, class names and templates."""
        from clip_exp.evaluation.sets.class_names import templates
        from clip_exp.evaluation.sets.datasets import labeled_images

        where = f"task.{name}"
        prompts = templates(self.templates, f"{where}.templates")
        return [ClassificationTask(name, self, labeled_images(self, where, output_dir), prompts)]


@dataclass(frozen=True)
class ClassificationTask(Task):
    config: ZeroShotTaskConfig
    data: "LabeledImages"
    templates: list[str]

    @property
    def num_classes(self) -> int | None:
        return len(self.data.class_names)

    def score(self, model: "EvaluatedModel") -> "ComputeResult":
        classifier = model.classifier(self.data.class_names, self.templates)
        encoded = model.encode_images(self.name, self.data.images)
        return lambda: self.compute_result(encoded, classifier)

    def compute_result(self, encoded: "EncodedImages", classifier_CD: "Tensor") -> "Result":
        """Return the result from the features of the images and the classifier."""
        import torch

        from clip_exp.evaluation.classification import accuracies, classified, classify
        from clip_exp.evaluation.evaluated_model import LISTED, absolute, counts, hash_of, source_of
        from clip_exp.reports.evaluation import Result

        data = self.data
        labels = torch.tensor(data.labels)[encoded.kept]
        best, probabilities = classify(encoded.features, classifier_CD)
        protocol = {
            "kind": self.config.kind,
            "data": absolute(data.where),
            **counts(encoded),
            "unlabeled_images": data.unlabeled,
            **data.about,
            "classes": len(data.class_names),
            "classes_source": source_of(self.config.classes),
            "classes_sha256": hash_of(data.class_names),
            "classes_without_images": len(data.missing),
            "templates": len(self.templates),
            "templates_source": source_of(self.config.templates),
            "templates_sha256": hash_of(self.templates),
        }
        if self.config.classes != "imagenet":
            named = {key: name for key, name in zip(data.keys, data.class_names, strict=True) if key is not None}
            protocol["names"] = named if len(data.keys) <= LISTED else None
        details = classified(data, encoded, labels, best, probabilities)
        return Result(accuracies(best, labels, len(data.class_names)), protocol, details)
