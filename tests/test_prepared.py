"""Prepared data sets: written whole, found again, checked when opened, test labels sealed."""

from __future__ import annotations

import errno
import io
import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import snella
from snella.data import prepared, storage
from snella.data.prepared import (
    SPLITS,
    Prepared,
    SealedTestLabels,
    digest,
    test_labels,
    write_prepared,
)
from snella.errors import UserError

COUNTS = {"train800": 8, "val200": 4, "test": 6}
INFO = {"name": "tiny", "source": "formula", "licence": "CC0", "num_classes": 4}


def array_splits(seed=0, size=(5, 7)):
    rng = np.random.default_rng(seed)
    return {
        split: (rng.integers(0, 256, (n, *size, 3), dtype=np.uint8), np.arange(n) % 3)
        for split, n in COUNTS.items()
    }


def encoded_splits(encoding="PNG", seed=0):
    def encode(image):
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, encoding)
        return buffer.getvalue()

    return {
        split: ([encode(image[: 3 + i % 2]) for i, image in enumerate(images)], labels)
        for split, (images, labels) in array_splits(seed).items()
    }


@pytest.fixture
def tiny(tmp_path):
    write_prepared(tmp_path / "tiny", array_splits(), info=INFO)
    return tmp_path / "tiny"


def test_arrays_come_back_as_they_went_in(tiny):
    data, splits = Prepared.open(tiny), array_splits()
    assert (data.name, data.num_classes, data.folder) == ("tiny", 4, tiny)
    assert len(data) == 18
    assert [data.size(split) for split in SPLITS] == [8, 4, 12, 6]
    for split in COUNTS:
        images = data.images(split)
        assert len(images) == COUNTS[split]
        assert np.array_equal(np.stack(list(images)), splits[split][0])
    assert data.image("test", 3).dtype == np.uint8
    assert data.labels("val200").dtype == np.int64
    assert np.array_equal(data.labels("train800"), splits["train800"][1])


def test_trainval_is_the_two_splits_and_not_stored(tiny):
    data, splits = Prepared.open(tiny), array_splits()
    joined = np.concatenate([splits["train800"][0], splits["val200"][0]])
    assert np.array_equal(np.stack(list(data.images("trainval"))), joined)
    assert np.array_equal(data.images("trainval")[-1], joined[-1])
    assert np.array_equal(data.labels("trainval"), np.r_[np.arange(8) % 3, np.arange(4) % 3])
    assert not list(tiny.glob("trainval*"))


def test_encoded_files_keep_their_bytes_and_sizes(tmp_path):
    splits = encoded_splits()
    manifest = write_prepared(tmp_path / "enc", splits, info={"source": "x"})
    data = Prepared.open(tmp_path / "enc")
    assert manifest["storage"] == "encoded"
    assert not data.jpeg
    images = data.images("test")
    assert [image.shape for image in images] == [(3 + i % 2, 7, 3) for i in range(6)]
    assert images.encoded(5) == splits["test"][0][5]
    assert np.array_equal(images[5], array_splits()["test"][0][5][:4])


def test_lazy_images_behave_like_sequences(tmp_path):
    write_prepared(tmp_path / "enc", encoded_splits(), info={})
    images = Prepared.open(tmp_path / "enc").images("trainval")
    assert np.array_equal(images[-1], images[11])
    assert len(images[2:5]) == 3
    with pytest.raises(IndexError):
        images[12]


def test_lazy_images_pickle_as_paths(tiny):
    images = Prepared.open(tiny).images("trainval")
    before = images[9].copy()
    data = pickle.dumps(images)
    assert len(data) < 1500
    assert np.array_equal(pickle.loads(data)[9], before)


def test_stored_images_cannot_be_changed(tiny):
    with pytest.raises(ValueError, match="read-only"):
        Prepared.open(tiny).image("test", 0)[:] = 0


def test_test_labels_are_sealed(tiny):
    with pytest.raises(SealedTestLabels, match="scorer"):
        Prepared.open(tiny).labels("test")
    assert np.array_equal(test_labels(tiny), np.arange(6) % 3)


def test_only_the_scorer_opens_the_test_labels():
    root = Path(snella.__file__).parent
    allowed = {"data/prepared.py"}
    for path in [*root.rglob("*.py"), *(root.parent / "baselines").glob("*.py")]:
        name = path.relative_to(root).as_posix() if path.is_relative_to(root) else path.name
        if name not in allowed and name != "runs/evaluate.py":
            text = path.read_text(encoding="utf-8")
            assert "test_labels" not in text, f"{name} reaches for the test labels"


def test_manifest_says_what_there_is(tiny):
    manifest = json.loads((tiny / "manifest.json").read_text())
    assert manifest["counts"] == COUNTS
    assert manifest["class_counts"]["test"] == [2, 2, 2, 0]
    assert manifest["licence"] == "CC0"
    assert manifest["jpeg"] is False
    assert manifest["test_images_also_in_trainval"] == 0
    assert sorted(manifest["files"]) == sorted(
        p.name for p in tiny.iterdir() if p.name != "manifest.json"
    )


@pytest.mark.parametrize(("encoding", "expected"), [("PNG", False), ("JPEG", True)])
def test_one_jpeg_among_the_files_is_recorded(tmp_path, encoding, expected):
    splits = encoded_splits()
    splits["test"][0][-1] = encoded_splits(encoding)["test"][0][-1]
    assert write_prepared(tmp_path / "x", splits, info={})["jpeg"] is expected


def test_test_images_that_training_sees_are_counted(tmp_path):
    splits = array_splits()
    splits["test"][0][:2] = splits["val200"][0][1]
    manifest = write_prepared(tmp_path / "x", splits, info={})
    assert manifest["test_images_also_in_trainval"] == 2


def test_preparing_twice_gives_the_same_digest(tiny, tmp_path):
    first = digest(tiny)
    assert write_prepared(tiny, array_splits(), info=INFO)["digest"] == first
    assert write_prepared(tmp_path / "other", array_splits(1), info=INFO)["digest"] != first
    splits = array_splits()
    splits["test"][1][0] = 2
    assert write_prepared(tmp_path / "label", splits, info=INFO)["digest"] != first


def test_a_changed_byte_is_found(tiny):
    Prepared.open(tiny).verify()
    path = tiny / "train800_images.npy"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="do not match the digest"):
        Prepared.open(tiny).verify()


def test_array_file_is_what_numpy_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "CHUNK", 100)
    for array in (np.arange(70), np.zeros((6, 5, 4, 3), np.uint8), np.ones((4, 9))[:, ::2]):
        storage.write_array(tmp_path / "a.npy", array)
        np.save(tmp_path / "b.npy", np.ascontiguousarray(array))
        assert (tmp_path / "a.npy").read_bytes() == (tmp_path / "b.npy").read_bytes()


def test_missing_data_set(tmp_path):
    with pytest.raises(UserError, match=r"No prepared data set in .*run `snella prepare digits`"):
        Prepared.open(tmp_path / "digits")


def test_older_schema(tiny):
    manifest = json.loads((tiny / "manifest.json").read_text())
    (tiny / "manifest.json").write_text(json.dumps(manifest | {"schema": 0}))
    with pytest.raises(UserError, match=r"schema 0.*reads schema 1: run `snella prepare tiny`"):
        Prepared.open(tiny)


@pytest.mark.parametrize("text", ["", "[1]", '{"schema": 1'])
def test_damaged_manifest(tiny, text):
    (tiny / "manifest.json").write_text(text)
    with pytest.raises(UserError, match="snella prepare tiny"):
        Prepared.open(tiny)


def test_truncated_and_missing_files(tiny):
    path = tiny / "val200_images.npy"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"val200_images\.npy is 547 bytes long instead of 548"):
        Prepared.open(tiny)
    path.unlink()
    with pytest.raises(UserError, match=r"val200_images\.npy is missing: run `snella prepare"):
        test_labels(tiny)


def test_unknown_split(tiny):
    with pytest.raises(UserError, match="Did you mean 'train800'"):
        Prepared.open(tiny).images("train80")


def full_disk(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_full_disk_leaves_nothing_new_and_keeps_the_old(tiny, monkeypatch):
    first = digest(tiny)
    monkeypatch.setattr(storage.os, "fsync", full_disk)
    with pytest.raises(UserError, match=r"No space left in .*'tiny' needs about 2,034 bytes"):
        write_prepared(tiny, array_splits(1), info=INFO)
    assert [p.name for p in tiny.parent.iterdir()] == ["tiny"]
    assert digest(tiny) == first


def test_too_small_a_disk_is_noticed_before_writing(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr(prepared.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(UserError, match="No space left"):
        write_prepared(tmp_path / "tiny", array_splits(), info=INFO)
    assert not list(tmp_path.iterdir())


def test_interrupted_writing_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(prepared, "digest_files", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_prepared(tmp_path / "tiny", array_splits(), info=INFO)
    assert not list(tmp_path.iterdir())


def test_other_peoples_folders_are_not_replaced(tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(UserError, match=r"holds notes\.txt, which is not prepared data"):
        write_prepared(tmp_path, array_splits(), info=INFO)
    assert (tmp_path / "notes.txt").exists()


def test_contract_of_the_caller(tmp_path):
    splits = array_splits()
    for broken, message in (
        ({**splits, "trainval": splits["test"]}, "splits must be"),
        ({**splits, "test": encoded_splits()["test"]}, "all splits are arrays or all"),
        ({**splits, "test": (splits["test"][0], splits["val200"][1])}, "labels of shape"),
        ({**splits, "test": (splits["test"][0][:0], np.arange(0))}, "0 images"),
        ({**splits, "test": (splits["test"][0].astype(float), splits["test"][1])}, "uint8"),
        ({**splits, "test": (splits["test"][0], splits["test"][1] + 3)}, "outside 0 to 3"),
    ):
        with pytest.raises(ValueError, match=message):
            write_prepared(tmp_path / "x", broken, info=INFO)
    assert not list(tmp_path.iterdir())
