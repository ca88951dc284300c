"""The same images and captions in every layout that data sets come in."""

import base64
import json
import tarfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

IMAGES = 12


def captions_of(number: int) -> list[str]:
    """Return the captions of an image: one, two or three."""
    return [f"scene {number} seen for the {time} time" for time in ("first", "second", "third")[: number % 3 + 1]]


def content_of(number: int) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    stream = BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def write_images(folder: Path) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"{number:04d}.png" for number in range(IMAGES)]
    for number, name in enumerate(names):
        (folder / name).write_bytes(content_of(number))
    return names


Written = tuple[Path, dict[str, str]]  # what `data.train` names, and the other keys of `data`
LAYOUTS: dict[str, Callable[[Path], Written]] = {}


def layout(write: Callable[[Path], Written]) -> Callable[[Path], Written]:
    LAYOUTS[write.__name__] = write
    return write


@layout
def csv(folder: Path) -> Written:
    """A row per caption, which all other layouts are compared with."""
    names = write_images(folder)
    rows = [f'{name},"{caption}"' for number, name in enumerate(names) for caption in captions_of(number)]
    (folder / "pairs.csv").write_text("\n".join(["filepath,title", *rows]))
    return folder / "pairs.csv", {}


@layout
def without_header(folder: Path) -> Written:
    names = write_images(folder)
    rows = [f"{number}|{name}|{caption}" for number, name in enumerate(names) for caption in captions_of(number)]
    (folder / "pairs.txt").write_text("\n".join(rows))
    return folder / "pairs.txt", {"header": "[id,filepath,title]"}


@layout
def token_file(folder: Path) -> Written:
    names = write_images(folder / "images")
    rows = [f"{name}#{i}\t{text}" for number, name in enumerate(names) for i, text in enumerate(captions_of(number))]
    (folder / "results.token").write_text("\n".join(rows))
    return folder / "results.token", {"image_root": str(folder / "images")}


@layout
def json_lines(folder: Path) -> Written:
    rows = [json.dumps({"filepath": name, "title": captions_of(n)}) for n, name in enumerate(write_images(folder))]
    (folder / "pairs.jsonl").write_text("\n".join(rows))
    return folder / "pairs.jsonl", {}


@layout
def json_array(folder: Path) -> Written:
    rows = [{"filepath": name, "title": captions_of(number)} for number, name in enumerate(write_images(folder))]
    (folder / "pairs.json").write_text(json.dumps(rows, indent=1))
    return folder / "pairs.json", {}


@layout
def captions_by_path(folder: Path) -> Written:
    captions = {name: captions_of(number) for number, name in enumerate(write_images(folder))}
    (folder / "captions.json").write_text(json.dumps(captions))
    return folder / "captions.json", {}


@layout
def coco(folder: Path) -> Written:
    images = [{"id": 7 * n, "file_name": name, "width": 32} for n, name in enumerate(write_images(folder / "train"))]
    captions = [{"image_id": 7 * n, "caption": text} for n in reversed(range(IMAGES)) for text in captions_of(n)]
    (folder / "captions.json").write_text(json.dumps({"info": {}, "images": images, "annotations": captions}))
    return folder / "captions.json", {"image_root": str(folder / "train")}


@layout
def karpathy(folder: Path) -> Written:
    images = [
        {"filepath": "val2014", "filename": name, "split": "train", "sentences": [{"raw": t} for t in captions_of(n)]}
        for n, name in enumerate(write_images(folder / "val2014"))
    ]
    images.append({"filepath": "val2014", "filename": "x.png", "split": "test", "sentences": [{"raw": "a test"}]})
    (folder / "dataset_coco.json").write_text(json.dumps({"images": images, "dataset": "coco"}))
    return folder / "dataset_coco.json", {"filter": "split = 'train'"}


@layout
def files_of_one_name(folder: Path) -> Written:
    for number, name in enumerate(write_images(folder)):
        (folder / name).with_suffix(".json").write_text(json.dumps({"title": captions_of(number)}))
    return folder, {}


@layout
def text_files(folder: Path) -> Written:
    for number, name in enumerate(write_images(folder / "a" / "b")):
        (folder / "a" / "b" / name).with_suffix(".txt").write_text("\n".join(captions_of(number)) + "\n")
    return folder, {"caption_lines": "true"}


@layout
def imagefolder(folder: Path) -> Written:
    names = write_images(folder)
    rows = [json.dumps({"file_name": name, "text": captions_of(number)}) for number, name in enumerate(names)]
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    return folder, {}


@layout
def shards(folder: Path) -> Written:
    folder.mkdir(parents=True)
    with tarfile.open(folder / "00000.tar", "w") as tar:
        for number in range(IMAGES):
            record = json.dumps({"captions": captions_of(number)}).encode()
            for name, content in ((f"{number:09d}.png", content_of(number)), (f"{number:09d}.json", record)):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, BytesIO(content))
    (folder / "00000_stats.json").write_text("{}")
    return folder, {"caption_key": "captions"}


def _columns() -> dict[str, list[object]]:
    images = [{"bytes": content_of(number), "path": f"{number}.png"} for number in range(IMAGES)]
    return {"image": images, "caption": [captions_of(number) for number in range(IMAGES)]}


@layout
def parquet(folder: Path) -> Written:
    folder.mkdir(parents=True)
    pq.write_table(pa.table(_columns()), folder / "train-00000-of-00001.parquet", row_group_size=5)
    return folder, {}


@layout
def binary_parquet(folder: Path) -> Written:
    folder.mkdir(parents=True)
    columns = {"jpg": [content_of(number) for number in range(IMAGES)], "caption": _columns()["caption"]}
    pq.write_table(pa.table(columns), folder / "00000.parquet")
    return folder / "00000.parquet", {}


@layout
def saved_to_disk(folder: Path) -> Written:
    folder.mkdir(parents=True)
    table = pa.table(_columns())
    names = [f"data-0000{i}-of-00002.arrow" for i in (0, 1)]
    for name, part in zip(names, (table.slice(0, 7), table.slice(7)), strict=True):
        with pa.OSFile(str(folder / name), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(part, max_chunksize=4)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    (folder / "dataset_info.json").write_text("{}")
    return folder, {}


@layout
def compressed_arrow(folder: Path) -> Written:
    folder.mkdir(parents=True)
    table, options = pa.table(_columns()), pa.ipc.IpcWriteOptions(compression="zstd")
    with pa.OSFile(str(folder / "x.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema, options=options) as file:
        file.write_table(table)
    return folder / "x.arrow", {}


@layout
def chinese_clip(folder: Path) -> Written:
    folder.mkdir(parents=True)
    images = [f"{n + 100}\t{base64.urlsafe_b64encode(content_of(n)).decode().rstrip('=')}" for n in range(IMAGES)]
    texts = [
        json.dumps({"text_id": 10 * n + i, "text": text, "image_ids": [n + 100]})
        for n in range(IMAGES)
        for i, text in enumerate(captions_of(n))
    ]
    (folder / "train_imgs.tsv").write_text("\n".join(images))
    (folder / "train_texts.jsonl").write_text("\n".join(texts))
    return folder / "train_imgs.tsv", {"format": "chinese_clip"}


@layout
def caption_columns(folder: Path) -> Written:
    names = write_images(folder)
    rows = [",".join([name, *[*captions_of(n), "", ""][:3]]) for n, name in enumerate(names)]
    (folder / "pairs.csv").write_text("\n".join(["filepath,a,b,c", *rows]))
    return folder / "pairs.csv", {"caption_key": "[a,b,c]"}


@layout
def written_lists(folder: Path) -> Written:
    rows = [f'{name},"{captions_of(number)}"' for number, name in enumerate(write_images(folder))]
    (folder / "pairs.csv").write_text("\n".join(["filepath,title", *rows]))
    return folder / "pairs.csv", {"caption_list": "true"}
