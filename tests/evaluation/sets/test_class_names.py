import subprocess
import sys
from pathlib import Path

import pytest

from clip_exp.errors import ConfigError
from clip_exp.evaluation.sets.class_names import class_prompts, imagenet_classes, templates


def test_the_published_prompts_equal_open_clips_for_every_class():
    open_clip = pytest.importorskip("open_clip")
    names = [name for _, name in imagenet_classes()]
    assert names == list(open_clip.IMAGENET_CLASSNAMES)
    for source, theirs in (
        ("openai", open_clip.OPENAI_IMAGENET_TEMPLATES),
        ("simple", open_clip.SIMPLE_IMAGENET_TEMPLATES),
    ):
        assert [class_prompts(name, templates(source)) for name in names] == [
            [t(name) for t in theirs] for name in names
        ]


def test_imagenet_keeps_classes_that_share_a_name_apart():
    classes = imagenet_classes()
    wnids = [wnid for wnid, _ in classes]
    assert len(classes) == len(set(wnids)) == 1000
    assert wnids == sorted(wnids)
    assert dict(classes)["n01440764"] == "tench"
    assert [index for index, (_, name) in enumerate(classes) if name == "missile"] == [657, 744]
    assert [index for index, (_, name) in enumerate(classes) if name == "sunglasses"] == [836, 837]


def test_the_published_lists_are_read_without_torch_or_open_clip():
    code = (
        "import sys; from clip_exp.evaluation.sets.class_names import imagenet_classes, templates;"
        "imagenet_classes(); templates('openai');"
        "print([name for name in ('torch', 'open_clip', 'timm') if name in sys.modules])"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


def test_braces_of_names_and_templates_survive():
    assert class_prompts("a {0} set", ["math: {x} {}."]) == ["math: {x} a {0} set."]


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("t.txt", "a photo of a {}.\n\n一张{}的照片\n"),
        ("t.yaml", "- a photo of a {}.\n- 一张{}的照片\n"),
        ("t.json", '["a photo of a {}.", "一张{}的照片"]'),
    ],
)
def test_a_file_holds_templates_as_lines_or_as_a_list(tmp_path: Path, file: str, content: str):
    (tmp_path / file).write_text(content, encoding="utf-8")
    assert templates(str(tmp_path / file)) == ["a photo of a {}.", "一张{}的照片"]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (["a photo."], "has no {}"),
        ([], "has no texts"),
        ("opanai", "no such file. Use openai, simple"),
        ([["{}"]], "entry 1 is a list, not a text"),
    ],
)
def test_templates_that_cannot_work_are_refused(source, message):
    with pytest.raises(ConfigError, match=message):
        templates(source)
