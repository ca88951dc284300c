"""`clip-exp rank`: the pictures that fit a text best, as DALL-E kept the best 32 of 512 (Ramesh et al. 2021, section 2.6)."""

import re
import shutil
from pathlib import Path
from typing import NamedTuple

from clip_exp.config.commands import RankConfig
from clip_exp.errors import CheckpointError, ConfigError, Problems
from clip_exp.inference.inputs import as_texts, check_videos, find_pictures, tell_left_out
from clip_exp.inference.outputs import Report, about, check_output, number, write
from clip_exp.loading.source import ModelSource, check_source, find_source


class RankRequest(NamedTuple):
    """What was asked, found and checked."""

    source: ModelSource
    pictures: list[str]
    texts: list[str]


Ranking = list[tuple[str, float]]  # path and cosine, best first


def rank(config: RankConfig) -> int:
    """Print or write a ranking for each text, copy the pictures if asked; return the exit code.

    Raises:
        ClipExpError: see `inference.predict.predict`.
    """
    source, pictures, texts = check(config)
    # Torch takes seconds to import: only once the paths and names are known to be right.
    from clip_exp.inference.pipeline import open_pipeline
    from clip_exp.inference.ranking import best_matches

    clip = open_pipeline(config, source)
    text_features = clip.encode_text(texts)
    encoded = clip.encode_media(pictures, config.on_bad_image, f"{len(pictures):,} pictures")
    tell_left_out(encoded.left_out, len(pictures))
    rankings: list[Ranking] = []
    for query in text_features:
        ranked = best_matches(encoded.features, query, config.keep)
        rankings.append([(pictures[encoded.kept[row]], number(score)) for row, score in ranked])
    if config.copy_to is not None:
        copy_ranked(Path(config.copy_to).expanduser(), dict(zip(texts, rankings, strict=True)))
    left_out = [{"path": path, "reason": reason} for path, reason in encoded.left_out]
    queries = [("text", text) for text in texts]
    write(ranking_report(queries, rankings, {**about(source)}, {"left_out": left_out}), config)
    return 0


def check(config: RankConfig) -> RankRequest:
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
        texts = list(dict.fromkeys(as_texts(config.text, "text")))
    with problems:
        _check_copies(config.copy_to)
    problems.tell()
    return RankRequest(source or find_source(config), pictures, texts)


def ranking_report(
    queries: list[tuple[str, str]], rankings: list[Ranking], before: dict[str, object], after: dict[str, object]
) -> Report:
    """Rankings as a report.

    Args:
        queries: ("text" or "image", what was asked).
        before, after: what else the JSON holds.
    """
    rows = [
        (query, rank, score, path)
        for (_, query), ranking in zip(queries, rankings, strict=True)
        for rank, (path, score) in enumerate(ranking, start=1)
    ]
    documents = [
        {kind: query, "matches": [{"path": path, "score": score} for path, score in ranking]}
        for (kind, query), ranking in zip(queries, rankings, strict=True)
    ]
    return Report(("query", "rank", "score", "picture"), rows, {**before, "rankings": documents, **after})


def copy_ranked(folder: Path, rankings: dict[str, Ranking]) -> None:
    """Copies named in their order (`01_cat.jpg`); of several texts each in a folder of its own (`01_a_dog/`).

    Raises:
        CheckpointError: a file cannot be copied.
    """
    for position, (text, ranking) in enumerate(rankings.items(), start=1):
        words = re.sub(r"[^\w]+", "_", text)[:40].strip("_")
        below = f"{position:02d}_{words}" if len(rankings) > 1 else ""
        digits = max(2, len(str(len(ranking))))
        try:
            (folder / below).mkdir(parents=True, exist_ok=True)
            for place, (path, _) in enumerate(ranking, start=1):
                shutil.copy2(path, folder / below / f"{place:0{digits}d}_{Path(path).name}")
        except OSError as error:
            raise CheckpointError(f"copy_to={folder} cannot be filled: {error.strerror}.") from error


def _check_copies(copy_to: str | None) -> None:
    if copy_to is not None:
        folder = Path(copy_to).expanduser()
        if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
            raise ConfigError(f"copy_to={copy_to} exists already and is no empty folder: give a new one.")
