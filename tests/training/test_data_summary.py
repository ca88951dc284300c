"""What was found wrong with the data is in the summary, on the terminal and in the report."""

from clip_exp.reports.data_facts import data_facts
from clip_exp.training.data_summary import summarize_data
from tests.data.conftest import data_module, noise, write_table


def test_empty_captions_and_values_that_no_filter_compares_are_told(tmp_path, caplog):
    noise(0).save(tmp_path / "0.png")
    rows = [
        ["filepath", "title", "width"],
        *(["0.png", "a caption", width] for width in ("300", "1,024", "", "512 px", "400")),
    ]
    rows += [["0.png", "", "300"], ["0.png", "\u00a0\u200b", "300"]]
    train = write_table(tmp_path / "train.csv", rows)
    val = write_table(tmp_path / "val.csv", [rows[0], *rows[-2:], ["0.png", "b", "300"], ["0.png", "c", "300"]])
    module = data_module(tmp_path / "outputs", str(train), val=str(val), filter="width >= 256", global_batch_size=1)
    module.setup()
    summary = summarize_data(module, tmp_path, steps=0, ranks=1)
    assert summary["empty_captions"] == {
        "training": {"count": 2, "fraction": 0.5},
        "validation": {"count": 2, "fraction": 0.5},
    }
    width = {"kind": "numbers", "count": 2, "missing": 1, "example": "1,024"}
    assert summary["filter_values"] == {"training": {"width": width}}
    facts = data_facts(summary)
    assert facts["empty captions"].replace("\u202f", " ") == "2 of training (50.0 %); 2 of validation (50.0 %)"
    assert facts["filter"] == "width of training: 2 not numbers, such as '1,024', 1 missing; these match nothing"
    assert f"{train}: 2 of 4 captions are empty or blank." in caplog.text
    assert (
        f"{train}: values that match nothing in the filter: width (2 not numbers, such as '1,024' in line 3, 1 missing)."
        in caplog.text
    )


def test_faultless_data_has_nothing_to_tell(tmp_path):
    noise(0).save(tmp_path / "0.png")
    train = write_table(tmp_path / "train.csv", [["filepath", "title"], ["0.png", "a caption"]])
    module = data_module(tmp_path / "outputs", str(train), global_batch_size=1)
    module.setup()
    summary = summarize_data(module, tmp_path, steps=0, ranks=1)
    assert (summary["empty_captions"], summary["filter_values"]) == ({}, {})
    assert not {"empty captions", "filter"} & data_facts(summary).keys()
