"""Tests of `pretrained`: a path, a name on the hub or a tag, in this order, and how it completes the model's configuration."""

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file

from clip_exp.config.base import plain
from clip_exp.config.model import Activation, Interpolation, ModelConfig, ResizeMode
from clip_exp.config.names import named_model
from clip_exp.errors import CheckpointError, ConfigError
from clip_exp.loading import source_of_run
from clip_exp.models.clip import CLIP
from clip_exp.open_clip_files import Entry
from clip_exp.weights.find import check_pretrained, find_weights, hash_weights
from clip_exp.weights.inspect import resolve_model
from clip_exp.weights.names import to_open_clip
from tests.small_runs import write_checkpoint, write_run
from tests.weights.server import Served, serving
from tests.weights.test_hub import publish

LISTED = Entry(
    model="ViT-N",
    tag="tiny",
    url=None,
    hub=None,
    hub_file=None,
    sha256=None,
    quick_gelu=True,
    mean=[0.5, 0.5, 0.5],
    std=[0.25, 0.25, 0.25],
    interpolation=Interpolation.bilinear,
    resize_mode=ResizeMode.squash,
)


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Run a server of files and of the hub, with caches in `tmp_path`."""
    with serving() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("CLIP_EXP_CACHE", str(tmp_path / "files"))
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        server.files["/"] = Served(b"")
        yield server


@pytest.fixture
def model() -> ModelConfig:
    return named_model("vit_nano").model_copy(update={"open_clip_name": "ViT-N"})


def look_up(entry: Entry):
    return lambda name, tag: entry if (name, tag) == ("ViT-N", "tiny") else None


def torch_bytes(state: dict[str, torch.Tensor], tmp_path: Path) -> bytes:
    torch.save(state, tmp_path / "made.pt")
    return (tmp_path / "made.pt").read_bytes()


def test_a_tag_is_downloaded_from_its_url_and_the_registry_resolves_the_model(
    server, model, nano: CLIP, tmp_path, capsys
):
    content = torch_bytes(to_open_clip(nano.state_dict(), model), tmp_path)
    server.files["/w.pt"] = Served(content)
    entry = replace(LISTED, url=f"{server.url}/w.pt", sha256=hashlib.sha256(content).hexdigest()[:8])
    found = find_weights("tiny", model, look_up(entry))
    assert found.path == tmp_path / "files" / "w.pt"
    resolved = resolve_model(model, found)
    assert resolved.activation is Activation.quick_gelu
    assert (resolved.image.mean, resolved.image.std) == (LISTED.mean, LISTED.std)
    assert (resolved.image.interpolation, resolved.image.resize_mode) == (Interpolation.bilinear, ResizeMode.squash)
    assert (
        "model.activation=quick_gelu: the activation of the weights tiny of open_clip's ViT-N"
        in capsys.readouterr().err
    )
    assert find_weights("tiny", model, look_up(entry)).path == found.path
    assert len(server.gets("/w.pt")) == 1
    with pytest.raises(CheckpointError, match="instead of 00000000"):
        find_weights("tiny", model, look_up(replace(entry, sha256="00000000")))


def test_the_hub_is_preferred_and_the_url_is_used_if_the_hub_fails(server, model, nano: CLIP, tmp_path):
    save_file(to_open_clip(nano.state_dict(), model), tmp_path / "made.safetensors")
    content = torch_bytes(to_open_clip(nano.state_dict(), model), tmp_path)
    server.files["/w.pt"] = Served(content)
    entry = replace(LISTED, url=f"{server.url}/w.pt", sha256=hashlib.sha256(content).hexdigest(), hub="org/tiny")
    publish(server, {"open_clip_model.safetensors": (tmp_path / "made.safetensors").read_bytes()}, name="org/tiny")
    found = find_weights("tiny", model, look_up(entry))
    assert found.path.is_relative_to(tmp_path / "hub")
    assert resolve_model(model, found).activation is Activation.quick_gelu
    assert server.gets("/w.pt") == []
    assert find_weights("tiny", model, look_up(replace(entry, hub="org/gone"))).path == tmp_path / "files" / "w.pt"
    with pytest.raises(CheckpointError, match="org/gone cannot be downloaded"):
        find_weights("tiny", model, look_up(replace(entry, hub="org/gone", url=None)))


def test_offline_a_tag_needs_a_cached_file_and_the_error_names_its_path(
    server, model, nano: CLIP, tmp_path, monkeypatch
):
    content = torch_bytes(to_open_clip(nano.state_dict(), model), tmp_path)
    entry = replace(LISTED, url=f"{server.url}/w.pt", sha256=hashlib.sha256(content).hexdigest(), hub="org/tiny")
    monkeypatch.setenv("CLIP_EXP_OFFLINE", "1")
    with pytest.raises(CheckpointError) as caught:
        find_weights("tiny", model, look_up(entry))
    assert f"{tmp_path}/files/w.pt not found" in str(caught.value)
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "w.pt").write_bytes(content)
    assert find_weights("tiny", model, look_up(entry)).path == tmp_path / "files" / "w.pt"
    assert server.requests == []


def test_a_name_on_the_hub_includes_its_model(server, model, nano: CLIP, tmp_path):
    save_file(nano.state_dict(), tmp_path / "made.safetensors", {"clip_exp.model": json.dumps(plain(model))})
    publish(server, {"model.safetensors": (tmp_path / "made.safetensors").read_bytes()})
    found = find_weights("hf-hub:org/clip", None)
    assert found.about.model == model
    assert found.description == "hf-hub:org/clip"
    assert load_file(found.path / "model.safetensors").keys() == nano.state_dict().keys()


def test_runs_and_checkpoints_are_the_weights_in_them(run_dir: Path, nano: CLIP, tmp_path):
    write_checkpoint(run_dir, nano, 2)
    last = run_dir / "checkpoints" / "step-000002"
    assert find_weights(str(run_dir), None).path == last / "model.safetensors"
    assert find_weights(str(run_dir / "checkpoints" / "step-000001"), None).path.parent.name == "step-000001"
    monitored = write_run(tmp_path / "monitored", nano, monitor="val/loss")
    write_checkpoint(monitored, nano, 2, best=True)
    write_checkpoint(monitored, nano, 3)
    assert find_weights(str(monitored), None).path.parent.name == "step-000002"
    (last / "model.safetensors").write_bytes(b"changed")
    with pytest.raises(CheckpointError, match="damaged"):
        find_weights(str(last), None)


def test_a_path_comes_before_a_tag_unless_it_holds_no_weights(server, model, nano: CLIP, tmp_path, monkeypatch):
    content = torch_bytes(to_open_clip(nano.state_dict(), model), tmp_path)
    server.files["/w.pt"] = Served(content)
    entry = replace(LISTED, url=f"{server.url}/w.pt", sha256=hashlib.sha256(content).hexdigest())
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").mkdir()
    assert find_weights("tiny", model, look_up(entry)).path.name == "w.pt"
    shutil.copy(tmp_path / "made.pt", tmp_path / "tiny" / "pytorch_model.bin")
    assert find_weights("tiny", model, look_up(entry)).path == Path("tiny")


PROBLEMS = {
    "a typo of a tag": ("opnai", "vit_b32", "a tag of model=vit_b32: did you mean 'openai'?"),
    "no weights published": ("openai", "vit_nano", "model=vit_nano has no published weights"),
    "a file that is missing": ("absent.pt", "vit_b32", "absent.pt does not exist (current folder: "),
    "a folder that is missing": ("absent/train", "vit_b32", "absent/train does not exist"),
    "a tag of another model": (
        "dfn2b_s39b",
        "vit_b32",
        "model=vit_l14 has this tag; the tags of model=vit_b32 are openai, ",
    ),
    "an address": ("https://a.org/w.pt", "vit_b32", "URLs are not supported. Give hf-hub:org/name, or download"),
    "a page of the hub": ("https://huggingface.co/org/clip", "vit_b32", "(pretrained=hf-hub:org/clip)"),
    "a name that no file can have": ("a" * 300 + ".pt", "vit_b32", "does not exist"),
    "a user's who does not exist": ("~nobody-here/w.pt", "vit_b32", "~nobody-here/w.pt does not exist"),
    "half a name on the hub": ("hf-hub:laion", "vit_b32", "write hf-hub:org/name"),
}


@pytest.mark.parametrize(("pretrained", "name", "message"), PROBLEMS.values(), ids=PROBLEMS.keys())
def test_unknown_weights_are_reported_before_anything_is_downloaded(pretrained: str, name: str, message: str) -> None:
    model = named_model(name)
    problems = check_pretrained(pretrained, model)
    assert len(problems) == 1
    assert message in problems[0]
    with pytest.raises(ConfigError) as caught:
        find_weights(pretrained, model)
    assert str(caught.value) == problems[0]


def test_a_wrong_activation_is_reported_before_a_tag_is_downloaded() -> None:
    model = named_model("vit_b32").model_copy(update={"activation": Activation.gelu})
    (problem,) = check_pretrained("openai", model)
    assert (
        "model.activation=gelu, but openai of open_clip's ViT-B-32 was trained with quick_gelu: leave it out" in problem
    )
    assert check_pretrained("laion2b_s34b_b79k", model) == []


def test_a_folder_of_runs_lists_them(run_dir: Path, tmp_path: Path) -> None:
    parent = tmp_path / "outputs"
    for stamp in ("2026-01-01_00-00-00", "2026-01-02_00-00-00"):
        shutil.copytree(run_dir, parent / "name" / stamp)
        (parent / "name" / stamp / "run.json").write_text("{}")
    for folder in (parent, parent / "name"):
        with pytest.raises(
            CheckpointError, match=r"contains runs.*newest first: \S+01-02_00-00-00, \S+01-01_00-00-00\.$"
        ):
            find_weights(str(folder), None)
        with pytest.raises(CheckpointError, match="contains runs"):
            source_of_run(folder)


def test_existing_weights_cause_no_error(run_dir: Path) -> None:
    model = named_model("vit_b32")
    assert not [p for p in ("openai", "hf-hub:org/name", str(run_dir)) if check_pretrained(p, model)]


def test_a_file_that_was_cut_short_before_its_checksum_is_known_must_be_deleted(model, tmp_path, monkeypatch) -> None:
    """For a tag without a checksum, an existing file is not downloaded again."""
    monkeypatch.setenv("CLIP_EXP_CACHE", str(tmp_path))
    (tmp_path / "w.pt").write_bytes(b"PK\x03\x04 cut short")
    with pytest.raises(CheckpointError, match=r"w\.pt is truncated.* Delete .*w\.pt first"):
        find_weights("tiny", model, look_up(replace(LISTED, url="https://localhost/w.pt")))


def test_the_hash_of_a_folder_is_that_of_its_weights_and_changes_with_any_part(tmp_path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    assert hash_weights(tmp_path) == hashlib.sha256(b"weights").hexdigest()
    (tmp_path / "model.safetensors").unlink()
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    hashes = set()
    for one, two in ((b"1", b"2"), (b"1", b"3"), (b"3", b"1")):
        (tmp_path / "model-1.safetensors").write_bytes(one)
        (tmp_path / "model-2.safetensors").write_bytes(two)
        hashes.add(hash_weights(tmp_path))
    assert len(hashes) == 3
