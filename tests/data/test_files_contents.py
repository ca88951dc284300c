import os
from pathlib import Path

from clip_exp.data import files
from clip_exp.data.files import Stored, equal_contents, image_signature, image_signatures


def places(folder: Path, contents: dict[str, bytes]) -> list[Stored]:
    for name, data in contents.items():
        (folder / name).write_bytes(data)
    return [Stored(str(folder / name)) for name in contents]


def test_the_sample_sees_the_start_the_middle_and_the_end(tmp_path):
    data = bytes(100_000)
    (place,) = places(tmp_path, {"a": data})
    found = {image_signature(place).sample}
    for at in (0, 4095, 50_000, 99_999):
        (tmp_path / "a").write_bytes(data[:at] + b"x" + data[at + 1 :])
        found.add(image_signature(place).sample)
    assert len(found) == 5
    assert all(0 <= sample < 1 << 63 for sample in found)
    for small in (b"", b"x", bytes(5000)):
        (tmp_path / "a").write_bytes(small)
        assert image_signature(place).size == len(small)


def test_what_cannot_be_read_has_a_signature_too_and_the_order_stays(tmp_path):
    several = places(tmp_path, {f"{i}": bytes(i) for i in range(600)})
    several[300] = Stored(str(tmp_path))
    several[301] = Stored("none\0")
    several[302] = Stored(str(tmp_path / "none"))
    found = image_signatures(several)
    assert [signature.size for signature in found] == [*range(300), -1, -1, -1, *range(303, 600)]
    assert found == [image_signature(place) for place in several]


def test_equal_bytes_are_found_and_nothing_else(tmp_path, monkeypatch):
    inside = bytes(50_000)
    far = inside[:10_000] + b"x" + inside[10_001:]  # where no sample looks
    several = places(tmp_path, {"a": b"one", "b": inside, "c": b"two", "d": far, "e": b"one", "f": inside, "g": b"one"})
    (tmp_path / "link").symlink_to("a")
    several += [Stored(str(tmp_path / "link")), Stored(str(tmp_path / "none")), Stored(str(tmp_path / "missing"))]
    several.append(Stored(*places(tmp_path, {"h": b"...two..."})[0][:1], 3, 3))
    assert image_signature(several[1]).sample == image_signature(several[3]).sample
    read: list[str] = []
    digest = files._digest
    monkeypatch.setattr(files, "_digest", lambda place: (read.append(os.path.basename(place.file)), digest(place))[1])
    assert equal_contents(several) == [[0, 4, 6, 7], [2, 10], [1, 5]]
    assert sorted(read) == ["a", "b", "c", "d", "e", "f", "g", "h", "link"]
    assert equal_contents(places(tmp_path, {"x": b"", "y": b"1"})) == []
