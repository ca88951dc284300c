import os
import pickle

import numpy as np
import pytest
from PIL import Image

from clip_exp.data.files import BadImage, ImageLimits
from clip_exp.data.image_sets import ImageFiles, TableImages
from clip_exp.data.tables.open import read_table
from tests.data.tables.shard_files import jpeg, write_shard

LIMIT = ImageLimits(1_000_000)


@pytest.fixture
def shard(tmp_path):
    contents = {}
    for i in range(4):
        contents |= {f"{i}.jpg": jpeg(i), f"{i}.txt": f"caption {i}"}
    return write_shard(tmp_path / "s.tar", contents)


def same(one: Image.Image, other: Image.Image) -> bool:
    return np.array_equal(np.asarray(one), np.asarray(other))


def test_images_of_a_shard_are_those_of_its_files(tmp_path, shard):
    images = pickle.loads(pickle.dumps(TableImages(read_table(shard), [2, 0])))
    assert [images.name(index) for index in range(len(images))] == [f"{shard}/2.jpg", f"{shard}/0.jpg"]
    (tmp_path / "2.jpg").write_bytes(jpeg(2))
    assert same(images.open(0, LIMIT), ImageFiles([tmp_path / "2.jpg"]).open(0, LIMIT))
    with pytest.raises(BadImage, match="too many pixels"):
        images.open(0, ImageLimits(100))


def test_images_of_a_table_may_lie_anywhere_where_that_is_allowed_and_are_known_as_before(pairs, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    table = tmp_path / "elsewhere" / "t.csv"
    table.write_text("filepath,title\n../00.png,x\n../01.jpg,y\n")
    images, files = (
        TableImages(read_table(table), [1, 0], outside_root=True),
        ImageFiles([tmp_path / "elsewhere/../01.jpg", tmp_path / "elsewhere/../00.png"]),
    )
    assert same(images.open(1, LIMIT), files.open(1, LIMIT))
    assert images.fingerprint() == files.fingerprint()
    with pytest.raises(BadImage, match="outside the data root"):
        TableImages(read_table(table), [1, 0]).open(1, LIMIT)


def test_no_byte_of_a_file_that_a_table_names_is_in_a_message(tmp_path):
    """Evaluation once printed the start of such a file, which could be `/etc/passwd`."""
    (tmp_path / "passwd").write_text("root:x:0:0:root:/root:/bin/bash\n")
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "t.csv").write_text(f"filepath,title\n../passwd,x\n{tmp_path / 'passwd'},y\n")
    images = TableImages(read_table(tmp_path / "t" / "t.csv"), [0, 1])
    for index, reason in enumerate(("outside the data root", "not an image")):
        with pytest.raises(BadImage, match=f"^{reason}") as caught:
            images.open(index, LIMIT)
        assert "root:x" not in str(caught.value)


@pytest.mark.parametrize("kept", ["in files", "in a shard"])
def test_the_fingerprint_changes_where_an_image_is_replaced_by_one_of_equal_size_and_time(kept, shard, tmp_path):
    """Some tools keep the modification time when they edit a file."""
    file = tmp_path / "0.jpg"
    file.write_bytes(jpeg(0))
    whole = shard if kept == "in a shard" else file
    images = TableImages(read_table(shard), [0, 1]) if kept == "in a shard" else ImageFiles([file])
    before, data, status = images.fingerprint(), whole.read_bytes(), whole.stat()
    assert images.fingerprint() == before
    place = data.index(jpeg(0)) + len(jpeg(0)) // 2
    whole.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
    os.utime(whole, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (whole.stat().st_size, whole.stat().st_mtime_ns) == (status.st_size, status.st_mtime_ns)
    assert images.fingerprint() != before


def test_the_fingerprint_changes_with_the_shard_and_with_the_choice(shard):
    table = read_table(shard)
    before = TableImages(table, [0, 1]).fingerprint()
    assert TableImages(read_table(shard), [0, 1]).fingerprint() == before
    assert TableImages(table, [1, 0]).fingerprint() != before
    os.utime(shard, ns=(1, 1))
    assert TableImages(table, [0, 1]).fingerprint() != before
