"""CIFAR-10 in the original files, in the layout of torchvision: `<root>/cifar-10-batches-py`, with images drawn here."""

import pickle
from pathlib import Path

import numpy as np

CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def write_cifar10(root: Path, count: int, seed: int = 0) -> None:
    """Write `count` test images and five batches of `count` training images; labels 0 to 9 in turn, noise as pixels."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    for name in ("test_batch", *(f"data_batch_{number}" for number in range(1, 6))):
        content = {
            "batch_label": name,
            "labels": [index % 10 for index in range(count)],
            "data": random.integers(0, 256, (count, 3072), dtype=np.uint8),
            "filenames": [f"{index}.png" for index in range(count)],
        }
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
    meta = {"num_cases_per_batch": count, "label_names": CLASSES, "num_vis": 3072}
    (folder / "batches.meta").write_bytes(pickle.dumps(meta, protocol=2))


def cifar10_pixels(root: Path, name: str = "test_batch") -> np.ndarray:
    """Return the pixels of a batch, uint8 [N, 32, 32, 3]."""
    content = pickle.loads((root / "cifar-10-batches-py" / name).read_bytes())
    return content["data"].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
