"""Problems found in the data, with their severity and how to fix them."""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from clip_exp.checks.splits import TRAIN, VAL
from clip_exp.config.commands import CheckDataConfig
from clip_exp.config.data import PairLabel
from clip_exp.data.files import NO_DECODER, NO_SUCH_FILE, NOT_ALLOWED, OUTSIDE_ROOT, TOO_MANY_BYTES, TOO_MANY_PIXELS
from clip_exp.reports.html import counted, probability

NOTEWORTHY = 0.01  # fraction of images or captions from which a problem is reported, or is a warning
MUCH_LARGER = 4  # times the model's input, from which decoding takes most of the loader's time
REMEDIES = {  # fix if most bad images are of one kind
    NO_SUCH_FILE: "Set data.image_root to the folder that relative paths start from",
    OUTSIDE_ROOT: "Correct the relative paths that leave data.image_root by `..`, or set data.allow_outside_root=true",
    TOO_MANY_BYTES: "Increase data.max_image_bytes",
    TOO_MANY_PIXELS: "Increase data.max_image_pixels",
    NOT_ALLOWED: "Add their formats to data.image_formats",
    NO_DECODER: "Install the package that decodes them",
}


class Level(StrEnum):
    error = "error"  # above a threshold: exit code 3
    warning = "warning"
    note = "note"


@dataclass(frozen=True)
class Verdict:
    """Problem of a split."""

    level: Level
    split: str
    subject: str  # stable identifier of the problem
    text: str  # what was found
    fix: str  # what to do


def find_problems(report: dict[str, Any], config: CheckDataConfig) -> list[Verdict]:
    """Return the problems in a report, most severe first."""
    verdicts: list[Verdict] = []
    for name, split in report["splits"].items():
        verdicts += [*_rows_and_images(name, split, config), *_captions(name, split, config), *_sizes(name, split)]
    if report["leakage"] is not None:
        verdicts += _leakage(report["leakage"], config)
    return sorted(verdicts, key=lambda verdict: list(Level).index(verdict.level))


def _rows_and_images(name: str, split: dict[str, Any], config: CheckDataConfig) -> Iterator[Verdict]:
    """Yield problems with bad rows, bad images and duplicates."""
    bad = split["bad_rows"]
    if bad["count"]:
        over = bad["fraction"] > config.data.max_bad_fraction
        text = f"{counted(bad['count'], 'bad row')} ({probability(bad['fraction'])}): {_listed(bad['by_reason'])}"
        fix = "Repair them (bad_rows.csv), or skip them: data.on_bad_row=skip"
        yield Verdict(Level.error if over else Level.warning, name, "bad_rows", text, fix)
    for column, found in split["filter_values"].items():
        if found["count"]:
            text = f"{counted(found['count'], 'value')} of {column} not {found['kind']}, such as {found['example']!r}"
            fix = f"Write them as {found['kind']}: data.filter cannot compare them"
            yield Verdict(Level.warning, name, "filter_values", text, fix)
    bad = split["bad_images"]
    if bad["count"]:
        over = bad["fraction"] > config.data.max_bad_fraction
        kind = max(bad["by_kind"], key=bad["by_kind"].get)
        text = f"{counted(bad['count'], 'bad image')} ({probability(bad['fraction'])}): {_listed(bad['by_kind'])}"
        if over and kind in REMEDIES and bad["by_kind"][kind] > bad["count"] / 2:
            fix = f"{REMEDIES[kind]}; bad_samples.csv lists all of them"
        elif over:
            fix = "Repair or remove them (bad_samples.csv): above data.max_bad_fraction training stops"
        else:
            use = "Training replaces them with other images" if name == TRAIN else "Validation leaves them out"
            fix = f"{use}; repair or remove them (bad_samples.csv)"
        yield Verdict(Level.error if over else Level.warning, name, "bad_images", text, fix)
    images, pairs = split["duplicates"]["images"], split["duplicates"]["pairs"]
    if images["copies"]:
        text = f"{counted(images['copies'], 'copy', 'copies')} of {counted(images['groups'], 'image')}: the same bytes under another path"
        fix = "Keep one path per image (duplicates.csv): in a batch, a copy counts as a negative"
        yield Verdict(Level.warning, name, "duplicate_images", text, fix)
    if pairs["copies"]:
        text = f"{counted(pairs['copies'], 'duplicate row')}: the same image with the same caption"
        yield Verdict(Level.warning, name, "duplicate_pairs", text, "Remove the duplicate rows (duplicates.csv)")


def _captions(name: str, split: dict[str, Any], config: CheckDataConfig) -> Iterator[Verdict]:
    captions = split["captions"]
    cut, empty, pairs = captions["truncated"], captions["empty"], captions["equal_in_batch"]["pairs"]
    if cut["count"]:
        text = (
            f"{counted(cut['count'], 'caption')} ({probability(cut['fraction'])}) longer than {captions['context_length']} tokens: "
            f"the end is truncated; the longest has {captions['tokens']['max']:,.0f}"
        )
        fix = "Shorten them, or increase model.text.context_length"
        yield Verdict(_level_of(cut["fraction"]), name, "truncated_captions", text, fix)
    if empty["count"]:
        over = empty["fraction"] > config.data.max_empty_caption_fraction
        text = f"{counted(empty['count'], 'empty or blank caption')} ({probability(empty['fraction'])})"
        fix = "Remove these rows: they do not describe their images, and all are equal"
        if over:
            fix += ". Above data.max_empty_caption_fraction, training does not start"
        yield Verdict(Level.error if over else Level.warning, name, "empty_captions", text, fix)
    several = {
        "lists": ("look like a list of captions, and are read as one text each", "caption_list"),
        "several_lines": ("have several lines, and are read as one text each", "caption_lines"),
    }
    for subject, (how, key) in several.items():
        if captions[subject] > captions["count"] / 2 and not getattr(config.data, key):
            text = f"{counted(captions[subject], 'caption')} {how}"
            yield Verdict(
                Level.warning, name, f"captions_{subject}", text, f"Read them as several captions: data.{key}=true"
            )
    if name == TRAIN and pairs >= 1 and config.data.same_caption is PairLabel.negative:
        text = (
            f"{counted(round(pairs), 'pair')} of equal captions expected in a batch of {config.global_batch_size:,}, "
            "which the loss counts as negatives"
        )
        yield Verdict(Level.warning, name, "equal_captions", text, "Train with loss.same_caption=positive")
    badly = {script: found for script, found in captions["scripts"].items() if found["split_badly"]}
    if badly:
        described = [
            f"{script} ({counted(found['captions'], 'caption')}, {probability(found['fraction'])}) at "
            f"{found['tokens_per_character']:.1f} tokens per character, {found['times_english']:.1f} times English"
            for script, found in badly.items()
        ]
        level = _level_of(sum(found["fraction"] for found in badly.values()))
        text = f"the tokenizer needs many tokens for {'; '.join(described)}"
        fix = "Use a multilingual text tower: model/text=huggingface model.text.name=xlm-roberta-base"
        yield Verdict(level, name, "badly_split_scripts", text, fix)


def _sizes(name: str, split: dict[str, Any]) -> Iterator[Verdict]:
    small, shorter = split["smaller_than_input"], split["shorter_side"]
    if small["fraction"] >= NOTEWORTHY:
        text = f"{counted(small['count'], 'image')} ({probability(small['fraction'])}) smaller than the model's {small['image_size']} pixels"
        fix = "They are upscaled: remove them, or choose a model with a smaller input"
        yield Verdict(Level.note, name, "small_images", text, fix)
    if shorter is not None and shorter["p50"] >= MUCH_LARGER * small["image_size"]:
        text = f"half of the images have a shorter side of {shorter['p50']:,.0f} pixels or more; the model's input has {small['image_size']}"
        fix = (
            f"Decoding takes most of the loader's time: store smaller copies of about {2 * small['image_size']} pixels"
        )
        yield Verdict(Level.note, name, "large_images", text, fix)
    if split["exif_rotated"]["fraction"] >= NOTEWORTHY:
        text = f"{counted(split['exif_rotated']['count'], 'image')} ({probability(split['exif_rotated']['fraction'])}) rotated by EXIF"
        fix = "Training rotates them upright, published evaluations do not: store them upright"
        yield Verdict(Level.note, name, "exif_rotated", text, fix)
    if split["animated"]["count"]:
        text = counted(split["animated"]["count"], "animated image")
        yield Verdict(Level.note, name, "animated", text, "Only the first frame is used")


def _leakage(leakage: dict[str, Any], config: CheckDataConfig) -> Iterator[Verdict]:
    if leakage["images"]:
        over = config.max_leakage is not None and leakage["fraction"] > config.max_leakage
        sampled = " at least, since not all were checked" if leakage["sampled"] else ""
        pairs = leakage["same_image_and_caption"]["count"]
        text = (
            f"{counted(leakage['images'], 'image')} ({probability(leakage['fraction'])}) also in the training data{sampled}; "
            f"in {counted(pairs, 'row')} the caption is the same too"
        )
        fix = "Remove them from data.val or from data.train (leakage.csv): they make validation scores too high"
        yield Verdict(Level.error if over else Level.warning, VAL, "leakage", text, fix)


def _level_of(fraction: float) -> Level:
    return Level.warning if fraction >= NOTEWORTHY else Level.note


def _listed(counts: dict[str, int], most: int = 6) -> str:
    shown = [f"{reason} {count:,}" for reason, count in list(counts.items())[:most]]
    return ", ".join(shown) + (f", {counted(len(counts) - most, 'other reason')}" if len(counts) > most else "")
