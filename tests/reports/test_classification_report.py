"""Per-class counts and their CSV file, confusion matrices, groups and the map."""

import csv
from dataclasses import replace
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import confusion_matrix, recall_score

from clip_exp.reports import classification_report
from clip_exp.reports.classification_report import Classified, as_csv, confusions, distinct_names, per_class
from tests.reports.examples import classified, noise_files


@pytest.fixture
def seven(tmp_path: Path) -> Classified:
    return classified(noise_files(tmp_path, 3), 7, 400)


def rows_of(details: Classified) -> list[dict[str, str]]:
    return list(csv.DictReader(StringIO(as_csv(details))))


def test_the_file_has_scikit_learns_recall_and_confusions_of_every_class(seven: Classified):
    predicted = seven.best[:, 0]
    recall = recall_score(seven.labels, predicted, average=None)
    counts = confusion_matrix(seven.labels, predicted)
    for number, row in enumerate(rows_of(seven)):
        assert (row["key"], row["name"]) == (seven.keys[number], seven.class_names[number])
        assert int(row["images"]) == counts[number].sum()
        assert int(row["predicted"]) == counts[:, number].sum()
        assert float(row["top1"]) == pytest.approx(recall[number], abs=1e-6)
        of_class = seven.best[seven.labels == number]
        assert float(row["top5"]) == pytest.approx((of_class == number).any(axis=1).mean(), abs=1e-6)
        wrong = np.delete(counts[number], number)
        other = seven.class_names.index(row["most_confused_with"])
        assert counts[number, other] == wrong.max()
        assert float(row["fraction"]) == pytest.approx(wrong.max() / counts[number].sum(), abs=1e-6)


def test_classes_without_images_or_mistakes_have_empty_fields(seven: Classified):
    extended = replace(seven, class_names=[*seven.class_names, "unseen"], keys=[*seven.keys, None])
    last = rows_of(extended)[-1]
    assert last == dict.fromkeys(last, "") | {"name": "unseen", "images": "0", "predicted": "0"}
    right = replace(seven, best=np.stack([seven.labels, (seven.labels + 1) % 7], axis=1))
    assert {(row["top1"], row["most_confused_with"], row["fraction"]) for row in rows_of(right)} == {("1", "", "")}


def test_names_in_any_language_and_with_separators_are_preserved(seven: Classified):
    names = ["chien, brun", 'a "b"', "两\n行", "猫", "x", "y", "z"]
    assert [row["name"] for row in rows_of(replace(seven, class_names=names))] == names


def test_classes_of_the_same_name_get_their_keys(seven: Classified):
    details = replace(
        seven,
        class_names=["missile", "dog", "missile", "cat", "fox", "fox", "owl"],
        keys=["n03773504", "n1", "n04008634", "n2", None, None, "n3"],
    )
    assert distinct_names(details)[:3] == ["missile (n03773504)", "dog", "missile (n04008634)"]
    assert distinct_names(details)[4:6] == ["fox (4)", "fox (5)"]
    assert rows_of(details)[1]["most_confused_with"] == "missile (n04008634)"  # the class after it
    assert rows_of(details)[2]["name"] == "missile"


def test_missing_predictions_are_not_hits(seven: Classified):
    best = seven.best.copy()
    best[:, 1:] = -1
    counts = per_class(replace(seven, best=best))
    assert (counts.top5 == counts.top1).all()


def test_the_matrix_is_scikit_learns(seven: Classified):
    expected = confusion_matrix(seven.labels, seven.best[:, 0])
    assert classification_report.matrix(seven, list(range(7))).cells == expected.tolist()
    part = classification_report.matrix(seven, [5, 2])
    assert part.cells == expected[np.ix_([5, 2], [5, 2])].tolist()
    assert part.elsewhere == [np.delete(expected[row], [5, 2]).sum() for row in (5, 2)]


def planted(tmp_path: Path) -> tuple[Classified, list[list[int]]]:
    """Return 60 classes, three groups of which, spread over the list, are confused with each other; the others are correct."""
    families = [[3, 17, 44], [8, 9, 30, 51], [20, 58]]
    details = classified(noise_files(tmp_path, 1), 60, 1200, right=1.0)
    predicted = details.labels.copy()
    for family in families:
        inside = np.flatnonzero(np.isin(details.labels, family))
        predicted[inside] = np.random.default_rng(1).choice(family, len(inside))
    best = np.concatenate([predicted[:, None], details.best[:, 1:]], axis=1)
    return replace(details, best=best), families


def test_groups_are_classes_that_are_confused_with_each_other(tmp_path: Path):
    details, families = planted(tmp_path)
    counts, wrong = per_class(details), confusions(details)
    classes = classification_report.involved(counts, wrong)
    alike = classification_report.similarity(wrong, counts.images, classes)
    tree, order = classification_report.cluster(alike)
    assert sorted(classification_report.groups(alike, tree, classes)) == sorted(families)
    place = {int(number): position for position, number in enumerate(classes[order])}
    for family in families:  # neighbors on the map
        places = sorted(place[number] for number in family)
        assert places[-1] - places[0] == len(family) - 1


def test_the_map_holds_the_whole_confusion_matrix(tmp_path: Path):
    details, _ = planted(tmp_path)
    order = np.random.default_rng(2).permutation(60)
    data = classification_report.map_data(details, order, details.class_names)
    drawn = np.zeros((60, 60), dtype=int)
    for row, column, count in np.array(data["cells"]).reshape(-1, 3):
        drawn[order[row], order[column]] = count
    assert (drawn == confusion_matrix(details.labels, details.best[:, 0], labels=range(60))).all()
    assert data["names"] == [details.class_names[number] for number in order]
    assert data["images"] == np.bincount(details.labels, minlength=60)[order].tolist()


def test_a_map_of_too_many_classes_keeps_those_with_the_most_mistakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(classification_report, "ON_A_MAP", 9)
    details, families = planted(tmp_path)
    kept = classification_report.involved(per_class(details), confusions(details))
    assert kept.tolist() == sorted(number for family in families for number in family)
