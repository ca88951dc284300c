"""Contents of the HTML reports; they are self-contained, and no value in them becomes markup."""

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from clip_exp.reports.classification_report import classification_report
from clip_exp.reports.comparison_report import Compared, comparison_report
from clip_exp.reports.evaluation import Result
from clip_exp.reports.html import fact_rows, probability
from clip_exp.reports.retrieval_report import retrieval_report
from tests.reports.examples import (
    ATTACK,
    HEADING,
    classification_result,
    classified,
    compared_result,
    noise_files,
    retrieval_result,
    retrieved,
)

MEGABYTE = 2**20


class Page(HTMLParser):
    """Elements with their attributes, and the text outside of scripts and styles, of a report."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.inside: list[str] = []
        self.feed(html)
        self.text = " ".join(" ".join(self.words).replace("\u202f", " ").split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.inside.append(tag)

    def handle_endtag(self, tag: str) -> None:
        self.inside.append(f"/{tag}")

    def handle_data(self, data: str) -> None:
        if self.inside[-1:] not in (["script"], ["style"]):
            self.words.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def classification(folder: Path, classes: int = 5, rows: int = 60, **changes) -> str:
    details = replace(classified(noise_files(folder, 8), classes, rows), **changes)
    return classification_report(classification_result(details), details, HEADING)


def retrieval(folder: Path, captions: list[str], size: tuple[int, int] = (40, 36)) -> str:
    details = retrieved(noise_files(folder, len(captions), size), captions)
    return retrieval_report(retrieval_result(details), details, HEADING)


def comparison() -> str:
    result = compared_result()
    assert isinstance(result.details, Compared)
    return comparison_report(result, result.details, HEADING)


def every_report(folder: Path) -> list[str]:
    captions = [f"caption {number}" for number in range(10)]
    return [classification(folder), classification(folder, 60, 300), retrieval(folder, captions), comparison()]


def test_reports_are_self_contained(tmp_path: Path):
    for html in every_report(tmp_path):
        links = [
            value
            for _, attributes in Page(html).elements
            for name, value in attributes.items()
            if name in ("src", "href", "srcset", "action", "data")
        ]
        assert links
        assert all(value is not None and value.startswith(("data:", "#")) for value in links)
        assert "@import" not in html
        assert "url(" not in html


def test_reports_are_accessible_to_screen_readers(tmp_path: Path):
    for html in every_report(tmp_path):
        page = Page(html)
        assert all(attributes.get("alt") for attributes in page.all("img"))
        assert all(attributes.get("scope") in ("col", "row") for attributes in page.all("th"))
        assert page.all("html")[0]["lang"] == "en"
        ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
        assert len(ids) == len(set(ids))
        targets = {str(attributes["href"])[1:] for attributes in page.all("a")}
        assert targets <= set(ids)


def test_a_classification_report_has_its_numbers(tmp_path: Path):
    details = classified(noise_files(tmp_path, 8), 5, 60)
    result = classification_result(details, bad_images=2, unlabeled_images=1, bad=["/data/a.jpg: truncated"])
    text = Page(classification_report(result, details, {**HEADING, "command": "python evaluate.py run=x"})).text
    hits = int((details.best[:, 0] == details.labels).sum())
    assert f"{hits} of 60 images are classified correctly" in text
    assert "Chance level for 5 classes is 20.0 %" in text
    assert f"{100 * result.metrics['top1']:.1f} %" in text
    assert f"{100 * result.metrics['mean_per_class_recall']:.1f} %" in text
    assert "60 images 3 left out 5 classes 0 classes without images" in text
    assert "/data/a.jpg: truncated" in text
    assert "0123456789abcdef" in text
    assert "python evaluate.py run=x" in text
    assert "Top-5" not in text  # of five classes, always all


def test_a_few_classes_have_a_confusion_matrix_and_many_have_pairs_groups_and_a_map(tmp_path: Path):
    few, many = classification(tmp_path), classification(tmp_path, 60, 900)
    assert 'aria-label="Confusion matrix"' in few
    assert "map-data" not in few.partition("<script>")[0]
    assert 'aria-label="Confusion matrix"' not in many
    text = Page(many).text
    for part in (
        "Most frequent confusions",
        "Confusion matrix",
        "Confusion map",
        "Worst classes",
        "Best classes",
        "All 60 classes",
        "Top-5",
    ):
        assert part in text


def test_mistakes_are_the_most_confident_ones_with_their_true_class_marked(tmp_path: Path):
    details = classified(noise_files(tmp_path, 8), 12, 60, seed=3)
    html = classification_report(classification_result(details), details, HEADING)
    wrong = details.best[:, 0] != details.labels
    highest = max(details.probabilities[wrong, 0])
    section = html[html.index('id="mistakes"') :]
    shown = re.findall(r'<span class="number">([\d.]+)\u202f%', section)
    assert shown[0] == f"{100 * highest:.1f}"
    row = int(details.probabilities[:, 0].argsort()[::-1][wrong[details.probabilities[:, 0].argsort()[::-1]]][0])
    card = section[: section.index("</ol>") + 200]
    assert f"<h4><bdi>class {details.labels[row]}</bdi></h4>" in card
    among = details.labels[row] in details.best[row]
    assert ("not among the top 5 predictions" in card) != among
    assert card.count("✓") == 2  # once in the explanation


def test_a_missing_image_does_not_break_the_report(tmp_path: Path):
    images = noise_files(tmp_path, 8)
    details = classified(images, 5, 60)
    for path in images.paths:
        Path(path).unlink()
    page = Page(classification_report(classification_result(details), details, HEADING))
    assert "This image cannot be shown: no such file." in page.text
    assert not page.all("img")


def test_names_and_paths_are_text_not_markup(tmp_path: Path):
    names = [ATTACK, "b", "c", "d", "e"]
    folder = tmp_path / "<script>owned</script>"
    details = classified(noise_files(folder, 8), 5, 60)
    details = replace(details, class_names=names, keys=[ATTACK, *names[1:]])
    result = classification_result(details, names={ATTACK: ATTACK}, bad=[ATTACK], data=ATTACK)
    heading = {**HEADING, "title": ATTACK, "about": [ATTACK], "command": ATTACK, "made_by": ATTACK}
    few = classification_report(result, details, heading)
    many = classified(noise_files(folder, 8), 60, 300)
    many = replace(many, class_names=[ATTACK, *many.class_names[1:]])
    for html in (few, classification_report(classification_result(many), many, heading)):
        assert "<script>document.title" not in html
        assert "<img src=x" not in html
        page = Page(html)
        assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
        assert ATTACK in page.text


def test_captions_of_any_language_are_text_not_markup(tmp_path: Path):
    captions = [ATTACK, "一只棕色的狗", "كلب بني يجري", "</blockquote>", "a & b", "&amp;"]
    page = Page(retrieval(tmp_path, captions))
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert len(page.all("script")) == 0
    assert all(caption in page.text for caption in captions)


def test_correct_results_are_marked_and_ranks_shown(tmp_path: Path):
    captions = [f"caption {number}" for number in range(10)]
    html = retrieval(tmp_path, captions)
    first = html[html.index("caption 0") : html.index("caption 1<")]
    assert "✓ The top result is correct." in first
    assert first.count('class="is-right"') == 1
    assert 'alt="Correct: 0.png"' in first
    text = Page(html).text
    assert "The first correct result has rank 3." in text
    assert "The first correct result has rank 10, not shown here." in text
    assert "Image to text 10 10.0 % 50.0 % 100.0 % 3 10" in text
    assert "Text to image 10 10.0 % 50.0 % 100.0 % 4 10" in text


def test_a_comparison_has_every_number_and_difference(tmp_path: Path):
    text = Page(comparison()).text
    assert "imagenet 76.2 % 76.2 % 0.0" in text
    assert "imagenet_a 77.1 % 2.7 % +74.4" in text
    assert "mean of the 2 shifted datasets 73.6 % 33.5 % +40.1" in text
    assert "On imagenet, top-1 accuracy is 76.2 % for ours and 76.2 % for resnet101." in text


def test_a_comparison_of_models_that_lack_sets_leaves_gaps():
    details = Compared(["a", "b"], {"ours": [0.5, None], "x": [None, 0.25], "y": [0.125, 0.75]})
    text = Page(comparison_report(Result({}, {"kind": "robustness"}, details), details, HEADING)).text
    assert "a 50.0 % – 12.5 %" in text
    assert "b – 25.0 % 75.0 %" in text
    assert "mean of the 2 datasets – – 43.8 %" in text
    assert "difference" not in text


def test_reports_stay_small_with_large_images_and_many_classes(tmp_path: Path):
    noise = retrieval(tmp_path / "large", [f"caption {number}" for number in range(24)], (640, 480))
    assert len(noise) < 3 * MEGABYTE  # noise is what JPEG compresses least
    assert len(classification(tmp_path / "small", 1000, 5000)) < 1.5 * MEGABYTE


@pytest.mark.parametrize(
    ("fraction", "text"), [(0, "0.0 %"), (1e-7, "<0.1 %"), (0.9999, ">99.9 %"), (1, "100.0 %"), (0.5, "50.0 %")]
)
def test_probabilities_near_0_and_1_are_not_rounded_to_them(fraction: float, text: str):
    assert probability(fraction).replace("\u202f", " ") == text


def test_all_evaluation_settings_are_shown():
    rows = fact_rows(
        {
            "kind": "knn",
            "weights_sha256": "ab",
            "names": {str(number): f"name {number}" for number in range(20)},
            "train": {"data": "a.csv", "images": 1234},
            "sets": {"v2": {"data": "v2", "images": 10}},
            "mean": [0.48145466, 0.4578275],
            "seed": None,
        }
    )
    found = {row["name"]: row for row in rows}
    assert found["task"]["text"] == "knn"
    assert found["weights, sha256"]["text"] == "ab"
    assert found["train"]["lines"] == ["data: a.csv", "images: 1,234"]
    assert found["sets"]["parts"][0]["facts"][1]["text"] == "10"
    assert found["mean"]["lines"] == ["0.48145466", "0.4578275"]
    assert rows[-1]["name"] == "name of each label"
    assert rows[-1]["summary"] == "20 entries"
    assert "seed" not in found
