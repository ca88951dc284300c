"""The page of a retrieval: recall both ways, and some queries with what they found."""

from dataclasses import dataclass
from typing import Any

from clip_exp.data.image_sets import ImageSet
from clip_exp.reports.evaluation import Result
from clip_exp.reports.html import Thumbnails, counted, fact_rows, percent, render

QUERIES = 12  # shown each way
IMAGES = 6  # that a caption found
CAPTIONS = 6  # that an image found
WAYS = {"i2t": "an image finds captions", "t2i": "a caption finds images"}


@dataclass(frozen=True)
class Query:
    """An image with the captions that it found, or a caption with the images."""

    query: int
    found: list[int]  # best first
    scores: list[float]  # cosines
    right: list[bool]
    rank: int  # place of the first right one, 1 is best


@dataclass(frozen=True)
class Retrieved:
    """A few queries of a retrieval, spread evenly over the set. Images are positions in `images`, captions in `captions`."""

    images: ImageSet
    captions: list[str]
    image_to_text: list[Query]
    text_to_image: list[Query]

    def report_files(self, result: Result, heading: dict[str, Any]) -> dict[str, str]:
        return {".html": retrieval_report(result, self, heading)}


def retrieval_report(result: Result, details: Retrieved, heading: dict[str, Any]) -> str:
    """The HTML of a retrieval's page."""
    metrics, images, captions = result.metrics, result.protocol["images"], len(details.captions)
    ks = sorted({int(key.removeprefix("recall@").partition("_")[0]) for key in metrics if key.startswith("recall@")})
    thumbnails = Thumbnails(details.images)
    return render(
        "retrieval.html",
        **heading,
        tiles=_tiles(metrics),
        lead=f"{counted(images, 'image')} and {counted(captions, 'caption')}, each a candidate for all of the other kind. "
        f"A guessed image would be right for {percent(1 / images, 2)} of the captions.",
        ks=ks,
        recall=_recall(metrics, ks, images, captions),
        text_queries=[
            {
                "caption": details.captions[query.query],
                "rank": query.rank,
                "shown_right": any(query.right[:IMAGES]),
                "found": [{"thumbnail": thumbnails[index], **rest} for index, rest in _found(query, IMAGES)],
            }
            for query in _spread(details.text_to_image)
        ],
        image_queries=[
            {
                "thumbnail": thumbnails[query.query],
                "rank": query.rank,
                "shown_right": any(query.right[:CAPTIONS]),
                "found": [{"caption": details.captions[index], **rest} for index, rest in _found(query, CAPTIONS)],
            }
            for query in _spread(details.image_to_text)
        ],
        protocol=fact_rows(result.protocol),
    )


def _tiles(metrics: dict[str, float]) -> list[dict[str, str]]:
    meanings = {
        "recall@1_i2t": ("Image → caption, recall@1", "of the images: the first caption found is one of theirs"),
        "recall@1_t2i": ("Caption → image, recall@1", "of the captions: the first image found is theirs"),
    }
    tiles = [
        {"name": title, "value": percent(metrics[key]), "meaning": meaning}
        for key, (title, meaning) in meanings.items()
        if key in metrics
    ]
    places = [f"{metrics[key]:,.0f}" for key in ("median_rank_i2t", "median_rank_t2i") if key in metrics]
    if places:
        meaning = "place of the first right answer: image → caption / caption → image; 1 is best"
        tiles.append({"name": "Median rank", "value": " / ".join(places), "meaning": meaning})
    return tiles


def _recall(metrics: dict[str, float], ks: list[int], images: int, captions: int) -> list[dict[str, Any]]:
    sizes = {"i2t": (images, captions), "t2i": (captions, images)}
    rows: list[dict[str, Any]] = [
        {
            "name": what[0].upper() + what[1:],
            "queries": f"{sizes[way][0]:,}",
            "recall": [metrics.get(f"recall@{k}_{way}") for k in ks],
            "median": metrics.get(f"median_rank_{way}"),
            "candidates": f"{sizes[way][1]:,}",
            "quiet": False,
        }
        for way, what in WAYS.items()
    ]
    guess = {
        "name": "Guessing, a caption finds images",
        "queries": "",
        "recall": [min(1.0, k / images) for k in ks],
        "median": (images + 1) // 2,
        "candidates": f"{images:,}",
        "quiet": True,
    }
    return [*rows, guess]


def _found(query: Query, limit: int) -> list[tuple[int, dict[str, Any]]]:
    columns = zip(query.found[:limit], query.scores[:limit], query.right[:limit], strict=True)
    return [(index, {"score": score, "right": right}) for index, score, right in columns]


def _spread(queries: list[Query]) -> list[Query]:
    """At most `QUERIES`, evenly from the first to the last."""
    if len(queries) <= QUERIES:
        return queries
    return [queries[round(number * (len(queries) - 1) / (QUERIES - 1))] for number in range(QUERIES)]
