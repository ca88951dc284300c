"""The linear probe, compared with scikit-learn called directly."""

import csv
import json
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from torchvision import models

import clip_exp
from clip_exp.config.base import parse
from clip_exp.config.evaluation import EvalOnBadImage, EvaluateConfig
from clip_exp.errors import ClipExpError, ConfigError, DataError
from clip_exp.evaluation.launch import check, evaluate
from clip_exp.evaluation.tasks.linear_probe import LinearProbeTaskConfig, require_held_out_images
from clip_exp.evaluation.tasks.linear_probe.score import choose_c, fit_probe, predict, search
from tests.evaluation.tinted import CLASSES, blobs, direct, tinted
from tests.runs import Finished
from tests.small_runs import write_image


def config(tmp_path: Path, run_dir: Path, values: dict, **others) -> EvaluateConfig:
    task = {
        "probe": {
            "kind": "linear_probe",
            "root": str(tmp_path / "test"),
            "train": {"root": str(tmp_path / "train")},
            **values,
        }
    }
    output = str(tmp_path / "outputs")
    whole = {"task": task, "run": str(run_dir), "output_dir": output, "accelerator": "cpu", "num_workers": 0, **others}
    return parse(EvaluateConfig, whole)


@pytest.mark.parametrize("classes", [2, 7])
def test_a_fit_scores_and_predicts_as_scikit_learn(classes: int):
    features, labels = blobs(classes, 20)
    probe = fit_probe(features, labels, c=3.0)
    expected = LogisticRegression(C=3.0, max_iter=1000).fit(features.double().numpy(), labels.numpy())
    test, _ = blobs(classes, 9, seed=1)
    best, probabilities = predict(probe, test)
    assert best[:, 0].tolist() == expected.predict(test.double().numpy()).tolist()
    everything = torch.from_numpy(expected.predict_proba(test.double().numpy()))
    assert torch.allclose(probabilities, everything.gather(1, best), atol=1e-12)
    assert best.shape == (classes * 9, min(5, classes))


def test_every_c_has_scikit_learns_accuracy_on_the_held_out_images():
    features, labels = blobs(5, 30, noise=2.0)
    choice = choose_c(features, labels, candidates=[100, 0.01, 1], val_fraction=0.25, seed=3)
    fitted, held_out, own, of_held_out = train_test_split(
        features.double().numpy(), labels.numpy(), test_size=0.25, stratify=labels.numpy(), random_state=3
    )
    expected = {
        c: LogisticRegression(C=c, max_iter=1000).fit(fitted, own).score(held_out, of_held_out) for c in (0.01, 1, 100)
    }
    assert choice.accuracy == pytest.approx(expected)
    assert choice.c == max(expected, key=lambda c: (expected[c], -c))


@pytest.mark.parametrize(("peak", "fits"), [(1.3, 15), (-0.1, 15), (-6.0, 11), (6.5, 11)])
def test_the_papers_search_goes_from_seven_values_to_an_eighth_of_a_decade_around_the_best(peak: float, fits: int):
    tried: list[float] = []

    def distance(c: float) -> float:
        return abs(np.log10(c) - peak)

    steps = search(lambda: min(tried, key=distance))
    while (c := next(steps, None)) is not None:
        tried.append(c)
    powers = np.log10(tried)
    assert np.allclose(powers[:7], [-6, -4, -2, 0, 2, 4, 6])
    assert len(set(np.round(powers * 8, 6))) == len(tried) == fits
    assert np.allclose(powers * 8, np.round(powers * 8))
    assert abs(powers).max() <= 6 + 1e-9
    grid = np.arange(-48, 49) / 8
    assert min(distance(c) for c in tried) == pytest.approx(min(abs(grid - peak)))


def test_without_candidates_the_search_chooses_the_first_of_the_best():
    features, labels = blobs(5, 30, noise=2.0)
    choice = choose_c(features, labels)
    top = max(choice.accuracy.values())
    assert choice.c == min(c for c, accuracy in choice.accuracy.items() if accuracy == top)
    again = choose_c(features, labels, candidates=list(choice.accuracy))
    assert again == choice


def test_a_fit_that_does_not_converge_is_in_the_result_and_not_a_warning():
    features, labels = blobs(4, 20, noise=2.0)
    probe = fit_probe(features, labels, c=1e6, max_iter=2)
    assert not probe.converged
    assert probe.iterations == 2
    with pytest.warns(ConvergenceWarning):
        LogisticRegression(C=1e6, max_iter=2).fit(features.double().numpy(), labels.numpy())
    assert choose_c(features, labels, candidates=[1e-3, 1e6], max_iter=8).unconverged == [1e6]


def test_the_result_equals_scikit_learn_called_directly_on_encoded_images(tmp_path: Path, run_dir: Path):
    train, test = tinted(tmp_path / "train", 12), tinted(tmp_path / "test", 5, first=50)
    result = evaluate(config(tmp_path, run_dir, {"c": [0.1, 10.0, 1000.0]}))["probe"]

    clip = clip_exp.load(str(run_dir))
    (features, labels), (test_features, test_labels) = direct(clip, train), direct(clip, test)
    fitted, held_out, own, of_held_out = train_test_split(
        features, labels, test_size=0.2, stratify=labels, random_state=0
    )
    scores = {
        c: LogisticRegression(C=c, max_iter=1000).fit(fitted, own).score(held_out, of_held_out)
        for c in (0.1, 10.0, 1000.0)
    }
    c = max(scores, key=lambda c: (scores[c], -c))
    expected = LogisticRegression(C=c, max_iter=1000).fit(features, labels)
    predicted = expected.predict(test_features)
    assert result["protocol"]["c"] == c
    assert list(result["protocol"]["choice_of_c"]["accuracy"].values()) == pytest.approx(
        list(scores.values()), abs=1e-6
    )
    assert result["metrics"]["top1"] == np.mean(predicted == test_labels)
    recalls = [np.mean(predicted[test_labels == name] == name) for name in CLASSES]
    assert result["metrics"]["mean_per_class_recall"] == pytest.approx(np.mean(recalls))
    best = np.argsort(-expected.decision_function(test_features), axis=1)[:, :5]
    assert result["metrics"]["top5"] == np.mean(
        [name in expected.classes_[row] for name, row in zip(test_labels, best, strict=True)]
    )
    assert (result["protocol"]["images"], result["protocol"]["train"]["images"]) == (30, 72)


def test_the_weights_are_a_file_that_classifies_features(tmp_path: Path, run_dir: Path):
    train, test = tinted(tmp_path / "train", 8), tinted(tmp_path / "test", 4, first=50)
    result = evaluate(config(tmp_path, run_dir, {"c": [10.0], "classes": list(CLASSES)}))["probe"]
    clip = clip_exp.load(str(run_dir))
    features, _ = direct(clip, test)
    expected = LogisticRegression(C=10.0, max_iter=1000).fit(*direct(clip, train)).predict(features)
    (folder,) = (tmp_path / "outputs" / "evaluate" / "vit_nano_csv").iterdir()
    for place in (folder, run_dir):
        with safe_open(place / "eval" / "probe.probe.safetensors", framework="pt") as file:
            names = json.loads(file.metadata()["class_names"])
            scores = torch.from_numpy(features).float() @ file.get_tensor("coefficients").T + file.get_tensor(
                "intercept"
            )
            assert file.metadata()["weights_sha256"] == result["protocol"]["weights_sha256"]
        assert [names[index] for index in scores.argmax(dim=1)] == list(expected)


def test_classes_are_matched_by_folder_and_named_as_in_the_task(tmp_path: Path, run_dir: Path):
    tinted(tmp_path / "train", 6)
    test = tinted(tmp_path / "test", 4, first=50, classes=("bee", "dog", "fox"))
    names = {"bee": "eine Biene", "dog": "ein Hund", "fox": "ein Fuchs"}
    result = evaluate(config(tmp_path, run_dir, {"c": [10.0], "classes": names}))["probe"]
    clip = clip_exp.load(str(run_dir))
    features, labels = direct(clip, test)
    expected = LogisticRegression(C=10.0, max_iter=1000).fit(*direct(clip, tmp_path / "train"))
    assert result["metrics"]["top1"] == expected.score(features, labels)
    assert result["protocol"]["classes_without_images"] == 3
    assert result["protocol"]["names"] == {"ant": "ant", "cow": "cow", "elk": "elk", **names}


def test_a_table_is_matched_to_folders_by_label(tmp_path: Path, run_dir: Path):
    tinted(tmp_path / "train", 6)
    test = tinted(tmp_path / "test", 3, first=50, classes=("fox", "ant"))
    rows = [f"{path.parent.name}/{path.name},{path.parent.name}" for path in sorted(test.glob("*/*.png"))]
    (test / "test.csv").write_text("\n".join(["filepath,label", *rows]) + "\n")
    values = {"c": [10.0], "root": None, "table": str(test / "test.csv")}
    result = evaluate(config(tmp_path, run_dir, values))["probe"]
    clip = clip_exp.load(str(run_dir))
    expected = LogisticRegression(C=10.0, max_iter=1000).fit(*direct(clip, tmp_path / "train"))
    assert result["metrics"]["top1"] == expected.score(*direct(clip, test))


def test_broken_images_of_train_and_test_are_left_out_and_counted(tmp_path: Path, run_dir: Path):
    train, test = tinted(tmp_path / "train", 6), tinted(tmp_path / "test", 4, first=50)
    for path in (train / "bee" / "2.png", test / "cow" / "51.png"):
        path.write_bytes(b"no image")
    result = evaluate(config(tmp_path, run_dir, {"c": [10.0]}, on_bad_image=EvalOnBadImage.skip))["probe"]
    for path in (train / "bee" / "2.png", test / "cow" / "51.png"):
        path.unlink()
    clip = clip_exp.load(str(run_dir))
    expected = LogisticRegression(C=10.0, max_iter=1000).fit(*direct(clip, train))
    assert result["metrics"]["top1"] == expected.score(*direct(clip, test))
    protocol = result["protocol"]
    assert (protocol["images"], protocol["bad_images"]) == (23, 1)
    assert (protocol["train"]["images"], protocol["train"]["bad_images"]) == (35, 1)
    for path in (train / "bee").glob("*.png"):
        path.write_bytes(b"no image")
    with pytest.raises(DataError, match="no image of class 'bee' can be read"):
        evaluate(config(tmp_path, run_dir, {"c": [10.0]}, on_bad_image=EvalOnBadImage.skip))


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"train": {}}, ConfigError, r"task\.probe\.train: give exactly one of root"),
        ({"root": None}, ConfigError, r"task\.probe: give exactly one of root"),
        ({"train": {"root": "{tmp}/absent"}}, ConfigError, r"task\.probe\.train.*absent: no such folder"),
        ({"train": {"root": "{tmp}/test"}}, ConfigError, "train has the test images"),
        ({"root": "{tmp}/more"}, DataError, r"classes of .*more without training images: 'fox'\. The classes of .*train are 'ant', 'bee', 'cow', 'dog', 'elk'"),
        ({"train": {"root": "{tmp}/one"}}, DataError, "have the same class: at least two classes are required"),
        ({"train": {"root": "{tmp}/single"}}, DataError, r"cannot be held out: 'elk'.*task\.probe\.c=\[10\]"),
        ({"val_fraction": 0.01}, DataError, r"val_fraction=0\.01 of 20 images: a part would have fewer"),
        ({"val_fraction": 1.0}, ConfigError, r"task\.probe\.val_fraction=1\.0 must be less than 1"),
        ({"c": [1.0, -1.0]}, ConfigError, r"task\.probe\.c\[1\]=-1\.0 must be greater than 0"),
        ({"c": []}, ConfigError, r"task\.probe\.c=\[\] must not be empty"),
        ({"max_iter": 0}, ConfigError, "max_iter=0 must be greater than 0"),
        ({"val_fractoin": 0.1}, ConfigError, "did you mean 'task.probe.val_fraction'"),
    ],
)  # fmt: skip
def test_invalid_settings_are_reported_before_the_model_is_loaded(
    tmp_path: Path, run_dir: Path, values: dict, error: type[ClipExpError], message: str
):
    five = CLASSES[:5]
    tinted(tmp_path / "train", 4, classes=five)
    tinted(tmp_path / "test", 2, first=50, classes=five)
    tinted(tmp_path / "more", 2, first=50)
    tinted(tmp_path / "one", 4, classes=("ant",))
    tinted(tinted(tmp_path / "single", 4, classes=five[:4]), 1, classes=five[4:])
    filled = json.loads(json.dumps(values).replace("{tmp}", str(tmp_path)))
    with pytest.raises(error, match=message):
        check(config(tmp_path, run_dir, filled))


def test_a_single_value_of_c_needs_no_held_out_images():
    task = LinearProbeTaskConfig(c=[1.0])
    require_held_out_images([0, 1, 2], ["a", "b", "c"], task, "probe")


def test_no_warning_reaches_the_user(tmp_path: Path, run_dir: Path):
    tinted(tmp_path / "train", 5)
    tinted(tmp_path / "test", 2, first=50)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = evaluate(config(tmp_path, run_dir, {"max_iter": 1}))["probe"]
    assert result["protocol"]["converged"] is False
    assert result["protocol"]["choice_of_c"]["not_converged"]


def test_on_the_digits_run_both_reach_97_percent_and_the_probe_equals_scikit_learn(
    digits: Finished, command: Callable, tmp_path: Path
):
    done = command(
        "evaluate.py",
        f"run={digits.folder}",
        "task=[digits_linear_probe,digits_knn]",
        f"output_dir={tmp_path}",
        "accelerator=cpu",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    results = {
        name: json.loads((digits.folder / "eval" / f"{name}.json").read_text())
        for name in ("digits_linear_probe", "digits_knn")
    }
    assert min(result["metrics"]["top1"] for result in results.values()) >= 0.97
    probe, clip = results["digits_linear_probe"], clip_exp.load(str(digits.folder))
    (data,) = (tmp_path / "data").iterdir()
    halves = []
    for name in ("train", "val"):
        with (data / f"{name}.csv").open() as file:
            rows = list(csv.DictReader(file))
        features = clip.encode_image([data / row["filepath"] for row in rows]).double().numpy()
        halves.append((features, np.array([row["label"] for row in rows])))
    expected = LogisticRegression(C=probe["protocol"]["c"], max_iter=1000).fit(*halves[0])
    assert probe["metrics"]["top1"] == expected.score(*halves[1])


@pytest.mark.exhaustive
def test_two_ranks_give_the_numbers_of_one(tmp_path: Path, run_dir: Path, command: Callable):
    """All learned tasks, and the network next to CLIP: 31 and 11 images, so that no rank has the same number."""
    train, test = tinted(tmp_path / "train", 5), tinted(tmp_path / "test", 2, first=50)
    tinted(tmp_path / "train", 1, first=70, classes=("ant",))
    (test / "bee" / "50.png").unlink()
    wnids = ("n01440764", "n01443537")
    for position, wnid in enumerate(wnids):
        for number in range(20):
            write_image(tmp_path / "imagenet" / wnid / f"{number}.png", 100 * position + number)
    torch.manual_seed(0)
    torch.save(models.resnet18(weights=None).state_dict(), tmp_path / "resnet18.pth")
    sets = ",".join(
        f"{name}: null" for name in ("imagenet_v2", "imagenet_r", "objectnet", "imagenet_sketch", "imagenet_a")
    )
    overrides = [
        f"run={run_dir}",
        "task=[linear_probe,knn,robustness]",
        *(f"task.{kind}.train.root={train}" for kind in ("linear_probe", "knn")),
        *(f"task.{kind}.root={test}" for kind in ("linear_probe", "knn")),
        "task.knn.k=5",
        f"task.robustness.sets={{imagenet: {{root: {tmp_path}/imagenet}},{sets}}}",
        "task.robustness.templates=simple",
        "task.robustness.baseline=resnet18",
        f"task.robustness.baseline_weights={tmp_path}/resnet18.pth",
        "accelerator=cpu",
        "num_workers=0",
    ]
    results = []
    for devices in (1, 2):
        output = tmp_path / f"outputs{devices}"
        done = command("evaluate.py", *overrides, f"devices={devices}", f"output_dir={output}", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        (folder,) = output.glob("evaluate/*/*/eval")
        jsons = {path.name: json.loads(path.read_text()) for path in folder.glob("*.json")}
        results.append((jsons, load_file(folder / "linear_probe.probe.safetensors")))
    (one, weights_of_one), (two, weights_of_two) = results
    assert set(one) == {"linear_probe.json", "knn.json", "robustness.json"}
    assert one == two
    assert all(torch.equal(weights_of_one[name], weights_of_two[name]) for name in ("coefficients", "intercept"))
