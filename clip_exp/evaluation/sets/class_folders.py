"""Whether the folders below a root are classes, or something that stands above the classes: splits, domains, an archive. No torch."""

import re
from pathlib import Path

from clip_exp.errors import ConfigError
from clip_exp.evaluation.sets.labeled import listing

SPLIT = re.compile(
    r"(test(ing)?|val(id(ation)?)?|dev|eval(uation)?|train(ing)?)([ _-]?(set|split|data|images?|\d+))*", re.IGNORECASE
)
SCORED_FIRST = ("test", "val", "dev", "eval", "train")  # which split to suggest

Place = tuple[str, ...]  # of an image below the root: its folders and its name


def require_class_folders(root: Path, files: dict[str, list[str]], where: str) -> None:
    """Refuse a root that is above the classes, whose images would be scored as "train" against "test".

    That is so where all folders are called like splits, or two are that hold no images of their own; and where no folder holds images of its
    own, only folders that do. An exception are folders that each hold one folder of the same name with all of their images, as
    `<class>/images/` in Tiny ImageNet.

    Args:
        files: of each folder all images in it and below.
        where: the task's key, for messages.
    Raises:
        ConfigError: it is; the message names the folder to give instead.
    """
    holding = {folder: _places(root, paths) for folder, paths in files.items() if paths}
    if not holding:
        return
    key = f"{where}.root={root}"
    splits = [folder for folder in holding if SPLIT.fullmatch(folder)]
    nested = [folder for folder, places in holding.items() if min(map(len, places)) > 2]
    if len(splits) == len(holding) or len({*splits} & {*nested}) > 1:
        raise ConfigError(
            f"{key} is above the classes: {listing(splits)} {'is a split' if len(splits) == 1 else 'are splits'}. Give "
            f"{where}.root={_class_level(root, holding)}."
        )
    if len(nested) < len(holding) or _has_inner_folder(holding):
        return
    first = next(iter(holding))
    raise ConfigError(
        f"{key} is above the classes: its folders ({listing([*holding])}) hold no images, only folders of images, such as "
        f"{'/'.join(holding[first][0][:-1])}. Give {where}.root={_class_level(root, holding)}. If they are the classes, name them: "
        f"{where}.classes={{{first}: {first.replace('_', ' ')}, …}}."
    )


def _places(root: Path, paths: list[str]) -> list[Place]:
    start = len(str(root / "_")) - 1
    return [tuple(path[start:].split("/")) for path in paths]


def _has_inner_folder(holding: dict[str, list[Place]]) -> bool:
    """Whether all images are in `<class>/<name>/`, of one name."""
    return len({place[1:-1] for places in holding.values() for place in places}) == 1 and all(
        len(place) == 3 for places in holding.values() for place in places
    )


def _class_level(root: Path, holding: dict[str, list[Place]]) -> Path:
    """Return the folder to give instead: down from the root until folders hold images; a held-out split with classes, if there is one."""
    while True:
        folder = min(
            holding, key=lambda name: (len({place[1] for place in holding[name] if len(place) > 2}) < 2, _rank(name))
        )
        root, places = root / folder, [place[1:] for place in holding[folder]]
        holding = {}
        for place in places:
            holding.setdefault(place[0], []).append(place)
        is_split = all(SPLIT.fullmatch(name) for name in holding)
        if any(len(place) < 2 for place in places) or (not is_split and any(len(place) == 2 for place in places)):
            return root


def _rank(folder: str) -> int:
    """Return the place of a split among `SCORED_FIRST`, after all of them for what is no split."""
    starts = [folder.lower().startswith(name) for name in SCORED_FIRST]
    return starts.index(True) if SPLIT.fullmatch(folder) else len(starts)
