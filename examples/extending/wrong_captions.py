"""An evaluation task: the fraction of images whose caption is more similar than a wrong one (as in SugarCrepe; Hsieh et al. 2023).

python evaluate.py --config-dir examples/extending/conf run=outputs/train/… task=wrong_captions task.wrong_captions.table=pairs.csv
"""

import csv
from collections.abc import Callable
from pathlib import Path

from clip_exp.evaluation.evaluated_model import EvaluatedModel


class WrongCaptions:
    """Comparison of a right and a wrong caption for each image.

    Args:
        table: CSV file with the columns filepath, title and hard_negative; paths are relative to its folder.
    """

    metrics = ("accuracy",)  # names that `monitor` may use: monitor=wrong_captions/accuracy

    def __init__(self, table: str) -> None:
        with open(table, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        self.images = [Path(table).parent / row["filepath"] for row in rows]
        self.right, self.wrong = ([row[name] for row in rows] for name in ("title", "hard_negative"))

    def score(self, model: EvaluatedModel) -> Callable[[], dict[str, float]]:
        """Encode images and texts, distributed over the ranks; the returned function runs on rank 0 only."""
        encoded = model.encode_images("wrong_captions", self.images)
        right, wrong = (model.encode_texts("captions", texts).cpu() for texts in (self.right, self.wrong))

        def compute() -> dict[str, float]:
            # Unreadable images are left out.
            kept, features = encoded.kept, encoded.features.float().cpu()
            better = (features * right[kept]).sum(dim=-1) > (features * wrong[kept]).sum(dim=-1)
            return {"accuracy": better.double().mean().item()}

        return compute
