"""k-NN against scikit-learn's classifier with the same weights, and against the definition in plain Python."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

import clip_exp
from clip_exp.config.base import parse
from clip_exp.config.evaluation import EvaluateConfig
from clip_exp.errors import ClipExpError, ConfigError, DataError
from clip_exp.evaluation.launch import check, evaluate
from clip_exp.evaluation.tasks.knn import score as knn
from clip_exp.evaluation.tasks.knn.score import nearest, vote
from tests.evaluation.tinted import CLASSES, blobs, direct, tinted


def config(tmp_path: Path, run_dir: Path, values: dict) -> EvaluateConfig:
    task = {
        "knn": {"kind": "knn", "root": str(tmp_path / "test"), "train": {"root": str(tmp_path / "train")}, **values}
    }
    output = str(tmp_path / "outputs")
    whole = {"task": task, "run": str(run_dir), "output_dir": output, "accelerator": "cpu", "num_workers": 0}
    return parse(EvaluateConfig, whole)


def weigh(distances: np.ndarray) -> np.ndarray:
    """Return DINO's weights of Euclidean distances between unit vectors: cosine = 1 - distance² / 2."""
    return np.exp((1 - distances**2 / 2) / 0.07)


def test_the_result_equals_scikit_learns_weighted_neighbors(tmp_path: Path, run_dir: Path):
    train, test = tinted(tmp_path / "train", 12), tinted(tmp_path / "test", 5, first=50)
    result = evaluate(config(tmp_path, run_dir, {"k": 7}))["knn"]
    clip = clip_exp.load(str(run_dir))
    features, labels = direct(clip, test)
    expected = KNeighborsClassifier(7, weights=weigh).fit(*direct(clip, train))
    predicted = expected.predict(features)
    assert result["metrics"]["top1"] == np.mean(predicted == labels)
    recalls = [np.mean(predicted[labels == name] == name) for name in CLASSES]
    assert result["metrics"]["mean_per_class_recall"] == pytest.approx(np.mean(recalls))
    protocol = result["protocol"]
    assert (protocol["k"], protocol["temperature"], protocol["images"]) == (7, 0.07, 30)


def test_tiles_do_not_change_the_neighbors(monkeypatch: pytest.MonkeyPatch):
    train, _ = blobs(5, 40)
    query, _ = blobs(5, 7, seed=1)
    rows, cosines = nearest(query, train, 6)
    monkeypatch.setattr(knn, "TILE_ELEMENTS", 3 * len(train))
    in_tiles = nearest(query, train, 6)
    assert torch.equal(in_tiles[0], rows)
    assert torch.allclose(in_tiles[1], cosines)
    assert torch.equal(rows, (query @ train.T).sort(dim=1, descending=True, stable=True).indices[:, :6])


def test_the_first_of_equal_neighbors_vote():
    train = torch.nn.functional.normalize(torch.tensor([[0.0, 1.0], [1, 1], [1, 0], [1, 0], [1, 0], [1, 0]]), dim=1)
    rows, cosines = nearest(torch.tensor([[1.0, 0.0]]).expand(50, 2), train, 3)
    assert rows.tolist() == [[2, 3, 4]] * 50
    assert cosines.tolist() == [[1.0] * 3] * 50
    assert sorted(nearest(torch.tensor([[1.0, 0.0]]), train, 6)[0][0].tolist()) == list(range(6))


def test_votes_weigh_exp_of_cosine_over_temperature_and_ties_go_to_the_first_class():
    labels = torch.tensor([[3, 1, 1], [2, 0, 2]])
    cosines = torch.tensor([[0.9, 0.8, 0.7], [0.5, 0.5, 0.1]])
    best, probabilities = vote(labels, cosines, 4, temperature=0.1)
    weights = [math.exp(cosine / 0.1) for cosine in (0.9, 0.8, 0.7)]
    assert best[0, :2].tolist() == [3, 1]
    assert probabilities[0].tolist() == pytest.approx(
        [weights[0] / sum(weights), sum(weights[1:]) / sum(weights), 0, 0]
    )
    assert best[1, :2].tolist() == [2, 0]
    tied, _ = vote(torch.tensor([[2, 1]]), torch.tensor([[0.5, 0.5]]), 4, temperature=0.1)
    assert tied.tolist() == [[1, 2, 0, 3]]
    cold, _ = vote(labels[:1], cosines[:1], 4, temperature=1e-4)  # exp(9000) is infinite
    assert cold[0, 0] == 3


def test_a_class_without_neighbors_is_not_a_hit_in_the_top_five(tmp_path: Path, run_dir: Path):
    tinted(tmp_path / "train", 3)
    tinted(tmp_path / "test", 3, first=50)
    result = evaluate(config(tmp_path, run_dir, {"k": 1}))["knn"]
    assert result["metrics"]["top5"] == result["metrics"]["top1"] < 1


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"k": 13}, ConfigError, r"task\.knn\.k=13 must be between 1 and 12"),
        ({"k": 0}, ConfigError, r"task\.knn\.k=0 must be greater than 0"),
        ({"k": 2, "temperature": 0.0}, ConfigError, r"temperature=0\.0 must be greater than 0"),
        ({"k": 2, "root": "{tmp}/more"}, DataError, "more without training images: 'elk', 'fox'"),
        ({"k": 2, "train": {}}, ConfigError, r"task\.knn\.train: give exactly one of root"),
    ],
)
def test_invalid_settings_are_reported_before_the_model_is_loaded(
    tmp_path: Path, run_dir: Path, values: dict, error: type[ClipExpError], message: str
):
    tinted(tmp_path / "train", 3, classes=CLASSES[:4])
    tinted(tmp_path / "test", 2, first=50, classes=CLASSES[:4])
    tinted(tmp_path / "more", 2, first=50)
    filled = json.loads(json.dumps(values).replace("{tmp}", str(tmp_path)))
    with pytest.raises(error, match=message):
        check(config(tmp_path, run_dir, filled))
