"""HTML report of a retrieval: recall in both directions, and example queries with their results."""

from dataclasses import dataclass, field
from typing import Any

from clip_exp.data.files import ImageLimits
from clip_exp.data.image_sets import ImageSet
from clip_exp.reports.evaluation import Result
from clip_exp.reports.html import Thumbnails, counted, fact_rows, percent, render

QUERIES = 12  # shown per direction
IMAGES = 6  # shown per caption
CAPTIONS = 6  # shown per image
DIRECTIONS = {"i2t": "Image to text", "t2i": "Text to image"}


@dataclass(frozen=True)
class Query:
    """Image query with the retrieved captions, or caption query with the retrieved images."""

    query: int
    found: list[int]  # best first
    scores: list[float]  # cosines
    correct: list[bool]
    rank: int  # rank of the first correct result; 1 is best


@dataclass(frozen=True)
class Retrieved:
    """Example queries of a retrieval, which refer to positions in `images` and `captions`."""

    images: ImageSet
    captions: list[str]
    image_to_text: list[Query]
    text_to_image: list[Query]
    limits: ImageLimits = field(default_factory=ImageLimits.evaluated)  # with which the images were read

    def report_files(self, result: Result, heading: dict[str, Any]) -> dict[str, str]:
        return {".html": retrieval_report(result, self, heading)}


def retrieval_report(result: Result, details: Retrieved, heading: dict[str, Any]) -> str:
    """Return the HTML report of a retrieval."""
    metrics, images, captions = result.metrics, result.protocol["images"], len(details.captions)
    ks = sorted({int(key.removeprefix("recall@").partition("_")[0]) for key in metrics if key.startswith("recall@")})
    thumbnails = Thumbnails(details.images, details.limits)
    return render(
        "retrieval.html",
        **heading,
        tiles=_tiles(metrics),
        lead=f"{counted(images, 'image')} and {counted(captions, 'caption')}, all of them candidates. "
        f"Chance level of text-to-image recall@1 is {percent(1 / images, 2)}.",
        ks=ks,
        recall=_recall(metrics, ks, images, captions),
        text_queries=[
            {
                "caption": details.captions[query.query],
                "rank": query.rank,
                "shown_correct": any(query.correct[:IMAGES]),
                "found": [{"thumbnail": thumbnails[index], **rest} for index, rest in _found(query, IMAGES)],
            }
            for query in _evenly(details.text_to_image)
        ],
        image_queries=[
            {
                "thumbnail": thumbnails[query.query],
                "rank": query.rank,
                "shown_correct": any(query.correct[:CAPTIONS]),
                "found": [{"caption": details.captions[index], **rest} for index, rest in _found(query, CAPTIONS)],
            }
            for query in _evenly(details.image_to_text)
        ],
        protocol=fact_rows(result.protocol),
    )


def _tiles(metrics: dict[str, float]) -> list[dict[str, str]]:
    meanings = {
        "recall@1_i2t": ("Image → text, recall@1", "fraction of images whose top caption is one of their own"),
        "recall@1_t2i": ("Text → image, recall@1", "fraction of captions whose top image is their own"),
    }
    tiles = [
        {"name": title, "value": percent(metrics[key]), "meaning": meaning}
        for key, (title, meaning) in meanings.items()
        if key in metrics
    ]
    ranks = [f"{metrics[key]:,.0f}" for key in ("median_rank_i2t", "median_rank_t2i") if key in metrics]
    if ranks:
        meaning = "rank of the first correct result: image → text / text → image; 1 is best"
        tiles.append({"name": "Median rank", "value": " / ".join(ranks), "meaning": meaning})
    return tiles


def _recall(metrics: dict[str, float], ks: list[int], images: int, captions: int) -> list[dict[str, Any]]:
    sizes = {"i2t": (images, captions), "t2i": (captions, images)}
    rows: list[dict[str, Any]] = [
        {
            "name": name,
            "queries": f"{sizes[direction][0]:,}",
            "recall": [metrics.get(f"recall@{k}_{direction}") for k in ks],
            "median": metrics.get(f"median_rank_{direction}"),
            "candidates": f"{sizes[direction][1]:,}",
            "chance": False,
        }
        for direction, name in DIRECTIONS.items()
    ]
    chance = {
        "name": "Chance level, text to image",
        "queries": "",
        "recall": [min(1.0, k / images) for k in ks],
        "median": (images + 1) // 2,
        "candidates": f"{images:,}",
        "chance": True,
    }
    return [*rows, chance]


def _found(query: Query, limit: int) -> list[tuple[int, dict[str, Any]]]:
    columns = zip(query.found[:limit], query.scores[:limit], query.correct[:limit], strict=True)
    return [(index, {"score": score, "correct": correct}) for index, score, correct in columns]


def _evenly(queries: list[Query]) -> list[Query]:
    """Return at most `QUERIES` queries, evenly spaced from the first to the last."""
    if len(queries) <= QUERIES:
        return queries
    return [queries[round(number * (len(queries) - 1) / (QUERIES - 1))] for number in range(QUERIES)]
