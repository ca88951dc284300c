"""Tests that the registry which is read without importing open_clip equals open_clip's."""

import subprocess
import sys

import open_clip
from open_clip import pretrained as theirs

from clip_exp import open_clip_files


def test_every_entry_is_open_clips_own() -> None:
    listed = open_clip.list_pretrained()
    assert len(listed) > 190
    for model, tag in listed:
        ours, values = open_clip_files.entry(model, tag), theirs.get_pretrained_cfg(model, tag)
        assert ours is not None
        assert (ours.url or "") == values["url"]
        assert "/".join((ours.hub or "", ours.hub_file or "")).strip("/") == values["hf_hub"].strip("/")
        assert ours.quick_gelu == values.get("quick_gelu", False)
        assert (tuple(ours.mean), tuple(ours.std)) == (values["mean"], values["std"])
        assert (ours.interpolation, ours.resize_mode) == (values["interpolation"], values["resize_mode"])
    assert {model: open_clip_files.tags(model) for model, _ in listed} == {
        model: open_clip.list_pretrained_tags_by_model(model) for model, _ in listed
    }
    assert open_clip_files.configurations() == sorted(open_clip.list_models())


def test_tags_are_spelled_as_open_clip_lets_them_be() -> None:
    assert (
        open_clip_files.entry("ViT-B-32", "laion2b-S34b-b79k")
        == open_clip_files.entry("ViT-B-32", "laion2b_s34b_b79k")
        is not None
    )
    assert open_clip_files.entry("ViT-B-32", "laion") is None
    assert open_clip_files.entry(None, "openai") is None
    assert open_clip_files.tags(None) == open_clip_files.tags("none") == []


def test_checksums_are_those_in_the_addresses() -> None:
    openai = open_clip_files.entry("ViT-B-32", "openai")
    released = open_clip_files.entry("ViT-B-32", "laion400m_e32")
    other = open_clip_files.entry("ViT-B-32", "metaclip_400m")
    assert openai is not None
    assert released is not None
    assert other is not None
    assert openai.sha256 == "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af"
    assert released.sha256 == "46683a32"
    assert other.sha256 is None


def test_reading_it_imports_neither_torch_nor_open_clip() -> None:
    code = (
        "import sys; from clip_exp import open_clip_files; import clip_exp.weights.find, clip_exp.weights.inspect\n"
        "assert open_clip_files.entry('ViT-B-32', 'openai')\n"
        "print([name for name in ('torch', 'open_clip', 'timm', 'transformers', 'huggingface_hub') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
