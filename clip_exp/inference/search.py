"""`clip-exp search`: put pictures into an index, and look for them by text or by picture."""

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from clip_exp.config.commands import SearchConfig
from clip_exp.data.files import leaves_root
from clip_exp.data.tables.open import read_table
from clip_exp.data.tables.table import PairTable
from clip_exp.errors import PREEMPTED_EXIT_CODE, CheckpointError, ConfigError, DataError, Problems
from clip_exp.inference.index import Recipe, agree, read_recipe, recipe_of
from clip_exp.inference.inputs import FRAMES, as_texts, check_videos, find_pictures, folders_of, tell_left_out
from clip_exp.inference.outputs import check_output, number, write
from clip_exp.inference.rank import ranking_report
from clip_exp.loading.source import ModelSource, check_source, find_source
from clip_exp.ranks.signals import Stopped, stop_on_signals
from clip_exp.weights.find import hash_part, hash_weights


class SearchRequest(NamedTuple):
    """What was asked, found and checked."""

    path: Path
    source: ModelSource
    recipe: Recipe
    files: list[str]  # to put into the index
    folders: list[str]  # that were searched for them
    queries: list[tuple[str, str]]  # ("text", a text) or ("image", a path)


def search(config: SearchConfig) -> int:
    """Bring the index up to date with the pictures that are given, answer what is asked; return the exit code.

    Raises:
        ClipExpError: everything that is wrong with paths and names, before the model is loaded; see `inference.predict.predict`.
    """
    question = check(config)
    path, source, recipe = question.path, question.source, question.recipe
    settings = config.model_copy(update={"precision": recipe.precision, "frames": recipe.frames})
    # Torch takes seconds to import: only once the paths and names are known to be right.
    from clip_exp.inference.indexing import PictureIndex, update_index
    from clip_exp.inference.pipeline import open_pipeline

    clip = open_pipeline(settings, source) if question.queries else None
    if question.files:
        try:
            with stop_on_signals():
                update = update_index(
                    path,
                    recipe,
                    question.files,
                    question.folders,
                    lambda: clip or open_pipeline(settings, source),
                    config.on_bad_image,
                    f"{path.name}: pictures",
                )
        except Stopped as stopped:
            print(f"{stopped} The same command goes on from what is in {path}.", file=sys.stderr, flush=True)
            return PREEMPTED_EXIT_CODE
        tell_left_out(update.left_out, len(question.files))
        print(f"{path}: {update}", file=sys.stderr if clip else sys.stdout, flush=True)
    if clip is not None:
        index = PictureIndex(path, clip)
        rankings = [
            [(match.path, number(match.score)) for match in index.search(**{kind: query}, top=config.top)]
            for kind, query in question.queries
        ]
        about = {"index": str(path), "pictures": len(index), "model": source.model.name, "weights": recipe.weights}
        write(ranking_report(question.queries, rankings, about, {}), config)
    return 0


def check(config: SearchConfig) -> SearchRequest:
    """Find the model, the index, the pictures and the queries, without torch.

    Raises:
        ClipExpError: of the class of the gravest problem, with a line for every problem.
    """
    problems = Problems()
    with problems:
        check_output(config)
    path = Path(config.index or "").expanduser()
    files: list[str] = []
    folders: list[str] = []
    queries: list[tuple[str, str]] = []
    filling, asking = (
        any(value is not None for value in values)
        for values in ((config.images, config.table), (config.text, config.image))
    )
    with problems:
        _check_path(config, path, filling, asking)
    with problems:
        if filling:
            files, folders = _files(config)
            check_videos(files, config.on_bad_image)
    with problems:
        queries += [("text", text) for text in as_texts(config.text, "text")] if config.text is not None else []
    with problems:
        images = find_pictures(config.image, "image") if config.image is not None else []
        check_videos(images, config.on_bad_image)
        queries += [("image", image) for image in images]
    found = None
    with problems:
        if config.pretrained is not None:
            check_source(config)  # it is fetched when nothing else is wrong
        elif config.index is not None:
            found = _model(config, path, filling)
    problems.tell()
    source, recipe = found or _model(config, path, filling)
    return SearchRequest(path, source, recipe, files, folders, queries)


def _check_path(config: SearchConfig, path: Path, filling: bool, asking: bool) -> None:
    if config.index is None:
        raise ConfigError("index has no value: name the file, as index=photos.index.")
    if path.is_dir() or not path.parent.is_dir():
        what = "is a folder" if path.is_dir() else f"cannot be written: there is no folder {path.parent}"
        raise ConfigError(f"index={config.index} {what}.")
    if not filling and not asking:
        raise ConfigError(
            "nothing to do: give pictures to put into the index (images=DIR, table=CSV), or what to look for (text=…, image=…)."
        )
    if not filling and not path.exists():
        raise ConfigError(f"index={config.index}: no such file. Make it: images=DIR run=DIR.")


def _files(config: SearchConfig) -> tuple[list[str], list[str]]:
    files = find_pictures(config.images) if config.images is not None else []
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
                f"table={config.table}: an index refers to picture files, and those in shards are none: unpack them (tar -xf)."
            )
        files += list(_paths(table, config.allow_outside_root))
    return list(dict.fromkeys(files)), folders_of(config.images)


def _paths(table: PairTable, outside_root: bool) -> Iterator[str]:
    for row in range(len(table)):
        if not outside_root and leaves_root(table.path(row)):
            raise DataError(
                f"{table.where(row)}: {table.path(row)!r} leaves the folder {table.part(row).root} by `..`: correct it, or set "
                "allow_outside_root=true."
            )
        yield table.image_path(row)


def _model(config: SearchConfig, path: Path, filling: bool) -> tuple[ModelSource, Recipe]:
    """The model that is named, which must be the index's; or else the index's own."""
    before = read_recipe(path) if path.is_file() else None
    frames = config.frames or (before.frames if before else FRAMES)
    if before is None or any((config.run, config.ckpt, config.model, config.pretrained)):
        source = find_source(config)
        recipe = recipe_of(source, config.precision, frames)
        if before is None:
            return source, recipe
        agree(path, before, recipe)
        before = replace(before, weights=recipe.weights)
    else:
        source = before.source
        _check_weights(path, before)
    if filling:
        for key, value, is_ in (("precision", config.precision, before.precision), ("frames", frames, before.frames)):
            if value != is_:
                raise ConfigError(f"{key}={value}, but index={path} was made with {key}={is_}: give that.")
    return source, before


def _check_weights(path: Path, recipe: Recipe) -> None:
    weights = Path(recipe.weights)
    if not weights.exists():
        raise CheckpointError(
            f"index={path} was made by {recipe.model['name']} with {weights}, which is gone: "
            "name the same weights where they are now (run=DIR, ckpt=PATH, or model=NAME pretrained=FILE)."
        )
    now, mix = hash_part(hash_weights(weights), recipe.prefix), recipe.source.mix
    if mix is not None:
        mix.check()
        now = mix.sha256(now)
    if now != recipe.weights_sha256:
        raise CheckpointError(
            f"index={path} was made by {weights}, which has changed since: name the weights that made it, or make it anew."
        )
