"""Commands `clip-exp predict`, `rank` and `search`. All inputs are checked without torch before the model is loaded."""

import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from clip_exp.config.commands import PredictConfig, RankConfig, SearchConfig
from clip_exp.config.targets import require_allowed
from clip_exp.data.files import leaves_root
from clip_exp.data.tables.open import read_table
from clip_exp.errors import PREEMPTED_EXIT_CODE, CheckpointError, ConfigError, DataError, Problems
from clip_exp.evaluation.sets.class_names import templates as read_templates
from clip_exp.inference.index import Recipe, check_same_model, read_recipe, recipe_of
from clip_exp.inference.inputs import (
    FRAMES,
    as_text_list,
    as_texts,
    check_videos,
    find_images,
    folders_of,
    read_labels,
    warn_left_out,
)
from clip_exp.inference.outputs import Report, about, check_output, number, write
from clip_exp.loading import ModelSource, check_source, find_source
from clip_exp.ranks.failure import Stopped, stop_on_signals
from clip_exp.weights.find import hash_part, hash_weights

CHUNK = 8192  # images scored at a time: 33 MB of probabilities for 1,000 texts

Ranking = list[tuple[str, float]]  # path and cosine similarity, best first


def predict(config: PredictConfig) -> int:
    """Print or write the most probable texts of each image; return the exit code.

    Raises:
        ClipExpError: paths or names are invalid, with a line per problem, before the model is loaded; or an image cannot be
            read and `on_bad_image` is `error`.
    """
    problems = Problems()
    checked, images = _model_and_images(config, problems)
    texts: list[str] = []
    templates = None
    with problems:
        if (config.texts is None) == (config.labels is None):
            raise ConfigError("give exactly one of texts and labels: 'texts=[a diagram,a dog]', or labels=names.txt.")
        if config.texts is not None and config.templates is not None:
            raise ConfigError("templates are for class names: give labels=… instead of texts, or leave out templates.")
        texts = read_labels(config.labels) if config.labels is not None else as_text_list(config.texts, "texts")
        if len(texts) == 1:
            raise ConfigError(
                "a single text always has probability 1: give several texts, or use clip-exp rank for its cosine similarity."
            )
    with problems:
        templates = None if config.templates is None else read_templates(config.templates)
    problems.raise_if_any()
    source = checked or find_source(config)
    # Torch takes seconds to import, so it is imported only after the checks.
    from clip_exp.inference.pipeline import open_pipeline

    clip = open_pipeline(config, source)
    text_features = clip.encode_labels(texts, templates, f"{len(texts):,} labels")
    encoded = clip.encode_media(images, config.on_bad_image, f"{len(images):,} images")
    warn_left_out(encoded.left_out, len(images))
    rows, documents = [], []
    for items, features in zip(encoded.kept.split(CHUNK), encoded.features.split(CHUNK), strict=True):
        probabilities, order = clip.probabilities(features, text_features).sort(dim=1, descending=True, stable=True)
        best = zip(
            items.tolist(), order[:, : config.top_k].tolist(), probabilities[:, : config.top_k].tolist(), strict=True
        )
        for item, numbers, values in best:
            found = [(texts[text], number(value)) for text, value in zip(numbers, values, strict=True)]
            rows += [(images[item], place, text, p) for place, (text, p) in enumerate(found, start=1)]
            documents.append({"path": images[item], "texts": [{"text": text, "probability": p} for text, p in found]})
    left_out = [{"path": path, "reason": reason} for path, reason in encoded.left_out]
    document = {**about(source), "images": documents, "left_out": left_out}
    write(Report(("image", "rank", "text", "probability"), rows, document), config)
    return 0


def rank(config: RankConfig) -> int:
    """Print or write a ranking of the images for each text, and copy them to `copy_to`; return the exit code.

    DALL-E selects the best 32 of 512 images in this way (Ramesh et al. 2021, section 2.6).

    Raises:
        ClipExpError: see `predict`.
    """
    problems = Problems()
    checked, images = _model_and_images(config, problems)
    texts: list[str] = []
    with problems:
        texts = list(dict.fromkeys(as_texts(config.text, "text")))
    copy_to = Path(config.copy_to).expanduser() if config.copy_to is not None else None
    if copy_to is not None and copy_to.exists() and not (copy_to.is_dir() and not any(copy_to.iterdir())):
        problems.add(f"copy_to={config.copy_to} already exists and is not an empty folder: give a new one.")
    problems.raise_if_any()
    source = checked or find_source(config)
    # Torch takes seconds to import, so it is imported only after the checks.
    from clip_exp.inference.features import best_matches
    from clip_exp.inference.pipeline import open_pipeline

    clip = open_pipeline(config, source)
    text_features = clip.encode_text(texts)
    encoded = clip.encode_media(images, config.on_bad_image, f"{len(images):,} images")
    warn_left_out(encoded.left_out, len(images))
    rankings: list[Ranking] = []
    for query in text_features:
        ranked = best_matches(encoded.features, query, config.top_k)
        rankings.append([(images[encoded.kept[row]], number(score)) for row, score in ranked])
    if copy_to is not None:
        copy_ranked(copy_to, dict(zip(texts, rankings, strict=True)))
    left_out = [{"path": path, "reason": reason} for path, reason in encoded.left_out]
    queries = [("text", text) for text in texts]
    write(ranking_report(queries, rankings, {**about(source)}, {"left_out": left_out}), config)
    return 0


def _model_and_images(config: PredictConfig | RankConfig, problems: Problems) -> tuple[ModelSource | None, list[str]]:
    """Check the options; return the model, None if it must be downloaded after all checks, and the images."""
    source, images = None, []
    with problems:
        check_output(config)
    with problems:
        source = check_source(config)
    with problems:
        images = find_images(config.images)
        check_videos(images, config.on_bad_image)
    return source, images


def ranking_report(
    queries: list[tuple[str, str]], rankings: list[Ranking], before: dict[str, object], after: dict[str, object]
) -> Report:
    """Return rankings as a report.

    Args:
        queries: pairs of "text" or "image" and the text or path.
        rankings: ranking of each query.
        before: fields of the JSON document before the rankings.
        after: fields of the JSON document after the rankings.
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
    return Report(("query", "rank", "score", "image"), rows, {**before, "rankings": documents, **after})


def copy_ranked(folder: Path, rankings: dict[str, Ranking]) -> None:
    """Copy images, with their rank in the file name (`01_cat.jpg`); each of several texts has its own folder (`01_a_dog/`).

    Raises:
        CheckpointError: a file cannot be copied.
    """
    for position, (text, ranking) in enumerate(rankings.items(), start=1):
        words = re.sub(r"[^\w]+", "_", text)[:40].strip("_")
        subfolder = f"{position:02d}_{words}" if len(rankings) > 1 else ""
        digits = max(2, len(str(len(ranking))))
        try:
            (folder / subfolder).mkdir(parents=True, exist_ok=True)
            for place, (path, _) in enumerate(ranking, start=1):
                shutil.copy2(path, folder / subfolder / f"{place:0{digits}d}_{Path(path).name}")
        except OSError as error:
            raise CheckpointError(f"copy_to={folder} cannot be written: {error.strerror}.") from error


# `clip-exp search`: add images to an index, and search it by text or by image.


class SearchRequest(NamedTuple):
    """Checked inputs of `search`."""

    path: Path
    source: ModelSource
    recipe: Recipe
    files: list[str]  # images to add to the index
    folders: list[str]  # folders that were searched for these images
    queries: list[tuple[str, str]]  # ("text", text) or ("image", path)


def search(config: SearchConfig) -> int:
    """Update the index with the given images, and print or write the results of the queries; return the exit code.

    Raises:
        ClipExpError: see `predict`.
    """
    request = check(config)
    path, source, recipe = request.path, request.source, request.recipe
    settings = config.model_copy(update={"precision": recipe.precision, "frames": recipe.frames})
    # Torch takes seconds to import, so it is imported only after the checks.
    from clip_exp.inference.index import ImageIndex, update_index
    from clip_exp.inference.pipeline import open_pipeline

    clip = open_pipeline(settings, source) if request.queries else None
    if request.files:
        try:
            with stop_on_signals():
                update = update_index(
                    path,
                    recipe,
                    request.files,
                    request.folders,
                    lambda: clip or open_pipeline(settings, source),
                    config.on_bad_image,
                    f"{path.name}: images",
                )
        except Stopped as stopped:
            print(f"{stopped} The same command resumes from what is saved in {path}.", file=sys.stderr, flush=True)
            return PREEMPTED_EXIT_CODE
        warn_left_out(update.left_out, len(request.files))
        print(f"{path}: {update}", file=sys.stderr if clip else sys.stdout, flush=True)
    if clip is not None:
        index = ImageIndex(path, clip)
        rankings = [
            [(match.path, number(match.score)) for match in index.search(**{kind: query}, top_k=config.top_k)]
            for kind, query in request.queries
        ]
        described = {"index": str(path), "images": len(index), "model": source.model.name, "weights": recipe.weights}
        write(ranking_report(request.queries, rankings, described, {}), config)
    return 0


def check(config: SearchConfig) -> SearchRequest:
    """Find the model, the index, the images and the queries, without torch.

    Raises:
        ClipExpError: error with a line for every problem, of the class of the most severe one.
    """
    problems = Problems()
    with problems:
        check_output(config)
    path = Path(config.index or "").expanduser()
    files: list[str] = []
    folders: list[str] = []
    queries: list[tuple[str, str]] = []
    has_images, has_queries = (
        any(value is not None for value in values)
        for values in ((config.images, config.table), (config.text, config.image))
    )
    with problems:
        if config.index is None:
            raise ConfigError("index has no value: give a file, such as index=photos.index.")
        if path.is_dir() or not path.parent.is_dir():
            what = "is a folder" if path.is_dir() else f"cannot be written: {path.parent} is not a folder"
            raise ConfigError(f"index={config.index} {what}.")
        if not has_images and not has_queries:
            raise ConfigError(
                "nothing to do: give images to add to the index (images=DIR, table=CSV), or a query (text=…, image=…)."
            )
        if not has_images and not path.exists():
            raise ConfigError(f"index={config.index}: no such file. Create it with images=DIR run=DIR.")
    with problems:
        if has_images:
            files, folders = _files(config)
            check_videos(files, config.on_bad_image)
    with problems:
        queries += [("text", text) for text in as_texts(config.text, "text")] if config.text is not None else []
    with problems:
        images = find_images(config.image, "image") if config.image is not None else []
        check_videos(images, config.on_bad_image)
        queries += [("image", image) for image in images]
    found = None
    with problems:
        if config.pretrained is not None:
            check_source(config)  # downloaded after all checks
        elif config.index is not None:
            found = _model(config, path, has_images)
    problems.raise_if_any()
    source, recipe = found or _model(config, path, has_images)
    return SearchRequest(path, source, recipe, files, folders, queries)


def _files(config: SearchConfig) -> tuple[list[str], list[str]]:
    """Return the images to add to the index, and the folders that were searched for them."""
    files = find_images(config.images) if config.images is not None else []
    if config.table is not None:
        table = read_table(
            config.table,
            image_key=config.image_key,
            caption_key=None,
            image_root=config.image_root,
            separator=config.separator,
            encoding=config.encoding,
        )
        if table.members is not None:
            raise ConfigError(
                f"table={config.table}: an index refers to image files, not to members of shards: unpack the shards (tar -xf)."
            )
        for row in range(len(table)):
            if not config.allow_outside_root and leaves_root(table.path(row)):
                raise DataError(
                    f"{table.where(row)}: {table.path(row)!r} leaves the folder {table.part(row).root} through `..`: correct the path, or set "
                    "allow_outside_root=true."
                )
            files.append(table.image_path(row))
    return list(dict.fromkeys(files)), folders_of(config.images)


def _model(config: SearchConfig, path: Path, has_images: bool) -> tuple[ModelSource, Recipe]:
    """Return the model of the configuration, which must match the index, or else the model of the index."""
    before = read_recipe(path) if path.is_file() else None
    frames = config.frames or (before.frames if before else FRAMES)
    if before is None or any((config.run, config.ckpt, config.model, config.pretrained)):
        source = find_source(config)
        recipe = recipe_of(source, config.precision, frames)
        if before is None:
            return source, recipe
        check_same_model(path, before, recipe)
        before = replace(before, weights=recipe.weights)
    else:
        require_allowed({"model": before.model}, f"index={path}")
        source, weights = before.source, Path(before.weights)
        if not weights.exists():
            raise CheckpointError(
                f"index={path} was created by {before.model['name']} with {weights}, which does not exist anymore: "
                "give the new location of these weights (run=DIR, ckpt=PATH, or model=NAME pretrained=FILE)."
            )
        now = hash_part(hash_weights(weights), before.prefix)
        if source.mix is not None:
            source.mix.check()
            now = source.mix.sha256(now)
        if now != before.weights_sha256:
            raise CheckpointError(
                f"index={path} was created by {weights}, which has changed since: give the original weights, or create the index again."
            )
    if has_images:
        for key, value, existing in (
            ("precision", config.precision, before.precision),
            ("frames", frames, before.frames),
        ):
            if value != existing:
                raise ConfigError(f"{key}={value}, but index={path} was created with {key}={existing}: use this value.")
    return source, before
