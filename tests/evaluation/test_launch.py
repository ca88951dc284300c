"""Complete evaluations of random weights, compared with direct computations."""

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torchvision import transforms

import clip_exp
from clip_exp.config.base import parse, unused_keys
from clip_exp.config.commands import RankConfig
from clip_exp.config.data import DataConfig
from clip_exp.config.evaluation import EvalOnBadImage, EvaluateConfig
from clip_exp.config.names import named_model
from clip_exp.data.image_sets import ImageFiles
from clip_exp.data.images import preprocessing_of
from clip_exp.errors import CheckpointError, ConfigError, DataError
from clip_exp.evaluation.evaluated_model import EvaluatedModel
from clip_exp.evaluation.features import EncodeOptions, encode_images
from clip_exp.evaluation.launch import check, evaluate
from clip_exp.evaluation.retrieval import retrieval
from clip_exp.evaluation.sets.class_names import class_prompts, imagenet_classes, templates
from clip_exp.loading import find_source
from clip_exp.models.clip import CLIP
from clip_exp.text.tokenizer import Tokenizer
from tests.data.tables.shard_files import write_shard
from tests.small_runs import write_checkpoint, write_image, write_run


def config(tmp_path: Path, task: dict, **values) -> EvaluateConfig:
    common = {"output_dir": str(tmp_path / "outputs"), "accelerator": "cpu", "num_workers": 0}
    return parse(EvaluateConfig, {"task": task, **common, **values})


def direct_image_features(model: CLIP, paths: list[Path]) -> torch.Tensor:
    wanted = preprocessing_of(named_model("vit_nano").image)
    published = transforms.Compose(
        [
            transforms.Resize(wanted.size, transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(wanted.size),
            lambda image: image.convert("RGB"),
            transforms.ToTensor(),
            transforms.Normalize(wanted.mean, wanted.std),
        ]
    )
    with torch.no_grad():
        return torch.cat([model.encode_image(published(Image.open(path))[None], normalize=True) for path in paths])


def direct_text_features(model: CLIP, texts: list[str]) -> torch.Tensor:
    with torch.no_grad():
        return model.encode_text(Tokenizer(77)(texts, trim=False), normalize=True)


def direct_classifier(model: CLIP, names: list[str], prompts: list[str]) -> torch.Tensor:
    means = [direct_text_features(model, class_prompts(name, prompts)).mean(dim=0) for name in names]
    return torch.nn.functional.normalize(torch.stack(means), dim=-1)


def test_zero_shot_on_folders_equals_a_direct_computation(
    tmp_path: Path, nano: CLIP, run_dir: Path, class_folders: Path
):
    prompts = ["a photo of a {}.", "art of the {}."]
    task = {"pets": {"kind": "zero_shot", "root": str(class_folders), "templates": prompts}}
    result = evaluate(config(tmp_path, task, run=str(run_dir), batch_size=5))["pets"]

    paths = [
        path for name in ("Zebra", "dog", "tabby_cat") for path in sorted((class_folders / name).glob("[0-9].png"))
    ]
    labels = torch.arange(3).repeat_interleave(4)
    scores = direct_image_features(nano, paths) @ direct_classifier(nano, ["Zebra", "dog", "tabby cat"], prompts).T
    hits = scores.argmax(dim=1) == labels
    assert result["metrics"]["top1"] == pytest.approx(hits.double().mean().item())
    assert result["metrics"]["mean_per_class_recall"] == pytest.approx(hits.view(3, 4).double().mean().item())
    assert "top5" not in result["metrics"]  # of three classes
    protocol = result["protocol"]
    assert protocol["images"] == 12
    assert protocol["templates_source"] == prompts
    assert protocol["names"] == {"Zebra": "Zebra", "dog": "dog", "tabby_cat": "tabby cat"}
    assert (protocol["precision"], protocol["step"], protocol["bad_images"]) == ("32-true", 1, 0)


def test_results_and_record_are_files_of_the_evaluation_and_of_the_run(
    tmp_path: Path, run_dir: Path, class_folders: Path, capsys
):
    task = {"pets": {"kind": "zero_shot", "root": str(class_folders), "templates": "a {}."}}
    results = evaluate(config(tmp_path, task, run=str(run_dir)))
    (folder,) = (tmp_path / "outputs" / "evaluate" / "vit_nano_csv").iterdir()
    for place in (folder, run_dir):
        assert json.loads((place / "eval" / "pets.json").read_text()) == results["pets"]
    assert json.loads((folder / "run.json").read_text())["status"] == "finished"
    assert (folder / "config.yaml").is_file()
    manifest = json.loads((run_dir / "checkpoints" / "step-000001" / "manifest.json").read_text())
    assert results["pets"]["protocol"]["weights_sha256"] == manifest["files"]["model.safetensors"]["sha256"]
    printed = capsys.readouterr().out
    assert "pets/top1" in printed
    assert str(folder) in printed


def test_imagenet_is_scored_against_1000_names_by_wnid(tmp_path: Path, nano: CLIP, run_dir: Path):
    wnids = ["n04356056", "n01440764", "n03773504"]
    for position, wnid in enumerate(wnids):
        for number in range(3):
            write_image(tmp_path / "val" / wnid / f"{number}.JPEG", 10 * position + number)
    task = {
        "imagenet": {"kind": "zero_shot", "root": str(tmp_path / "val"), "classes": "imagenet", "templates": "simple"}
    }
    result = evaluate(config(tmp_path, task, ckpt=str(run_dir / "checkpoints" / "step-000001")))["imagenet"]

    names = [name for _, name in imagenet_classes()]
    paths = sorted((tmp_path / "val").glob("*/*.JPEG"))
    labels = torch.tensor([0, 657, 837]).repeat_interleave(3)
    classifier = direct_classifier(nano, names, templates("simple"))
    best = (direct_image_features(nano, paths) @ classifier.T).topk(5, dim=1).indices
    assert result["metrics"]["top5"] == pytest.approx((best == labels[:, None]).any(dim=1).double().mean().item())
    protocol = result["protocol"]
    assert (protocol["classes"], protocol["classes_without_images"], protocol["images"]) == (1000, 997, 9)


def pairs_csv(tmp_path: Path) -> tuple[Path, list[str], list[int]]:
    captions, images = [], []
    lines = ["filepath,title"]
    for i in range(14):
        write_image(tmp_path / f"{i}.png", i)
        for j in range(1 + i % 3):
            captions.append(f"caption {j} of image number {i}")
            images.append(i)
    order = torch.randperm(len(captions), generator=torch.Generator().manual_seed(0)).tolist()
    captions, images = [captions[k] for k in order], [images[k] for k in order]
    # An image is the same one however its path is written.
    lines += [f"{'./' * (k % 2)}{i}.png,{captions[k]}" for k, i in enumerate(images)]
    (tmp_path / "pairs.csv").write_text("\n".join(lines) + "\n")
    return tmp_path / "pairs.csv", captions, images


def test_retrieval_on_a_table_equals_a_direct_computation_from_a_weights_file(
    tmp_path: Path, nano: CLIP, run_dir: Path
):
    table, captions, images = pairs_csv(tmp_path)
    weights = str(run_dir / "checkpoints" / "step-000001" / "model.safetensors")
    task = {"pairs": {"kind": "retrieval", "table": str(table)}}
    result = evaluate(config(tmp_path, task, model=named_model("vit_nano"), pretrained=weights))["pairs"]
    image = direct_image_features(nano, [tmp_path / f"{i}.png" for i in range(14)])
    expected = retrieval(image, direct_text_features(nano, captions), torch.tensor(images))
    assert result["metrics"] == pytest.approx(expected)
    assert (result["protocol"]["images"], result["protocol"]["captions"]) == (14, len(captions))


def test_copies_empty_captions_and_values_that_no_filter_compares_are_in_the_protocol(
    tmp_path: Path, run_dir: Path, caplog: pytest.LogCaptureFixture
):
    for i in range(3):
        write_image(tmp_path / f"{i}.png", i)
    shutil.copy(tmp_path / "1.png", tmp_path / "copy.png")
    rows = [
        ("0", "one", "300"),
        ("./0", "two", "300"),
        ("1", "\u00a0", "300"),
        ("copy", "x", "300"),
        ("2", "y", "1,024"),
    ]
    table = tmp_path / "t.csv"
    given = {"table": str(table), "filter": "width >= 256"}
    table.write_text("filepath;title;width\n" + "".join(f"{path}.png;{text};{width}\n" for path, text, width in rows))
    protocol = evaluate(config(tmp_path, {"pairs": {"kind": "retrieval", **given}}, run=str(run_dir)))["pairs"][
        "protocol"
    ]
    assert (protocol["images"], protocol["captions"], protocol["empty_captions"]) == (3, 4, 1)
    assert protocol["filter_values"] == {"width": {"kind": "numbers", "count": 1, "missing": 0, "example": "1,024"}}
    assert (protocol["copied_images"], protocol["copies"]) == (1, 1)
    assert protocol["copies_listed"] == [f"{tmp_path}/1.png = {tmp_path}/copy.png"]
    assert caplog.text.count("pairs: copies of images under other names: 1, such as") == 1


def test_shards_parquet_and_json_lines_score_as_the_same_pairs_in_a_csv(tmp_path: Path, run_dir: Path):
    rows = [{"filepath": f"{i}.png", "title": f"an image of {i}", "label": ("cat", "dog")[i % 2]} for i in range(6)]
    members: dict = {}
    for i, row in enumerate(rows):
        image = Path(write_image(tmp_path / f"{i}.png", i))
        members |= {f"{i}.png": image.read_bytes(), f"{i}.txt": row["title"], f"{i}.json": {"label": row["label"]}}
    for half in range(2):
        write_shard(tmp_path / f"s-{half}.tar", list(members.items())[9 * half : 9 * half + 9])
    (tmp_path / "t.csv").write_text("\n".join(map(",".join, [rows[0], *(row.values() for row in rows)])) + "\n")
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "t.parquet")
    results = {}
    for name in ("t.csv", "t.jsonl", "t.parquet", "s-{0..1}.tar"):
        given = {"table": str(tmp_path / name), "filter": "label <> 'dog' OR filepath LIKE '%5%'"}
        tasks = {
            "pairs": {"kind": "retrieval", **given, "filter": "title NOT LIKE '%3%'"},
            "pets": {"kind": "zero_shot", **given, "templates": "a {}."},
        }
        scored = evaluate(config(tmp_path, tasks, run=str(run_dir)))
        assert [scored[task]["protocol"]["images"] for task in tasks] == [5, 4]
        results[name] = [scored[task]["metrics"] for task in tasks]
    assert all(result == results["t.csv"] for result in results.values())


def test_a_broken_image_stops_the_evaluation_or_is_left_out_and_counted(tmp_path: Path, nano: CLIP, run_dir: Path):
    table, captions, images = pairs_csv(tmp_path)
    (tmp_path / "5.png").write_bytes(b"not an image")
    strict = config(tmp_path, {"pairs": {"kind": "retrieval", "table": str(table)}}, run=str(run_dir))
    with pytest.raises(DataError, match=r"5\.png: .*on_bad_image=skip"):
        evaluate(strict)
    assert not list(tmp_path.rglob("eval/*.json"))
    result = evaluate(strict.model_copy(update={"on_bad_image": EvalOnBadImage.skip}))["pairs"]
    kept = [i for i in range(14) if i != 5]
    image = direct_image_features(nano, [tmp_path / f"{i}.png" for i in kept])
    rows = [k for k, i in enumerate(images) if i != 5]
    text = direct_text_features(nano, [captions[k] for k in rows])
    expected = retrieval(image, text, torch.tensor([kept.index(images[k]) for k in rows]))
    assert result["metrics"] == pytest.approx(expected)
    assert (result["protocol"]["images"], result["protocol"]["bad_images"]) == (13, 1)
    assert str(tmp_path / "5.png") in result["protocol"]["bad"][0]


def validation_data(folder: Path, **keys: Any) -> DataConfig:
    """Write six images of cats and dogs and their table, and return the data of a run that validated on it."""
    rows = [f"{i}.png;an image of {i};{('cat', 'dog')[i % 2]}" for i in range(6)]
    for i in range(6):
        write_image(folder / f"{i}.png", i)
    (folder / "val.csv").write_text("\n".join(["file;text;class", *rows]) + "\n")
    columns = {"image_key": "file", "caption_key": "text", "separator": ";"}
    return DataConfig(name="csv", train="pairs.csv", val=str(folder / "val.csv"), **columns, **keys)


def test_auto_scores_the_validation_data_of_the_run(tmp_path: Path, nano: CLIP):
    data = validation_data(tmp_path, label_key="class", templates=["one {}."])
    run_dir = write_run(tmp_path / "run", nano, data)
    results = evaluate(config(tmp_path, {"auto": {"kind": "auto"}}, run=str(run_dir)))
    assert sorted(results) == ["val_retrieval", "val_zero_shot"]
    scores = direct_image_features(nano, [tmp_path / f"{i}.png" for i in range(6)])
    scores = scores @ direct_classifier(nano, ["cat", "dog"], ["one {}."]).T
    top1 = (scores.argmax(dim=1) == torch.arange(6) % 2).double().mean().item()
    assert results["val_zero_shot"]["metrics"]["top1"] == pytest.approx(top1)
    assert results["val_retrieval"]["protocol"]["captions"] == 6


def test_retrieval_without_a_table_scores_the_validation_data_of_the_run(tmp_path: Path, nano: CLIP):
    data = validation_data(tmp_path)
    run_dir = str(write_run(tmp_path / "run", nano, data))
    found = evaluate(config(tmp_path, {"retrieval": {"kind": "retrieval"}}, run=run_dir))["retrieval"]
    named = {"table": data.val, "image_key": "file", "caption_key": "text", "separator": ";"}
    given = evaluate(config(tmp_path, {"retrieval": {"kind": "retrieval", **named}}, run=run_dir))["retrieval"]
    assert found["metrics"] == given["metrics"]
    assert found["protocol"] == {**given["protocol"], "data_from": "validation data of the run"}
    without_table = config(tmp_path, {"retrieval": {"kind": "retrieval", "caption_key": "text"}}, run=run_dir)
    assert unused_keys(without_table) == [
        "task.retrieval.caption_key=text has no effect without task.retrieval.table, since the validation data of the run are read as in "
        "training: set that, or leave this out."
    ]


def test_a_run_is_found_by_its_name_or_as_the_newest_unless_a_folder_has_this_name(
    tmp_path: Path, nano: CLIP, class_folders: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    old, new, other = (
        write_run(tmp_path / "outputs" / "train" / name / time, nano)
        for name, time in (("a", "2026-01-01_10-00-00"), ("a", "2026-01-02_10-00-00"), ("b", "2026-01-01_12-00-00"))
    )
    task = {"pets": {"kind": "zero_shot", "root": str(class_folders), "templates": "a {}."}}
    for run, folder in {"latest": new, "a": new, "b": other, str(old): old}.items():
        source, _ = check(config(tmp_path, task, run=run))
        assert source.run_dir is not None
        assert source.run_dir.resolve() == folder.resolve()
        message = capsys.readouterr()
        assert (message.out, message.err) == ("", "" if run == str(old) else f"run={run}: {folder}\n")
    evaluate(config(tmp_path, task, run="b"))
    (written,) = tmp_path.glob("outputs/evaluate/*/*/config.yaml")
    assert f"run: {other}" in written.read_text().splitlines()
    assert Path(find_source(RankConfig(run="b")).weights).resolve().is_relative_to(other)
    with pytest.raises(
        ConfigError, match=r"^run=bb: folder not found, and no run in .*train has this name: did you mean 'b'"
    ):
        check(config(tmp_path, task, run="bb"))
    Path("b").mkdir()
    with pytest.raises(CheckpointError, match="b is not a run folder"):
        check(config(tmp_path, task, run="b"))


def test_a_run_is_loaded_by_its_name_or_as_the_newest(
    tmp_path: Path, nano: CLIP, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    folder = write_run(tmp_path / "outputs" / "train" / "mine" / "2026-01-01_10-00-00", nano)
    for name in ("mine", "latest"):
        clip_exp.load(name, accelerator="cpu")
        assert capsys.readouterr().err == f"run={name}: {folder.relative_to(tmp_path)}\n"
    with pytest.raises(ConfigError, match=r"neither an existing file|file or folder not found"):
        clip_exp.load("absent")


def test_a_run_is_scored_at_its_best_checkpoint_if_it_has_a_monitor_else_at_its_last(
    tmp_path: Path,
    nano: CLIP,
    class_folders: Path,
):
    for monitor, step in ((None, 3), ("val/recall@1_i2t", 2)):
        run_dir = write_run(tmp_path / f"run_{step}", nano, monitor=monitor)
        write_checkpoint(run_dir, nano, 2, best=True)
        write_checkpoint(run_dir, nano, 3)
        task = {"pets": {"kind": "zero_shot", "root": str(class_folders), "templates": "a {}."}}
        source, _ = check(config(tmp_path, task, run=str(run_dir)))
        assert source.step == step


def test_all_problems_are_reported_together_before_a_folder_is_created(tmp_path: Path, run_dir: Path):
    keys = {
        "two": {"kind": "retrieval", "tabel": "pairs.csv"},
        "three": {"kind": "zeroshot"},
    }
    with pytest.raises(ConfigError) as caught:
        config(tmp_path, keys, run=str(run_dir), precision="fp8", batch_size=0)
    for part in (
        "precision=fp8 must be one of",
        "batch_size=0",
        "task.two.tabel does not exist: did you mean 'task.two.table'?",
        "task.three.kind=zeroshot must be one of",
        "Did you mean 'zero_shot'?",
    ):
        assert part in str(caught.value)
    tasks = {
        "one": {"kind": "zero_shot", "root": str(tmp_path / "absent")},
        "four": {"kind": "retrieval", "table": str(tmp_path / "absent.csv")},
        "five": {"kind": "zero_shot", "root": str(tmp_path), "split": "val"},
        "auto": {"kind": "auto"},
        "o/ne": {"kind": "auto"},
    }
    with pytest.raises(ConfigError) as caught:
        evaluate(config(tmp_path, tasks, run=str(run_dir), name="a/b", devices=[0, 0]))
    for part in (
        "name='a/b' is not a valid folder name",
        "devices=[0, 0] must be",
        f"task.one.root={tmp_path / 'absent'}: no such folder",
        f"task.four.table: The table {tmp_path / 'absent.csv'} does not exist",
        "task.five.split=val has no effect",
        "task.auto: the run has no validation data",
        "task.o/ne: the name of a task is used as a file name",
    ):
        assert part in str(caught.value)
    assert not (tmp_path / "outputs").exists()


def test_weights_that_do_not_fit_are_refused_before_a_folder_is_created(
    tmp_path: Path, nano: CLIP, class_folders: Path
):
    torch.save(
        {"net": {f"clip.{name}": x for name, x in nano.state_dict().items() if name != "logit_scale"}},
        tmp_path / "a.ckpt",
    )
    weights = {"model": named_model("vit_nano"), "pretrained": str(tmp_path / "a.ckpt")}
    task = {"one": {"kind": "zero_shot", "root": str(class_folders)}}
    with pytest.raises(
        CheckpointError, match=r"a\.ckpt \(net\.clip\) does not fit the model\.\n  missing in the file: logit_scale"
    ):
        evaluate(config(tmp_path, task, **weights))
    assert not (tmp_path / "outputs").exists()


def test_the_validation_data_of_a_run_need_a_model_that_was_found(tmp_path: Path, run_dir: Path, nano: CLIP):
    absent = {"kind": "zero_shot", "root": str(tmp_path / "absent")}
    with pytest.raises(ConfigError) as caught:
        evaluate(config(tmp_path, {"auto": {"kind": "auto"}, "one": absent}, run="nowhere"))
    assert "run=nowhere: folder not found" in str(caught.value)
    assert "task.one.root" in str(caught.value)
    assert "task.auto" not in str(caught.value)
    # Of weights that are not read before all else is right it is known that they are no run's.
    save_file(nano.state_dict(), tmp_path / "nano.safetensors")
    weights = {"model": named_model("vit_nano"), "pretrained": str(tmp_path / "nano.safetensors")}
    with pytest.raises(ConfigError) as caught:
        evaluate(config(tmp_path, {"auto": {"kind": "auto"}}, name="a/b", **weights))
    assert "name='a/b' is not a valid folder name" in str(caught.value)
    assert "task.auto needs the validation data of a run, but no run is given" in str(caught.value)


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({}, ConfigError, "none is set"),
        ({"run": "a", "ckpt": "b"}, ConfigError, "got run=a, ckpt=b"),
        ({"model": named_model("vit_nano")}, ConfigError, "got model=vit_nano"),
        ({"run": "a", "pretrained": "w.pt"}, ConfigError, "got run=a, pretrained=w.pt"),
        ({"pretrained": "absent.pt"}, ConfigError, "absent.pt does not exist"),
        ({"model": named_model("vit_nano"), "pretrained": "absent.pt"}, ConfigError, "absent.pt does not exist"),
        ({"run": "absent"}, ConfigError, "run=absent: folder not found"),
        ({"run": "."}, CheckpointError, "not a run folder"),
        ({"ckpt": "absent"}, ConfigError, "ckpt=absent: file or folder not found"),
        ({"ckpt": "."}, CheckpointError, "not in a run folder"),
    ],
)
def test_a_model_that_is_not_given_exactly_once_is_refused(
    tmp_path: Path, class_folders: Path, monkeypatch, values: dict, error: type, message: str
):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    with pytest.raises(error, match=message):
        evaluate(config(tmp_path, {"pets": {"kind": "zero_shot", "root": str(class_folders)}}, **values))


def test_a_damaged_checkpoint_is_refused_by_name(tmp_path: Path, run_dir: Path, class_folders: Path):
    weights = run_dir / "checkpoints" / "step-000001" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    task = {"pets": {"kind": "zero_shot", "root": str(class_folders)}}
    with pytest.raises(CheckpointError, match=r"is damaged: model\.safetensors has"):
        evaluate(config(tmp_path, task, ckpt=str(weights)))
    with pytest.raises(CheckpointError, match="no usable checkpoint"):
        evaluate(config(tmp_path, task, run=str(run_dir)))


def test_broken_weights_end_in_a_failed_record_without_results(
    tmp_path: Path, nano: CLIP, run_dir: Path, class_folders: Path
):
    broken = {name: torch.full_like(value, torch.nan) for name, value in nano.state_dict().items()}
    model = torch.nn.Module()
    model.state_dict = lambda: broken  # type: ignore[method-assign]
    write_checkpoint(run_dir, model, 2)
    with pytest.raises(CheckpointError, match="values that are not finite"):
        evaluate(config(tmp_path, {"pets": {"kind": "zero_shot", "root": str(class_folders)}}, run=str(run_dir)))
    (record,) = tmp_path.rglob("outputs/evaluate/*/*/run.json")
    assert json.loads(record.read_text())["status"] == "failed"
    assert not list(tmp_path.rglob("eval/*.json"))


def test_workers_and_batches_do_not_change_the_result(tmp_path: Path, run_dir: Path, class_folders: Path):
    task = {"pets": {"kind": "zero_shot", "root": str(class_folders), "templates": "a {}."}}
    alone = evaluate(config(tmp_path, task, run=str(run_dir)))
    several = evaluate(config(tmp_path, task, run=str(run_dir), batch_size=3).model_copy(update={"num_workers": 2}))
    assert several["pets"]["metrics"] == alone["pets"]["metrics"]


def test_averaged_weights_are_used_on_request_and_missing_ones_are_reported(
    tmp_path: Path, nano: CLIP, run_dir: Path, class_folders: Path
):
    task = {"pets": {"kind": "zero_shot", "root": str(class_folders)}}
    with pytest.raises(CheckpointError, match=r"has no ema\.safetensors"):
        check(config(tmp_path, task, run=str(run_dir), ema=True))
    checkpoint = write_checkpoint(run_dir, nano, 1, averaged=nano.state_dict())
    source, _ = check(config(tmp_path, task, ckpt=str(checkpoint), ema=True))
    assert source.weights.name == "ema.safetensors"


def test_low_precision_is_for_the_image_tower_and_features_stay_float32(
    tmp_path: Path, nano: CLIP, run_dir: Path, class_folders: Path
):
    options = EncodeOptions(torch.device("cpu"), "bf16-mixed")
    evaluated = EvaluatedModel(nano, Tokenizer(77), named_model("vit_nano"), options)
    paths = [str(path) for path in sorted(class_folders.glob("dog/[0-9].png"))]
    low = encode_images(evaluated.image_encoder(), ImageFiles(paths), evaluated.options)
    exact = direct_image_features(nano, [Path(path) for path in paths])
    assert low.features.dtype == torch.float32
    torch.testing.assert_close(low.features.norm(dim=1), torch.ones(4))
    assert 0 < (low.features - exact).abs().max() < 0.02
