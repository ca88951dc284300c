import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import clip_exp
from clip_exp.config.names import named_model
from clip_exp.errors import CheckpointError, ConfigError, DataError
from clip_exp.inference.index import recipe_of
from clip_exp.loading import source_of_file
from clip_exp.models.clip import CLIP
from clip_exp.weights.names import to_open_clip
from tests.runs import TINY, Finished, Train
from tests.small_runs import write_image


def test_every_way_to_specify_a_model_loads_the_same_weights(tmp_path: Path, nano: CLIP, run_dir: Path):
    checkpoint = run_dir / "checkpoints" / "step-000001"
    beside = tmp_path / "beside"
    beside.mkdir()
    shutil.copy(checkpoint / "model.safetensors", beside / "weights.safetensors")
    shutil.copy(run_dir / "config.yaml", beside)
    foreign = tmp_path / "open_clip.safetensors"
    save_file(to_open_clip(nano.state_dict()), foreign)
    torch.save({"state_dict": to_open_clip(nano.state_dict())}, tmp_path / "open_clip.pt")
    sources = [
        (run_dir,),
        (str(checkpoint),),
        (checkpoint / "model.safetensors",),
        (beside / "weights.safetensors",),
        ("vit_nano", checkpoint / "model.safetensors"),
        ("vit_nano", foreign),
        ("vit_nano", str(tmp_path / "open_clip.pt")),
    ]
    for source in sources:
        clip = clip_exp.load(*source, accelerator="cpu")
        assert not clip.model.training
        for name, value in clip.model.state_dict().items():
            torch.testing.assert_close(value, nano.state_dict()[name], atol=0, rtol=0)


def test_of_two_models_in_a_file_one_is_chosen_and_its_features_are_distinguished(tmp_path: Path, nano: CLIP):
    path = tmp_path / "last.ckpt"
    other = {name: 2 * value for name, value in nano.state_dict().items()}
    torch.save({"student": other, "teacher": nano.state_dict()}, path)
    with pytest.raises(CheckpointError, match="Select one: pretrained_prefix=student, pretrained_prefix=teacher"):
        clip_exp.load("vit_nano", path, accelerator="cpu")
    clip = clip_exp.load("vit_nano", path, accelerator="cpu", prefix="teacher")
    assert all(torch.equal(value, nano.state_dict()[name]) for name, value in clip.model.state_dict().items())
    sources = [source_of_file(named_model("vit_nano"), path, prefix=prefix) for prefix in (None, "student", "teacher")]
    assert len({source.sha256() for source in sources}) == 3
    for source in sources:
        assert recipe_of(source, "32-true", 1).source.sha256() == source.sha256()


def test_the_activation_can_be_set_for_weights_that_were_trained_with_another(run_dir: Path):
    image = Image.new("RGB", (32, 32), "red")
    own, other = (clip_exp.load(run_dir, accelerator="cpu", activation=name) for name in ("gelu", "quick_gelu"))
    assert (own.encode_image(image) - other.encode_image(image)).abs().max() > 1e-5
    with pytest.raises(ConfigError, match="activation=relu must be one of gelu, quick_gelu"):
        clip_exp.load(run_dir, activation="relu")


@pytest.mark.parametrize(
    ("source", "pretrained", "error", "message"),
    [
        ("vit_nanno", None, ConfigError, "did you mean 'vit_nano'"),
        ("vit_nano", None, ConfigError, r'load\("vit_nano", pretrained=FILE\)'),
        (
            "vit_nano",
            "openai",
            ConfigError,
            "pretrained=openai does not exist, and model=vit_nano has no published weights",
        ),
        ("ViT-B/33", None, ConfigError, "did you mean .ViT-B/32"),
        ("vit_b32", "opnai", ConfigError, "a tag of model=vit_b32: did you mean 'openai'"),
        ("open_clip", "openai", ConfigError, "open_clip stands for any architecture"),
        ("openai/clip", None, ConfigError, r'on the Hugging Face hub: load\("hf-hub:openai/clip"\)'),
        ("hf-hub:openai", None, ConfigError, "write hf-hub:org/name"),
        ("vit_b32", "openai/clip", ConfigError, "Give hf-hub:openai/clip if it is on the Hugging Face hub"),
        ("vit_b32", "", ConfigError, "pretrained has no value"),
        ("vit_b32", None, ConfigError, "one of these tags: openai, laion400m_e31"),
        ("vit_nanno", "w.pt", ConfigError, "unknown model 'vit_nanno': did you mean 'vit_nano'"),
        ("lonely.safetensors", None, ConfigError, "the model of these weights is unknown"),
        ("vit_tiny", "lonely.safetensors", CheckpointError, "does not fit the model"),
    ],
)
def test_invalid_sources_are_reported_with_valid_ones(
    tmp_path: Path, nano: CLIP, monkeypatch, source: str, pretrained: str | None, error: type, message: str
):
    save_file(nano.state_dict(), tmp_path / "lonely.safetensors")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=message):
        clip_exp.load(source, pretrained)


def test_preparing_an_evaluation_imports_no_torch():
    code = "import clip_exp.evaluation.launch, sys; print([m for m in ('torch', 'open_clip') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_images_and_paths_give_the_same_features(run_dir: Path, tmp_path: Path):
    clip = clip_exp.load(run_dir, accelerator="cpu")
    paths = [write_image(tmp_path / f"{i}.png", i) for i in range(3)]
    from_paths = clip.encode_image(paths)
    torch.testing.assert_close(clip.encode_image([Image.open(path) for path in paths]), from_paths, atol=0, rtol=0)
    torch.testing.assert_close(clip.encode_image(Path(paths[1])), from_paths[1:2])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model=vit_b23"], "did you mean 'vit_b32'"),
        (["optimzer=sgd"], "did you mean 'optimizer'"),
        (["data.trian=x"], "did you mean 'data.train'"),
        (["+nothing=1"], "nothing does not exist"),
        (["optimizer=3"], "optimizer=3 does not exist"),
        (["model"], "write key=value"),
        (["seed=1,2", "-m"], "sweeps are supported on the command line only"),
        (["--help"], "flags are supported on the command line only"),
        (["global_batch_size=0", "seed=-1"], r"(?s)seed=-1 must be.*global_batch_size=0 must be"),
        (
            ["max_steps=5", "epochs=3", "data=csv", "data.train=absent (1).csv"],
            r"(?s)max_steps=5 and epochs=3.*absent \(1\)\.csv",
        ),
    ],
)
def test_train_refuses_what_the_command_line_refuses(overrides: list[str], message: str, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=message):
        clip_exp.train(*overrides)
    assert list(tmp_path.iterdir()) == []


def test_evaluate_gives_the_results_that_it_writes(run_dir: Path, tmp_path: Path):
    for number in range(4):
        write_image(tmp_path / "classes" / "ab"[number % 2] / f"{number}.png", number)
    arguments = [
        f"run={run_dir}", "task=image_folder", f"task.image_folder.root={tmp_path}/classes", f"output_dir={tmp_path}/out",
        "task.image_folder.templates=[a photo of a {}.]", "accelerator=cpu", "num_workers=0",
    ]  # fmt: skip
    results = clip_exp.evaluate(*arguments)
    written = json.loads((run_dir / "eval" / "image_folder.json").read_text())
    assert results["image_folder"]["metrics"] == written["metrics"]
    assert written["protocol"]["templates"] == 1
    with pytest.raises(ConfigError, match="devices=2: several processes are supported on the command line only"):
        clip_exp.evaluate(*arguments, "devices=2")
    with pytest.raises(ConfigError, match="not found"):
        clip_exp.evaluate("run=absent", "task=digits")


def test_train_trains_as_the_command_line_and_leaves_the_process_as_it_was(tmp_path: Path, train: Train):
    before = sys.argv.copy(), signal.getsignal(signal.SIGTERM)
    arguments = [*(word for word in TINY if word != "resume=never"), "max_steps=2", "log_every_n_steps=1"]
    run = clip_exp.train(*arguments, f"output_dir={tmp_path}")
    assert (sys.argv, signal.getsignal(signal.SIGTERM)) == before
    assert Finished(run, "").losses == pytest.approx(train(*arguments).losses, rel=1e-4)
    assert clip_exp.train(*arguments, f"output_dir={tmp_path}") == run
    assert clip_exp.train(*arguments, f"output_dir={tmp_path}", "task=digits") == run
    assert (run / "eval" / "digits.json").is_file()
    assert clip_exp.load(run, accelerator="cpu").encode_text("a dog").shape == (1, 64)


def test_a_failed_run_raises_what_its_exit_code_means(tmp_path: Path):
    write_image(tmp_path / "0.png", 0)
    (tmp_path / "pairs.csv").write_text("filepath,title\n0.png,a\nabsent.png,b\n")
    arguments = [
        "model=vit_nano", "data=csv", f"data.train={tmp_path}/pairs.csv", "data.on_bad_image=error", "global_batch_size=2",
        "max_steps=2", "trainer.accelerator=cpu", "data.num_workers=0", f"output_dir={tmp_path}/out",
    ]  # fmt: skip
    for more in ([], ["strategy=ddp", "trainer.devices=2"]):
        with pytest.raises(DataError, match=r"absent\.png.*cannot be read"):
            clip_exp.train(*arguments, *more)
