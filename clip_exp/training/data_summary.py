"""What was found wrong with a run's data, counted when it ends."""

from collections import Counter
from pathlib import Path
from typing import Any

from clip_exp.data.bad_samples import VALIDATION, BadSamples
from clip_exp.data.datamodule import PairsDataModule
from clip_exp.data.tables.comparisons import as_json
from clip_exp.data.tables.table import bad_rows, unlike_values


def summarize_data(datamodule: PairsDataModule, run_dir: Path, steps: int, ranks: int) -> dict[str, Any]:
    """For `summary.json`.

    Args:
        datamodule: after training, of this rank.
        steps: of the run, those before a restart included.

    Returns:
        bad_pictures, bad_rows: by table (training, validation), and there by kind; what is faultless is left out.
        empty_captions: likewise, `count` and the `fraction` of all captions.
        filter_values: likewise, by column what the filter could not compare (`tables.comparisons`).
        truncated_share: of the captions that this rank has trained on since it started; None where that is none.
    """
    assert datamodule.stream is not None
    tables = {"training": [source.table for source in datamodule.stream.sources]}
    if datamodule.val_table is not None:
        tables["validation"] = [datamodule.val_table]
    pictures = {
        "training": _kinds(datamodule.bad_samples, run_dir),
        "validation": _kinds(datamodule.bad_val_samples, run_dir, VALIDATION),
    }
    captions = (steps * datamodule.global_batch_size - datamodule.start_sample) // ranks
    parts = {which: [part for table in found for part in table.parts] for which, found in tables.items()}
    return {
        "bad_pictures": {which: dict(kinds.most_common()) for which, kinds in pictures.items() if kinds},
        "bad_rows": {
            which: dict(kinds.most_common()) for which, of_table in parts.items() if (kinds := bad_rows(of_table))
        },
        "empty_captions": {
            which: {"count": count, "fraction": count / sum(map(len, found))}
            for which, found in tables.items()
            if (count := sum(table.empty_captions for table in found))
        },
        "filter_values": {
            which: values for which, of_table in parts.items() if (values := as_json(unlike_values(of_table)))
        },
        "truncated_share": min(1.0, datamodule.truncated / captions) if captions > 0 else None,
    }


def _kinds(own: BadSamples | None, run_dir: Path, mark: str = "") -> Counter[str]:
    """Of all ranks, whose file it is; of this rank alone where the file could not be written."""
    file = run_dir / "bad_samples.csv"
    if file.is_file():
        return BadSamples(0, 1.0, what="", mark=mark, file=file).kinds()
    return Counter() if own is None else own.kinds()
