"""`clip-exp predict`: how probable each text is for each picture."""

from typing import TYPE_CHECKING, NamedTuple

from clip_exp.config.commands import PredictConfig
from clip_exp.errors import Problems
from clip_exp.evaluation.sets.class_names import templates as read_templates
from clip_exp.inference.inputs import as_text_list, check_videos, find_pictures, read_labels, tell_left_out
from clip_exp.inference.outputs import Report, about, check_output, number, write
from clip_exp.loading.source import ModelSource, check_source, find_source

if TYPE_CHECKING:
    from torch import Tensor

    from clip_exp.inference.features import EncodedMedia

CHUNK = 8192  # pictures scored at a time: 33 MB of probabilities for 1,000 texts


class PredictRequest(NamedTuple):
    """What was asked, found and checked."""

    source: ModelSource
    pictures: list[str]
    texts: list[str]
    templates: list[str] | None


def predict(config: PredictConfig) -> int:
    """Print or write the most probable texts of every picture; return the exit code.

    Raises:
        ClipExpError: everything that is wrong with paths and names, before the model is loaded; later a picture that cannot
            be read under `on_bad_image=error`.
    """
    source, pictures, texts, templates = check(config)
    from clip_exp.inference.pipeline import open_pipeline  # imports torch

    clip = open_pipeline(config, source)
    text_features = clip.encode_labels(texts, templates, f"{len(texts):,} labels")
    encoded = clip.encode_media(pictures, config.on_bad_image, f"{len(pictures):,} pictures")
    tell_left_out(encoded.left_out, len(pictures))
    best: list[tuple[Tensor, Tensor]] = []
    for features in encoded.features.split(CHUNK):
        probabilities, order = clip.probabilities(features, text_features).sort(dim=1, descending=True, stable=True)
        best += zip(order[:, : config.k], probabilities[:, : config.k], strict=True)
    write(_report(source, pictures, texts, encoded, best), config)
    return 0


def check(config: PredictConfig) -> PredictRequest:
    """Find the model, the pictures and the texts, without torch.

    Raises:
        ClipExpError: of the class of the gravest problem, with a line for every problem.
    """
    problems = Problems()
    with problems:
        check_output(config)
    with problems:
        source = check_source(config)
    with problems:
        pictures = find_pictures(config.images)
        check_videos(pictures, config.on_bad_image)
    with problems:
        texts = _texts(config, problems)
    templates = None
    with problems:
        templates = None if config.templates is None else read_templates(config.templates)
    problems.tell()
    return PredictRequest(source or find_source(config), pictures, texts, templates)


def _texts(config: PredictConfig, problems: Problems) -> list[str]:
    if (config.texts is None) == (config.labels is None):
        problems.add("give exactly one of texts and labels: 'texts=[a diagram,a dog]', or labels=names.txt.")
        return []
    texts = read_labels(config.labels) if config.labels is not None else as_text_list(config.texts, "texts")
    if len(texts) == 1:
        problems.add("one text alone always has probability 1: give several, or ask for its cosine with clip-exp rank.")
    return texts


def _report(
    source: ModelSource,
    pictures: list[str],
    texts: list[str],
    encoded: "EncodedMedia",
    best: "list[tuple[Tensor, Tensor]]",
) -> Report:
    rows, documents = [], []
    for item, (order, probabilities) in zip(encoded.kept.tolist(), best, strict=True):
        found = [(texts[text], number(p)) for text, p in zip(order.tolist(), probabilities.tolist(), strict=True)]
        rows += [(pictures[item], rank, text, p) for rank, (text, p) in enumerate(found, start=1)]
        documents.append({"path": pictures[item], "texts": [{"text": text, "probability": p} for text, p in found]})
    left_out = [{"path": path, "reason": reason} for path, reason in encoded.left_out]
    return Report(
        ("picture", "rank", "text", "probability"),
        rows,
        {**about(source), "pictures": documents, "left_out": left_out},
    )
