import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from clip_exp.config.commands import OutputFormat, PredictConfig, SearchConfig
from clip_exp.config.evaluation import EvalOnBadImage
from clip_exp.data.files import BadImage
from clip_exp.errors import DataError
from clip_exp.inference.commands import predict, search
from clip_exp.inference.index import read_entries
from clip_exp.inference.media import read_frame
from clip_exp.inference.pipeline import Pipeline

av = pytest.importorskip("av", reason="PyAV is not installed (pip install av)")
GREYS = (10, 70, 130, 190, 250)  # of the five seconds of a video
LIMIT = 10**9
CODECS = {"mts": "mpeg2video", "wmv": "wmv2", "flv": "flv1"}


def write_video(path: Path, levels: tuple[int, ...] = GREYS, codec: str = "mpeg4", rate: int = 10) -> Path:
    """Write a video with one second per gray level, whose left half is white."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.gop_size = 25  # frames between two that need no other: most are reached by decoding on from one
        for level in levels:
            pixels = np.full((48, 64, 3), level, dtype=np.uint8)
            pixels[:, :32] = 255
            for _ in range(rate):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return path


def right_half(image: Image.Image) -> float:
    return float(np.asarray(image)[:, 40:].mean())


@pytest.mark.parametrize("ending", ["mp4", "mkv", "avi", "mov", "wmv", "flv", "mts"])
def test_frames_are_the_middles_of_equal_parts(tmp_path: Path, ending: str):
    path = str(write_video(tmp_path / f"a.{ending}", codec=CODECS.get(ending, "mpeg4"), rate=25))
    found = [right_half(read_frame(path, number, 5, LIMIT)) for number in range(5)]
    assert found == pytest.approx(GREYS, abs=12)
    assert right_half(read_frame(path, 0, 1, LIMIT)) == pytest.approx(130, abs=12)
    assert read_frame(path, 0, 1, LIMIT).size == (64, 48)


def test_a_video_is_rotated_as_specified_in_its_file(tmp_path: Path):
    """Phones write rotated pixels, and a matrix in the header (ISO 14496-12, tkhd) for the rotation."""
    path = write_video(tmp_path / "a.mp4")
    data = bytearray(path.read_bytes())
    matrix = data.index((0x10000).to_bytes(4, "big") + bytes(12) + (0x10000).to_bytes(4, "big"), data.index(b"tkhd"))
    quarter = [0, 0x10000, 0, -0x10000, 0, 0, 0, 0, 0x40000000]  # a quarter clockwise
    data[matrix : matrix + 36] = b"".join(value.to_bytes(4, "big", signed=True) for value in quarter)
    path.write_bytes(data)
    image = read_frame(str(path), 0, 1, LIMIT)
    assert image.size == (48, 64)
    assert np.asarray(image)[:24].mean() > 240  # the white left half is on top
    assert np.asarray(image)[40:].mean() == pytest.approx(130, abs=12)


def test_a_stream_without_a_header_is_measured_by_its_packets(tmp_path: Path):
    path = str(write_video(tmp_path / "a.m4v", codec="mpeg4"))
    assert [right_half(read_frame(path, number, 5, LIMIT)) for number in range(5)] == pytest.approx(GREYS, abs=12)


def test_a_video_is_the_mean_of_its_frames(tmp_path: Path, clip: Pipeline):
    path = write_video(tmp_path / "a.mp4")
    for frames in (1, 3, 8):
        clip.frames = frames
        images = [read_frame(str(path), number, frames, LIMIT) for number in range(frames)]
        expected = F.normalize(clip.encode_image(images).mean(dim=0, keepdim=True), dim=-1)
        torch.testing.assert_close(clip.encode_image(path), expected, atol=1e-6, rtol=0)


def test_videos_and_images_can_be_mixed_in_any_order(tmp_path: Path, clip: Pipeline, photos: Path):
    videos = [write_video(tmp_path / f"{level}.mp4", (level,) * 2) for level in (0, 200)]
    items = [photos / "0.png", videos[0], Image.open(photos / "1.png"), videos[1]]
    expected = torch.cat([clip.encode_image(item) for item in items])
    torch.testing.assert_close(clip.encode_image(items), expected, atol=1e-6, rtol=0)
    assert [match.position for match in clip.rank("a dog", items)] == (
        (expected @ clip.encode_text("a dog")[0]).argsort(descending=True).tolist()
    )


def test_worker_processes_read_videos_too(tmp_path: Path, clip: Pipeline, photos: Path):
    write_video(photos / "a.mp4")
    paths = [*sorted(photos.glob("[0-9].png")), photos / "a.mp4"] * 3
    alone = clip.encode_image(paths)
    clip.options = replace(clip.options, num_workers=1)
    clip.batch_size = 8
    torch.testing.assert_close(clip.encode_image(paths), alone, atol=1e-6, rtol=0)


def test_the_commands_accept_videos_like_images(run_dir: Path, photos: Path, clip: Pipeline, capsys):
    video = write_video(photos / "clip.MP4")
    predict(
        PredictConfig(
            run=str(run_dir),
            images=str(photos),
            texts=["a", "b"],
            frames=4,
            format=OutputFormat.json,
            accelerator="cpu",
        )
    )
    document = json.loads(capsys.readouterr().out)
    clip.frames = 4
    expected = clip.classify(video, ["a", "b"])[0].tolist()
    found = {p["path"]: {t["text"]: t["probability"] for t in p["texts"]} for p in document["images"]}
    assert [found[str(video)][text] for text in ("a", "b")] == pytest.approx(expected, abs=1e-6)
    index = photos.parent / "photos.index"
    search(SearchConfig(index=str(index), run=str(run_dir), images=str(photos), frames=4, accelerator="cpu"))
    capsys.readouterr()
    search(SearchConfig(index=str(index), image=str(video), top_k=1, format=OutputFormat.json, accelerator="cpu"))
    best = json.loads(capsys.readouterr().out)["rankings"][0]["matches"][0]
    assert best == {"path": str(video), "score": pytest.approx(1.0, abs=1e-6)}


def test_an_extended_index_of_videos_equals_one_created_at_once(run_dir: Path, photos: Path, tmp_path: Path):
    write_video(photos / "a.mp4")
    values = {"run": str(run_dir), "accelerator": "cpu", "images": str(photos), "num_workers": 0}
    search(SearchConfig(index=str(tmp_path / "x.index"), **values))
    write_video(photos / "b.mp4", (200, 50))
    search(SearchConfig(index=str(tmp_path / "x.index"), **values))
    search(SearchConfig(index=str(tmp_path / "y.index"), **values))
    extended, at_once = read_entries(tmp_path / "x.index"), read_entries(tmp_path / "y.index")
    assert extended.paths == at_once.paths
    torch.testing.assert_close(extended.features, at_once.features, rtol=0, atol=1e-6)


def test_a_video_that_ends_early_is_encoded_from_its_readable_frames(tmp_path: Path, clip: Pipeline):
    path = write_video(tmp_path / "a.mkv")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert clip.encode_image(path).shape == (1, 64)


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"", "not a readable video"), (b"no video" * 100, "not a readable video"), (None, "no such file")],
)
def test_a_broken_video_is_reported_and_counted_once(
    tmp_path: Path, run_dir: Path, photos: Path, capsys, caplog, content: bytes | None, reason: str
):
    path = photos / "broken.mp4"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BadImage, match=reason):
        read_frame(str(path), 0, 1, LIMIT)
    if content is None:
        path.symlink_to(tmp_path / "absent")
    values = {"run": str(run_dir), "images": str(photos), "texts": ["a", "b"], "accelerator": "cpu"}
    with pytest.raises(DataError, match=rf"broken\.mp4: {reason}"):
        predict(PredictConfig(**values))
    predict(PredictConfig(**values, on_bad_image=EvalOnBadImage.skip, format=OutputFormat.json))
    document = json.loads(capsys.readouterr().out)
    assert (len(document["images"]), len(document["left_out"])) == (7, 1)
    assert "left out 1 of 8 images" in caplog.text


def test_files_with_only_sound_and_too_large_ones_are_reported(tmp_path: Path):
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 4410), dtype=np.float32), format="fltp", layout="mono")
        frame.sample_rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(BadImage, match="without images"):
        read_frame(str(path), 0, 1, LIMIT)
    with pytest.raises(BadImage, match="64 x 48 pixels, more than"):
        read_frame(str(write_video(tmp_path / "b.mp4")), 0, 1, 1000)


def test_a_path_is_never_opened_as_a_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    write_video(tmp_path / "concat:a.mp4")
    assert right_half(read_frame("concat:a.mp4", 0, 1, LIMIT)) == pytest.approx(130, abs=12)
    with pytest.raises(BadImage, match="no such file"):
        read_frame("http://127.0.0.1:9/a.mp4", 0, 1, LIMIT)


def test_without_the_decoder_the_message_says_how_to_install_it(
    tmp_path: Path, clip: Pipeline, monkeypatch: pytest.MonkeyPatch
):
    path = write_video(tmp_path / "a.mp4")
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(DataError, match=r"a\.mp4: a video, which needs PyAV: pip install av"):
        clip.encode_image(path)
