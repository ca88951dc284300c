"""What of it is a problem, and how to repair it."""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from clip_exp.checks.splits import TRAIN, VAL
from clip_exp.config.commands import CheckDataConfig
from clip_exp.config.data import PairLabel
from clip_exp.data.files import NO_SUCH_FILE, NOT_ALLOWED, OUTSIDE_ROOT, TOO_MANY_BYTES, TOO_MANY_PIXELS
from clip_exp.reports.html import counted, probability

WORTH_TELLING = 0.01  # share of images or captions
MUCH_LARGER = 4  # times the model's input, from where decoding is most of the loader's work
REMEDIES = {  # where most bad images are of one kind
    NO_SUCH_FILE: "Set data.image_root to the folder that relative paths start from",
    OUTSIDE_ROOT: "Correct the relative paths that leave data.image_root by `..`, or set data.allow_outside_root=true",
    TOO_MANY_BYTES: "Raise data.max_image_bytes",
    TOO_MANY_PIXELS: "Raise data.max_image_pixels",
    NOT_ALLOWED: "Add their formats to data.image_formats",
}


class Level(StrEnum):
    error = "error"  # above a threshold: exit code 3
    warning = "warning"
    note = "note"


@dataclass(frozen=True)
class Verdict:
    """A problem."""

    level: Level
    split: str
    subject: str  # a stable name of it
    text: str  # what was found
    fix: str  # what to do


def judge(report: dict[str, Any], config: CheckDataConfig) -> list[Verdict]:
    """The problems that a report tells of, the gravest first."""
    verdicts: list[Verdict] = []
    for name, split in report["splits"].items():
        verdicts += [*_rows_and_images(name, split, config), *_captions(name, split, config), *_sizes(name, split)]
    if report["leakage"] is not None:
        verdicts += _leakage(report["leakage"], config)
    return sorted(verdicts, key=lambda verdict: list(Level).index(verdict.level))


def _rows_and_images(name: str, split: dict[str, Any], config: CheckDataConfig) -> Iterator[Verdict]:
    """What is bad, and what is there twice."""
    bad = split["bad_rows"]
    if bad["count"]:
        over = bad["share"] > config.data.max_bad_fraction
        text = f"{counted(bad['count'], 'bad row')} ({probability(bad['share'])}): {_listed(bad['by_reason'])}"
        fix = "Repair them (bad_rows.csv), or leave them out: data.on_bad_row=skip"
        yield Verdict(Level.error if over else Level.warning, name, "bad_rows", text, fix)
    for column, found in split["filter_values"].items():
        if found["count"]:
            text = f"{counted(found['count'], 'value')} of {column} not {found['kind']}, such as {found['example']!r}"
            fix = "Write them so: data.filter matches no row by them"
            yield Verdict(Level.warning, name, "filter_values", text, fix)
    bad = split["bad_images"]
    if bad["count"]:
        over = bad["share"] > config.data.max_bad_fraction
        kind = max(bad["by_kind"], key=bad["by_kind"].get)
        text = f"{counted(bad['count'], 'bad image')} ({probability(bad['share'])}): {_listed(bad['by_kind'])}"
        if over and kind in REMEDIES and bad["by_kind"][kind] > bad["count"] / 2:
            fix = f"{REMEDIES[kind]}; bad_samples.csv lists them all"
        elif over:
            fix = "Repair or remove them (bad_samples.csv): above data.max_bad_fraction training stops"
        else:
            use = "Training puts others in their place" if name == TRAIN else "Validation leaves them out"
            fix = f"{use}; repair or remove them (bad_samples.csv)"
        yield Verdict(Level.error if over else Level.warning, name, "bad_images", text, fix)
    images, pairs = split["duplicates"]["images"], split["duplicates"]["pairs"]
    if images["copies"]:
        text = f"{counted(images['copies'], 'copy', 'copies')} of {counted(images['groups'], 'image')}: the same bytes under another path"
        fix = "Give each image one path (duplicates.csv): in a batch a copy counts as a wrong answer"
        yield Verdict(Level.warning, name, "duplicate_images", text, fix)
    if pairs["copies"]:
        text = f"{counted(pairs['copies'], 'repeated row')}: the same image with the same caption again"
        yield Verdict(Level.warning, name, "duplicate_pairs", text, "Remove the repeated rows (duplicates.csv)")


def _captions(name: str, split: dict[str, Any], config: CheckDataConfig) -> Iterator[Verdict]:
    captions = split["captions"]
    cut, empty, pairs = captions["truncated"], captions["empty"], captions["equal_in_batch"]["pairs"]
    if cut["count"]:
        text = (
            f"{counted(cut['count'], 'caption')} ({probability(cut['share'])}) longer than {captions['context_length']} tokens: "
            f"the end is cut off; the longest has {captions['tokens']['max']:,.0f}"
        )
        fix = "Shorten them, or raise model.text.context_length"
        yield Verdict(_by_share(cut["share"]), name, "truncated_captions", text, fix)
    if empty["count"]:
        over = empty["share"] > config.data.max_empty_caption_fraction
        text = f"{counted(empty['count'], 'empty or blank caption')} ({probability(empty['share'])})"
        fix = "Remove these rows: they say nothing of their images, and all are equal"
        if over:
            fix += ". Above data.max_empty_caption_fraction training does not start"
        yield Verdict(Level.error if over else Level.warning, name, "empty_captions", text, fix)
    if name == TRAIN and pairs >= 1 and config.data.same_caption is PairLabel.negative:
        text = (
            f"{counted(round(pairs), 'pair')} of equal captions expected in a batch of {config.global_batch_size:,}, "
            "each taken for a wrong answer"
        )
        yield Verdict(Level.warning, name, "equal_captions", text, "Train with loss.same_caption=positive")
    badly = {script: found for script, found in captions["scripts"].items() if found["split_badly"]}
    if badly:
        told = [
            f"{script} ({counted(found['captions'], 'caption')}, {probability(found['share'])}) at "
            f"{found['tokens_per_character']:.1f} tokens per character, {found['times_english']:.1f} times English"
            for script, found in badly.items()
        ]
        level = _by_share(sum(found["share"] for found in badly.values()))
        text = f"the tokenizer takes apart the writing of {'; '.join(told)}"
        fix = "Use a text tower made for these languages: model/text=huggingface model.text.name=xlm-roberta-base"
        yield Verdict(level, name, "badly_split_scripts", text, fix)


def _sizes(name: str, split: dict[str, Any]) -> Iterator[Verdict]:
    small, shorter = split["smaller_than_input"], split["shorter_side"]
    if small["share"] >= WORTH_TELLING:
        text = f"{counted(small['count'], 'image')} ({probability(small['share'])}) smaller than the model's {small['image_size']} pixels"
        fix = "They are enlarged: leave them out, or choose a model with a smaller input"
        yield Verdict(Level.note, name, "small_images", text, fix)
    if shorter is not None and shorter["p50"] >= MUCH_LARGER * small["image_size"]:
        text = f"half of the images have a shorter side of {shorter['p50']:,.0f} pixels or more, the model's has {small['image_size']}"
        fix = f"Decoding is most of the loader's work: keep copies of about {2 * small['image_size']} pixels"
        yield Verdict(Level.note, name, "large_images", text, fix)
    if split["exif_rotated"]["share"] >= WORTH_TELLING:
        text = f"{counted(split['exif_rotated']['count'], 'image')} ({probability(split['exif_rotated']['share'])}) turned by EXIF"
        fix = "Training turns them upright; the published evaluation protocols do not: store them upright"
        yield Verdict(Level.note, name, "exif_rotated", text, fix)
    if split["animated"]["count"]:
        text = counted(split["animated"]["count"], "animated image")
        yield Verdict(Level.note, name, "animated", text, "Only the first frame is used")


def _leakage(leakage: dict[str, Any], config: CheckDataConfig) -> Iterator[Verdict]:
    if leakage["images"]:
        over = config.max_leakage is not None and leakage["share"] > config.max_leakage
        sampled = " at least, since not all were checked" if leakage["sampled"] else ""
        pairs = leakage["same_image_and_caption"]["count"]
        text = (
            f"{counted(leakage['images'], 'image')} ({probability(leakage['share'])}) shared with training{sampled}; "
            f"in {counted(pairs, 'row')} the caption is the same too"
        )
        fix = "Take them out of data.val or of data.train (leakage.csv): validation would look better than it is"
        yield Verdict(Level.error if over else Level.warning, VAL, "leakage", text, fix)


def _by_share(share: float) -> Level:
    return Level.warning if share >= WORTH_TELLING else Level.note


def _listed(counts: dict[str, int], most: int = 6) -> str:
    shown = [f"{reason} {count:,}" for reason, count in list(counts.items())[:most]]
    return ", ".join(shown) + (f", {counted(len(counts) - most, 'other reason')}" if len(counts) > most else "")
