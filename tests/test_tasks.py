"""Data sets and tasks: splits that never change, files that are not what they seem, task bits."""

import gzip
import hashlib
import pickle  # noqa: TID251 - CIFAR's format
import struct
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pydantic import TypeAdapter
from scipy.io import savemat
from torch import Tensor

from rpgcli import rng
from rpgcli.errors import DataError, UsageError
from rpgcli.targets.torchvision_shim import import_torchvision
from rpgcli.tasks import (
    DATASETS,
    BinarySubsetConfig,
    Cifar10Config,
    Cifar100Config,
    Dataset,
    DatasetConfig,
    DigitsConfig,
    FashionMnistConfig,
    FolderConfig,
    Images,
    MultiClassConfig,
    Stl10Config,
    SvhnConfig,
    augment,
    bits_tensor,
    complement,
    find_datasets,
    parse_classes,
    parse_dataset,
    parse_task_bits,
    read_tasks,
    split_tasks,
)
from rpgcli.tasks.idx import read_idx

CLASSES = ("airplane", "automobile", "bird", "cat")


def digest(*tensors: Tensor) -> str:
    content = b"".join(tensor.contiguous().numpy().tobytes() for tensor in tensors)
    return hashlib.sha256(content).hexdigest()[:12]


def fingerprint(dataset: Dataset) -> str:
    return digest(*(t for s in (dataset.train, dataset.validation, dataset.test) for t in (s.pixels, s.labels)))


def random_images(n: int, num_classes: int, shape: tuple[int, ...], name: str) -> tuple[np.ndarray, np.ndarray]:
    pixels = torch.randint(256, (n, *shape), generator=rng.stream(0, name)).to(torch.uint8).numpy()
    return pixels, np.arange(n) % num_classes


# --- data sets -------------------------------------------------------------------------------------------------------


def test_digits_are_split_into_1257_180_360_disjoint_images_that_are_all_of_them():
    from sklearn.datasets import load_digits

    digits = DigitsConfig().load()
    parts = (digits.train, digits.validation, digits.test)
    assert [len(part) for part in parts] == [1257, 180, 360]
    assert (digits.num_classes, digits.channels, digits.size) == (10, 1, (8, 8))

    def rows(pixels: Tensor, labels: Tensor) -> list[tuple[int, ...]]:
        return sorted(tuple(row) for row in torch.cat([pixels.flatten(1).long(), labels[:, None]], 1).tolist())

    original = load_digits()
    together = rows(torch.cat([p.pixels for p in parts]), torch.cat([p.labels for p in parts]))
    assert together == rows(torch.from_numpy(original.images), torch.from_numpy(original.target))


def test_the_split_of_digits_never_changes():
    assert fingerprint(DigitsConfig().load()) == "c3c933c47e99"
    assert fingerprint(DigitsConfig(split_seed=1).load()) != fingerprint(DigitsConfig().load())


def test_digits_are_normalised_to_half_a_unit_around_zero():
    digits = DigitsConfig().load()
    x = digits.normalise(digits.train.pixels)
    assert x.dtype == torch.float32
    assert torch.equal(x, digits.train.pixels.float() / 16 - 0.5)


def test_other_data_sets_are_normalised_to_one_unit_around_zero():
    images = Images(torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1), torch.tensor([0, 1]))
    dataset = Dataset("any", ("a", "b"), images, images, images)
    assert dataset.normalise(images.pixels).flatten().tolist() == [-1.0, 1.0]


@pytest.mark.parametrize("config", [c() for c in DATASETS.values()], ids=lambda c: c.kind)
def test_every_data_set_has_a_seed_no_augmentation_and_survives_the_way_through_plain_data(config):
    adapter: TypeAdapter[Any] = TypeAdapter(DatasetConfig)
    assert (config.split_seed, config.augment) == (0, "none")
    assert adapter.validate_python(config.model_dump(mode="json")) == config == parse_dataset(config.kind)


def test_an_unknown_data_set_suggests_the_nearest_name():
    with pytest.raises(UsageError, match=r"unknown data set 'cifar'; did you mean 'cifar10'\? known: cifar10, "):
        parse_dataset("cifar")


@pytest.mark.parametrize("name", [name for name in DATASETS if name != "digits"])
@pytest.mark.parametrize("where", ["missing", "empty", "other files", "a file"])
def test_a_data_folder_that_is_missing_or_holds_other_files_says_what_to_do(tmp_path, name, where):
    root = tmp_path / "data"
    if where == "a file":
        root.touch()
    elif where != "missing":
        root.mkdir()
    if where == "other files":
        (root / "notes.txt").touch()
        (root / "thesis").mkdir()
    with pytest.raises(DataError) as caught:
        parse_dataset(name).load(root, False)
    text = str(caught.value)
    assert caught.value.exit_code == 2
    assert str(root) in text
    assert "Expected: " in text
    assert "--data-root" in text
    if where == "other files":
        assert "notes.txt, thesis/" in text
    assert find_datasets(root)[name] == f"not found in {root}"


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "svhn", "stl10", "folder"])
def test_a_data_set_of_files_asks_for_a_folder(name):
    with pytest.raises(DataError, match="--data-root"):
        parse_dataset(name).load(None, True)


@pytest.mark.parametrize("name", ["fashion-mnist", "cifar10", "cifar100", "svhn", "stl10"])
def test_files_are_fetched_with_download_alone_and_a_failure_says_so(tmp_path, monkeypatch, name):
    asked = []

    def reader(root: str, download: bool, **part: Any) -> None:
        asked.append((root, download))
        raise URLError("no network")

    datasets = import_torchvision().datasets
    for attribute in ("FashionMNIST", "CIFAR10", "CIFAR100", "SVHN", "STL10"):
        monkeypatch.setattr(datasets, attribute, reader)
    with pytest.raises(DataError, match="was not found"):
        parse_dataset(name).load(tmp_path, False)
    assert asked == []
    with pytest.raises(DataError, match=r"cannot be fetched to .*no network"):
        parse_dataset(name).load(tmp_path, True)
    assert asked == [(str(tmp_path), True)]


# --- IDX files -------------------------------------------------------------------------------------------------------


def idx(values: np.ndarray) -> bytes:
    return (
        bytes([0, 0, 8, values.ndim])
        + struct.pack(f">{values.ndim}I", *values.shape)
        + values.astype(np.uint8).tobytes()
    )


def test_idx_files_are_read_plain_or_gzipped(tmp_path):
    values = np.arange(24).reshape(2, 3, 4)
    (tmp_path / "a").write_bytes(idx(values))
    (tmp_path / "a.gz").write_bytes(gzip.compress(idx(values)))
    for name in ("a", "a.gz"):
        tensor = read_idx(tmp_path / name, rank=3)
        assert tensor.dtype == torch.uint8
        assert tensor.tolist() == values.tolist()


GOOD = idx(np.arange(24).reshape(2, 3, 4))


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"", "not an IDX file"),
        (GOOD[:10], "not an IDX file"),
        (b"\x00\x00\x0d" + GOOD[3:], "not an IDX file"),
        (idx(np.arange(6)), "not an IDX file"),
        (GOOD[:-1], "= 24 bytes but has only 23"),
        (GOOD + b"x", "= 24 bytes but has more"),
        (GOOD[:4] + b"\xff" * 12, "more than 1024 MiB"),
    ],
)
@pytest.mark.parametrize("zipped", [False, True])
def test_idx_files_that_are_not_what_they_say_are_refused(tmp_path, content, what, zipped):
    path = tmp_path / ("a.gz" if zipped else "a")
    path.write_bytes(gzip.compress(content) if zipped else content)
    with pytest.raises(DataError, match=what):
        read_idx(path, rank=3)


ZIPPED = gzip.compress(GOOD, mtime=0)  # Without the time of day: it would be in the names of the tests.


@pytest.mark.parametrize("content", [ZIPPED[:-12], GOOD, ZIPPED[:12] + b"\xff" * 20, b""])
def test_damaged_gzip_files_are_refused(tmp_path, content):
    (tmp_path / "a.gz").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.gz"):
        read_idx(tmp_path / "a.gz", rank=3)


def write_fashion(folder: Path, num_train: int = 30, num_test: int = 12, num_classes: int = 10) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for part, n in (("train", num_train), ("t10k", num_test)):
        pixels, labels = random_images(n, num_classes, (5, 4), part)
        (folder / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(pixels)))
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(idx(labels))


@pytest.mark.parametrize("sub", ["", "fashion-mnist", "FashionMNIST/raw"])
def test_fashion_mnist_is_found_in_the_folder_or_below_and_split_by_seed(tmp_path, sub):
    write_fashion(tmp_path / sub)
    config = FashionMnistConfig(num_validation=7, max_train=20, max_test=5)
    dataset = config.load(tmp_path)
    assert [len(part) for part in (dataset.train, dataset.validation, dataset.test)] == [20, 7, 5]
    assert (dataset.channels, dataset.size, dataset.num_classes) == (1, (5, 4), 10)
    assert dataset.classes[9] == "Ankle boot"
    assert fingerprint(dataset) == "83e55d66259b"
    assert find_datasets(tmp_path)["fashion-mnist"] == f"found in {tmp_path / sub}"

    everything = FashionMnistConfig(num_validation=7).load(tmp_path)
    used = torch.cat([everything.train.pixels, everything.validation.pixels]).flatten(1)
    assert len(used) == len(used.unique(dim=0)) == 30  # disjoint, and nothing is lost
    assert torch.equal(everything.train.pixels[:20], dataset.train.pixels)  # a subset is the beginning of the whole


def test_fashion_mnist_refuses_labels_of_other_classes_and_splits_without_training_images(tmp_path):
    write_fashion(tmp_path, num_classes=12)
    with pytest.raises(DataError, match="labels from 0 to 11"):
        FashionMnistConfig(num_validation=7).load(tmp_path)
    write_fashion(tmp_path)
    with pytest.raises(DataError, match="30 for validation leave none"):
        FashionMnistConfig(num_validation=30).load(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(idx(np.arange(3)))
    with pytest.raises(DataError, match="12 images of fashion-mnist but 3 labels"):
        FashionMnistConfig(num_validation=7).load(tmp_path)


def test_mnist_under_the_same_file_names_is_not_taken_for_fashion_mnist(tmp_path):
    write_fashion(tmp_path)
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(np.zeros((60_000, 1, 1)))))
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(np.resize([5, 0, 4, 1, 9, 2, 1, 3], 60_000)))
    with pytest.raises(DataError, match="holds another data set than fashion-mnist"):
        FashionMnistConfig().load(tmp_path)


@pytest.mark.skipif(FashionMnistConfig().where(None) is None, reason="needs Debian's package dataset-fashion-mnist")
def test_fashion_mnist_of_debian_has_its_published_counts():
    dataset = FashionMnistConfig().load(None)
    assert [len(part) for part in (dataset.train, dataset.validation, dataset.test)] == [55_000, 5_000, 10_000]
    assert dataset.size == (28, 28)
    labels = torch.cat([dataset.train.labels, dataset.validation.labels])
    assert labels.bincount().tolist() == [6000] * 10
    assert dataset.test.labels.bincount().tolist() == [1000] * 10


# --- torchvision's readers, on small files with their own checksums --------------------------------------------------


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()


def write_cifar(root: Path, monkeypatch: pytest.MonkeyPatch, reader: str, key: str, num_classes: int) -> Path:
    datasets = import_torchvision().datasets
    cifar = getattr(datasets, reader)
    folder = root / str(cifar.base_folder)
    folder.mkdir()
    for attribute, file, n in (("train_list", "train", 9), ("test_list", "test", 6)):
        pixels, labels = random_images(n, num_classes, (3072,), file)
        (folder / file).write_bytes(pickle.dumps({"data": pixels, key: labels.tolist()}))
        monkeypatch.setattr(cifar, attribute, [[file, md5(folder / file)]])
    names = {cifar.meta["key"]: [f"class {i}" for i in range(num_classes)]}
    (folder / cifar.meta["filename"]).write_bytes(pickle.dumps(names))
    monkeypatch.setattr(cifar, "meta", {**cifar.meta, "md5": md5(folder / cifar.meta["filename"])})
    return folder


@pytest.mark.parametrize(
    ("config", "reader", "key", "num_classes"),
    [
        (Cifar10Config(num_validation=3), "CIFAR10", "labels", 10),
        (Cifar100Config(num_validation=3), "CIFAR100", "fine_labels", 100),
    ],
)
def test_cifar_is_read_with_its_checksums_and_a_changed_file_is_never_unpickled(
    tmp_path, monkeypatch, config, reader, key, num_classes
):
    folder = write_cifar(tmp_path, monkeypatch, reader, key, num_classes)
    dataset = config.load(tmp_path)
    assert (dataset.num_classes, dataset.channels, dataset.size) == (num_classes, 3, (32, 32))
    assert [len(part) for part in (dataset.train, dataset.validation, dataset.test)] == [6, 3, 6]
    expected, _ = random_images(6, num_classes, (3072,), "test")
    for pixels, label in zip(dataset.test.pixels, dataset.test.labels):  # label i is the i-th image written
        assert pixels.flatten().tolist() == expected[label].tolist()

    trace = tmp_path / "trace"
    (folder / "test").write_bytes(b"cos\nmkdir\n(V" + str(trace).encode() + b"\ntR.")
    with pytest.raises(DataError, match=rf"{reader} cannot be read from"):
        config.load(tmp_path)
    assert not trace.exists()


def test_svhn_is_read_with_its_checksums(tmp_path, monkeypatch):
    svhn = import_torchvision().datasets.SVHN
    parts = {}
    for part, n in (("train", 9), ("test", 6)):
        pixels, labels = random_images(n, 10, (32, 32, 3), part)
        path = tmp_path / f"{part}_32x32.mat"
        savemat(path, {"X": pixels.transpose(1, 2, 3, 0), "y": np.where(labels == 0, 10, labels)[:, None]})
        parts[part] = ["", path.name, md5(path)]
    monkeypatch.setattr(svhn, "split_list", parts)
    dataset = SvhnConfig(num_validation=2).load(tmp_path)
    assert (dataset.channels, dataset.size, len(dataset.train)) == (3, (32, 32), 7)
    expected, _ = random_images(6, 10, (32, 32, 3), "test")
    for pixels, label in zip(dataset.test.pixels, dataset.test.labels):
        assert torch.equal(pixels, torch.from_numpy(expected[label]).permute(2, 0, 1))
    (tmp_path / "test_32x32.mat").write_bytes(b"MATLAB")
    with pytest.raises(DataError, match="SVHN cannot be read from"):
        SvhnConfig(num_validation=2).load(tmp_path)


def test_stl10_is_read_with_its_checksums(tmp_path, monkeypatch):
    stl10 = import_torchvision().datasets.STL10
    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    for attribute, part, n in (("train_list", "train", 7), ("test_list", "test", 4)):
        pixels, labels = random_images(n, 10, (3, 96, 96), part)
        (folder / f"{part}_X.bin").write_bytes(pixels.transpose(0, 1, 3, 2).tobytes())  # columns come first in the file
        (folder / f"{part}_y.bin").write_bytes((labels + 1).astype(np.uint8).tobytes())
        monkeypatch.setattr(stl10, attribute, [[f, md5(folder / f)] for f in (f"{part}_X.bin", f"{part}_y.bin")])
    dataset = Stl10Config(num_validation=2).load(tmp_path)
    assert (dataset.channels, dataset.size, len(dataset.train), dataset.classes[7]) == (3, (96, 96), 5, "monkey")
    expected, _ = random_images(4, 10, (3, 96, 96), "test")
    for pixels, label in zip(dataset.test.pixels, dataset.test.labels):
        assert torch.equal(pixels, torch.from_numpy(expected[label]))


# --- folders of images -----------------------------------------------------------------------------------------------


def write_folder(root: Path, classes: tuple[str, ...] = ("cat", "dog"), n: int = 10) -> None:
    for number, name in enumerate(classes):
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(n):
            image = Image.new("RGB", (20 + i, 10), (100 * number, i, 7))
            image.save(root / name / f"{i}.{'png' if i % 2 else 'jpg'}", quality=100)


def test_a_folder_gives_one_class_for_each_sub_folder_resized_and_split(tmp_path):
    write_folder(tmp_path)
    (tmp_path / "cat" / "notes.txt").touch()
    (tmp_path / "empty").mkdir()
    dataset = FolderConfig(size=12).load(tmp_path)
    assert dataset.classes == ("cat", "dog")
    assert (dataset.channels, dataset.size) == (3, (12, 12))
    assert [len(part) for part in (dataset.train, dataset.validation, dataset.test)] == [14, 2, 4]
    for part in (dataset.train, dataset.validation, dataset.test):
        assert torch.equal(part.pixels[:, 0, 5, 5] > 50, part.labels == 1)  # the colour that the class was painted with
    assert torch.equal(FolderConfig(size=12).load(tmp_path).test.pixels, dataset.test.pixels)
    assert find_datasets(tmp_path)["folder"] == f"found in {tmp_path}"
    assert FolderConfig(size=12, channels=1).load(tmp_path).channels == 1


def test_a_folder_with_one_class_too_few_images_or_an_unreadable_image_is_refused(tmp_path):
    write_folder(tmp_path, ("cat",))
    with pytest.raises(DataError, match="only one class of images, cat"):
        FolderConfig().load(tmp_path)
    write_folder(tmp_path, ("cat", "dog"), n=1)
    with pytest.raises(DataError, match=r"leaves no training image of (dog|cat)"):
        FolderConfig(validation_fraction=0.45, test_fraction=0.45).load(tmp_path)
    (tmp_path / "dog" / "3.png").write_bytes(b"not an image")
    with pytest.raises(DataError, match=r"dog/3\.png is not an image"):
        FolderConfig().load(tmp_path)


# --- augmentation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_augmented_images_are_shifts_and_mirror_images_of_the_originals(dtype):
    x = torch.arange(64).view(1, 1, 8, 8).expand(200, 2, 8, 8).to(dtype)
    padded = x[0, 0][torch.arange(-1, 9).clamp(0, 7)][:, torch.arange(-1, 9).clamp(0, 7)]  # an eighth of 8 on each side
    shifts = {digest(padded[i : i + 8, j : j + 8]) for i in range(3) for j in range(3)}
    mirrored = {digest(padded[i : i + 8, j : j + 8].flip(1)) for i in range(3) for j in range(3)}

    crops = augment(x, rng.stream(0, "a"), "crop")
    assert {digest(image[0]) for image in crops} == shifts
    flips = augment(x, rng.stream(0, "a"), "crop-flip")
    assert {digest(image[0]) for image in flips} == shifts | mirrored
    assert torch.equal(flips[:, 0], flips[:, 1])  # all channels move together
    assert flips.dtype == dtype
    assert augment(x, rng.stream(0, "a"), "none") is x


# --- tasks -----------------------------------------------------------------------------------------------------------


def test_multi_class_labels_are_the_classes():
    y = torch.tensor([3, 0, 2])
    assert MultiClassConfig().num_outputs(7) == 7
    assert torch.equal(MultiClassConfig().labels(y), y)


def test_binary_labels_say_whether_the_class_is_in_the_subset_for_one_task_and_for_many():
    task = BinarySubsetConfig()
    y = torch.tensor([3, 0, 2, 1])
    assert task.num_outputs(4) == 2
    assert task.labels(y, "0101").tolist() == [1, 0, 0, 1]
    many = task.labels(y, bits_tensor(["0101", "1010"]))
    assert many.dtype == torch.int64
    assert many.tolist() == [[1, 0, 0, 1], [0, 1, 1, 0]]


bit_strings = st.integers(2, 20).flatmap(lambda n: st.text("01", min_size=n, max_size=n))


@given(bits=bit_strings)
def test_parsed_bits_are_themselves_and_complement_is_its_own_inverse(bits):
    classes = [f"class {i}" for i in range(len(bits))]
    assert parse_task_bits(bits, classes, allow_trivial=True) == bits
    assert parse_task_bits(f" {bits[:1]}_{bits[1:]}\n", classes, allow_trivial=True) == bits
    assert complement(complement(bits)) == bits
    assert torch.equal(bits_tensor(bits) + bits_tensor(complement(bits)), torch.ones(len(bits), dtype=torch.int64))
    y = torch.arange(len(bits))
    assert torch.equal(BinarySubsetConfig().labels(y, bits), bits_tensor(bits))


@given(bits=bit_strings.filter(lambda b: "1" in b))
def test_a_subset_is_named_by_its_classes_or_their_numbers(bits):
    classes = [f"class {chr(97 + i)}" for i in range(len(bits))]
    chosen = [i for i, bit in enumerate(bits) if bit == "1"]
    assert parse_classes(", ".join(classes[i] for i in chosen), classes, allow_trivial=True) == bits
    assert parse_classes(",".join(map(str, reversed(chosen))), classes, allow_trivial=True) == bits


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "have 0 bits but there are 4 classes"),
        ("010", "have 3 bits but there are 4 classes"),
        ("01010", "have 5 bits but there are 4 classes"),
        ("01a0", "hold 'a', which is neither 0 nor 1"),
        ("01２0", "which is neither 0 nor 1"),
        ("0b10", "hold 'b'"),
        ("-101", "hold '-'"),
        ("0000", "put no class into the subset"),
        ("1111", "put every class into the subset"),
    ],
)
def test_wrong_task_bits_are_refused_with_the_classes_in_order(text, what):
    with pytest.raises(UsageError, match=what) as caught:
        parse_task_bits(text, CLASSES)
    assert "airplane, automobile, bird, cat" in str(caught.value)
    assert caught.value.exit_code == 2


def test_trivial_tasks_are_taken_where_the_zoo_has_them():
    assert parse_task_bits("0000", CLASSES, allow_trivial=True) == "0000"


def test_unknown_classes_suggest_the_nearest_and_empty_lists_are_refused():
    with pytest.raises(UsageError, match="unknown class 'bord'; did you mean 'bird'"):
        parse_classes("cat, bord", CLASSES)
    for text in ("", "cat,,bird", "4", "-1"):
        with pytest.raises(UsageError, match="unknown class"):
            parse_classes(text, CLASSES)
    assert parse_classes("Cat, 2", CLASSES) == "0011"


def test_a_tasks_file_is_read_with_comments_and_all_its_problems_are_numbered():
    assert read_tasks(["# tasks", "", "0101  # two", " 10 00 "], CLASSES) == ["0101", "1000"]
    with pytest.raises(UsageError) as caught:
        read_tasks(["0101", "01", "x101", "0101", "0000"], CLASSES)
    text = str(caught.value)
    assert "has 4 problems" in text
    for part in (
        "line 2: task bits '01' have 2 bits",
        "line 3: task bits 'x101'",
        "line 4: 0101 stands on line 1",
        "line 5: ",
    ):
        assert part in text
    with pytest.raises(UsageError, match="holds no task"):
        read_tasks(["# nothing"], CLASSES)


@pytest.mark.parametrize(
    ("num_classes", "counts"),
    [(10, (512, 102, 102)), (10, (1022, 0, 0)), (2, (2, 0, 0)), (3, (2, 2, 2)), (100, (512, 102, 102))],
)
def test_tasks_are_split_into_distinct_non_trivial_ones_with_complements_on_one_side(num_classes, counts):
    num_seen, num_validation, num_unseen = counts
    sides = split_tasks(num_classes, num_seen, num_validation, num_unseen, seed=3)
    assert tuple(len(side) for side in sides) == counts
    tasks = [task for side in sides for task in side]
    assert len(set(tasks)) == len(tasks)
    assert all(len(task) == num_classes and set(task) == {"0", "1"} for task in tasks)
    for side in sides:
        assert {complement(task) for task in side} == set(side)
        assert all(side[i + 1] == complement(side[i]) for i in range(0, len(side), 2))


@pytest.mark.parametrize("num_classes", [10, 100])
def test_the_seen_tasks_of_a_smaller_zoo_are_the_first_of_a_larger_one(num_classes):
    seen, validation, unseen = split_tasks(num_classes, 512, 102, 102, seed=0)
    assert split_tasks(num_classes, 128, 102, 102, seed=0) == (seen[:128], validation, unseen)
    assert split_tasks(num_classes, 512, 102, 102, seed=1)[2] != unseen


def test_the_split_of_tasks_never_changes():
    text = ",".join(task for num_classes in (10, 100) for side in split_tasks(num_classes, 8, 4, 4, 0) for task in side)
    assert hashlib.sha256(text.encode()).hexdigest()[:12] == "9e691af15e11"


def test_splits_of_odd_negative_or_too_many_tasks_are_refused():
    with pytest.raises(UsageError, match="must be even: seen 3, unseen 1"):
        split_tasks(10, 3, 2, 1, seed=0)
    with pytest.raises(UsageError, match="must be even: validation -2"):
        split_tasks(10, 2, -2, 2, seed=0)
    with pytest.raises(UsageError, match="are 1024, but 10 classes have 1022"):
        split_tasks(10, 1020, 2, 2, seed=0)
