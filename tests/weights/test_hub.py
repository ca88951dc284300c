"""Tests of the hub, with a local server that implements the necessary requests."""

import hashlib
import json
import resource
import threading

import huggingface_hub.constants
import pytest

from clip_exp.errors import CheckpointError, ConfigError
from clip_exp.weights import download
from clip_exp.weights.download import fetch_repository, is_hub_name
from tests.weights.server import Served, Server, serving

COMMIT = "a" * 40
NAME = "org/clip"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with serving() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        server.files["/"] = Served(b"")
        yield server


def publish(hub: Server, files: dict[str, bytes], large: tuple[str, ...] = (), name: str = NAME) -> None:
    """Publish a repository on the hub.

    Args:
        large: files in its large file storage, named by their hash.
    """
    listed = {"id": name, "sha": COMMIT, "siblings": [{"rfilename": file} for file in files]}
    for path in (f"/api/models/{name}", f"/api/models/{name}/revision/main", f"/api/models/{name}/revision/v2"):
        hub.files[path] = Served(json.dumps(listed).encode(), headers={"Content-Type": "application/json"})
    for file, content in files.items():
        hash_of = hashlib.sha256 if file in large else hashlib.sha1
        about = {"X-Repo-Commit": COMMIT}
        for revision in ("main", "v2", COMMIT):
            hub.files[f"/{name}/resolve/{revision}/{file}"] = Served(
                content, etag=f'"{hash_of(content).hexdigest()}"', headers=about
            )


def fetched(hub: Server) -> list[str]:
    """Return the downloaded files in order."""
    return [
        request.path.rpartition("/")[2]
        for request in hub.requests
        if request.method == "GET" and "/resolve/" in request.path
    ]


def test_safetensors_are_preferred_and_the_configuration_is_in_the_same_folder(hub) -> None:
    files = {name: name.encode() for name in ("open_clip_config.json", "open_clip_model.safetensors", "open_clip_pytorch_model.bin", "README.md")}  # fmt: skip
    publish(hub, files, large=("open_clip_model.safetensors",))
    folder = fetch_repository(NAME)
    assert sorted(path.name for path in folder.iterdir()) == ["open_clip_config.json", "open_clip_model.safetensors"]
    assert (folder / "open_clip_model.safetensors").read_bytes() == b"open_clip_model.safetensors"
    assert fetch_repository(NAME) == folder
    assert len(fetched(hub)) == 2, "what is kept is not fetched again"


def test_a_repository_of_transformers_in_parts_comes_with_all_of_them(hub) -> None:
    index = json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}).encode()
    files = {"config.json": b"{}", "preprocessor_config.json": b"{}", "model.safetensors.index.json": index}
    publish(hub, files | {"model-1.safetensors": b"1", "model-2.safetensors": b"2", "pytorch_model.bin": b"old"})
    folder = fetch_repository(f"{NAME}@v2")
    assert {path.name for path in folder.iterdir()} == {*files, "model-1.safetensors", "model-2.safetensors"}


def test_the_tokenizer_and_the_processor_come_along(hub) -> None:
    names = ["config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"]
    publish(hub, dict.fromkeys([*names, "modeling.py", "tokenizer.py"], b"{}"))
    assert sorted(path.name for path in fetch_repository(NAME).iterdir()) == sorted(names)


def test_a_named_file_is_taken_as_safetensors_where_there_are_any(hub) -> None:
    publish(hub, {"pytorch_model.bin": b"old", "pytorch_model.safetensors": b"new"})
    assert fetch_repository(NAME, "pytorch_model.bin").read_bytes() == b"new"
    publish(hub, {"pytorch_model.bin": b"old"}, name="org/other")
    assert fetch_repository("org/other", "pytorch_model.bin").read_bytes() == b"old"


def test_offline_or_when_the_hub_is_gone_what_is_on_disk_is_used(hub, monkeypatch, caplog) -> None:
    publish(hub, {"model.safetensors": b"1", "config.json": b"{}"})
    with monkeypatch.context() as patch:
        patch.setenv("CLIP_EXP_OFFLINE", "1")
        with pytest.raises(CheckpointError, match=r"hf-hub:org/clip is not in the local cache.*pretrained=DIR"):
            fetch_repository(NAME)
        assert hub.requests == []
    folder = fetch_repository(NAME)
    count = len(hub.requests)
    with monkeypatch.context() as patch:
        patch.setenv("CLIP_EXP_OFFLINE", "1")
        assert fetch_repository(NAME) == folder
    assert fetch_repository(NAME, prefer_cached=True) == folder
    assert len(hub.requests) == count
    with serving() as other:
        gone = other.url
    monkeypatch.setenv("HF_ENDPOINT", gone)
    assert fetch_repository(NAME) == folder
    assert "cannot be downloaded" in caplog.text
    with pytest.raises(CheckpointError, match="cannot be downloaded"):
        fetch_repository("org/never-seen")


def test_a_large_file_comes_whole_over_a_connection_that_breaks(hub) -> None:
    content = bytes(range(256)) * 2000
    publish(hub, {"model.safetensors": content}, large=("model.safetensors",))
    path = f"/{NAME}/resolve/main/model.safetensors"
    hub.files[path].cut = [300_000]
    assert (fetch_repository(NAME) / "model.safetensors").read_bytes() == content
    assert len(hub.gets(path)) == 2


def test_a_hub_that_is_down_or_silent_does_not_take_away_what_is_on_disk(hub, monkeypatch, caplog) -> None:
    publish(hub, {"model.safetensors": b"1", "config.json": b"{}"})
    folder = fetch_repository(NAME)
    api = f"/api/models/{NAME}"
    for answer in (Served(b"", statuses=[503] * 9), Served(b"", statuses=[429] * 9)):
        hub.files[api] = answer
        assert fetch_repository(NAME) == folder
    monkeypatch.setattr(download, "TIMEOUT_S", 0.1)
    hub.files[api] = Served(b"{}", hold=(hold := threading.Event()))
    assert fetch_repository(NAME) == folder
    hold.set()
    assert caplog.text.count("The cached copy is used instead") == 3
    hub.files[api] = Served(b"", statuses=[404] * 9, headers={"X-Error-Code": "RepoNotFound"})
    with pytest.raises(CheckpointError, match="repository not found"):
        fetch_repository(NAME)


@pytest.mark.parametrize(
    ("parts", "message"), [("../../x", "outside its folder"), (["x"], "has no valid `weight_map`"), ("a/b", "outside")]
)
def test_an_index_cannot_lead_out_of_its_repository(hub, parts, message) -> None:
    index = json.dumps({"weight_map": {"a": parts}}).encode()
    publish(hub, {"model.safetensors.index.json": index, "x": b"1"})
    with pytest.raises(CheckpointError, match=message):
        fetch_repository(NAME)
    assert fetched(hub) == ["model.safetensors.index.json"]


def test_damaged_large_files_are_refused_with_both_sums_and_removed(hub) -> None:
    publish(hub, {"model.safetensors": b"good", "config.json": b"{}"}, large=("model.safetensors",))
    for revision in ("main", COMMIT):
        hub.files[f"/{NAME}/resolve/{revision}/model.safetensors"].content = b"evil"
    with pytest.raises(CheckpointError) as caught:
        fetch_repository(NAME)
    for content in (b"good", b"evil"):
        assert hashlib.sha256(content).hexdigest() in str(caught.value)
    publish(hub, {"model.safetensors": b"good", "config.json": b"{}"}, large=("model.safetensors",))
    assert (fetch_repository(NAME) / "model.safetensors").read_bytes() == b"good"


def test_a_blob_that_repositories_share_is_checked_by_its_own_hash_and_removed_with_its_links(hub, tmp_path) -> None:
    """As in the hub's cache, `blobs/<sha256>` of a repository links to a file with another hash."""
    publish(hub, {"model.safetensors": b"good", "config.json": b"{}"}, large=("model.safetensors",))
    path = fetch_repository(NAME) / "model.safetensors"
    shared = tmp_path / "cache" / "blobs" / "bb" / ("b" * 64)
    shared.parent.mkdir(parents=True)
    blob = path.resolve().rename(shared)
    (path.parent / path.readlink()).symlink_to(blob)
    assert (fetch_repository(NAME) / "model.safetensors").read_bytes() == b"good"
    shared.write_bytes(b"evil")
    with pytest.raises(CheckpointError, match=f"{hashlib.sha256(b'evil').hexdigest()} instead of"):
        fetch_repository(NAME)
    assert not shared.exists()
    assert (fetch_repository(NAME) / "model.safetensors").read_bytes() == b"good"


@pytest.mark.parametrize(
    ("code", "status", "message"),
    [
        ("RepoNotFound", 401, "repository not found, or it is private"),
        ("GatedRepo", 403, "is a gated repository: accept its conditions"),
        ("RevisionNotFound", 404, "revision not found"),
    ],
)
def test_what_the_hub_refuses_is_one_sentence(hub, code: str, status: int, message: str) -> None:
    publish(hub, {"model.safetensors": b"1"})
    hub.files[f"/api/models/{NAME}"] = Served(b"", statuses=[status] * 9, headers={"X-Error-Code": code})
    with pytest.raises(CheckpointError, match=message) as caught:
        fetch_repository(NAME)
    assert len(str(caught.value).splitlines()) == 1


def test_a_cache_that_cannot_be_written_is_named(hub, tmp_path, monkeypatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "file" / "hub"))
    for large in ((), ("model.safetensors",)):
        publish(hub, {"model.safetensors": b"1"}, large=large)
        with pytest.raises(CheckpointError, match=r"/file/hub.* cannot be written: .* HF_HOME\)? to another folder"):
            fetch_repository(NAME)


def test_a_full_disk_is_reported_as_a_local_error(hub, tmp_path) -> None:
    content = bytes(500_000)
    publish(hub, {"model.safetensors": content}, large=("model.safetensors",))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, before[1]))
    try:
        with pytest.raises(CheckpointError, match=r"cannot be written: File too large\. Free space, or set HF_HOME"):
            fetch_repository(NAME)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (fetch_repository(NAME) / "model.safetensors").read_bytes() == content


def test_a_repository_without_weights_is_reported_with_its_files(hub) -> None:
    publish(hub, {"README.md": b"", "flax_model.msgpack": b""})
    with pytest.raises(
        CheckpointError, match=r"one of open_clip_model\.safetensors.* has README\.md, flax_model\.msgpack"
    ):
        fetch_repository(NAME)


def test_names_are_org_and_name() -> None:
    assert all(map(is_hub_name, ("hf-hub:laion/CLIP-ViT-B-32", "hf-hub:a/b@v1.0", "hf-hub:a/b@refs/pr/1")))
    assert not any(map(is_hub_name, ("laion/CLIP", "hf-hub:laion", "hf-hub:a/b/c", "hf-hub:../b")))
    with pytest.raises(ConfigError, match="write hf-hub:org/name"):
        fetch_repository("laion")
