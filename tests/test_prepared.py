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
from snella import files
from snella.data import prepared, storage
from snella.data.prepared import ROLES, Prepared, SealedTargets, write_prepared
from snella.errors import UserError
from snella.tasks.classification.prepare import write_labelled

COUNTS = {"train": 8, "val": 4, "test": 6}
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


def write(folder, splits, info=INFO):
    return write_labelled(folder, splits, info)


def digest(folder):
    return Prepared.open(folder).digest


@pytest.fixture
def tiny(tmp_path):
    write(tmp_path / "tiny", array_splits())
    return tmp_path / "tiny"


def test_arrays_come_back_as_they_went_in(tiny):
    data, splits = Prepared.open(tiny), array_splits()
    assert (data.name, data.num_classes, data.folder) == ("tiny", 4, tiny)
    assert len(data) == 18
    assert [data.size(split) for split in ROLES] == [8, 4, 12, 6]
    for split in COUNTS:
        images = data.images(split)
        assert len(images) == COUNTS[split]
        assert np.array_equal(np.stack(list(images)), splits[split][0])
    assert data.image("test", 3).dtype == np.uint8
    assert data.labels("val").dtype == np.int64
    assert np.array_equal(data.labels("train"), splits["train"][1])


def test_trainval_is_the_two_splits_and_not_stored(tiny):
    data, splits = Prepared.open(tiny), array_splits()
    joined = np.concatenate([splits["train"][0], splits["val"][0]])
    assert np.array_equal(np.stack(list(data.images("trainval"))), joined)
    assert np.array_equal(data.images("trainval")[-1], joined[-1])
    assert np.array_equal(data.labels("trainval"), np.r_[np.arange(8) % 3, np.arange(4) % 3])
    assert not list(tiny.glob("trainval*"))


def test_encoded_files_keep_their_bytes_and_sizes(tmp_path):
    splits = encoded_splits()
    manifest = write(tmp_path / "enc", splits, {"source": "x"})
    data = Prepared.open(tmp_path / "enc")
    assert manifest["columns"] == {"image": "encoded", "label": "array"}
    assert not data.jpeg
    images = data.images("test")
    assert [image.shape for image in images] == [(3 + i % 2, 7, 3) for i in range(6)]
    assert images.encoded(5) == splits["test"][0][5]
    assert np.array_equal(images[5], array_splits()["test"][0][5][:4])


def test_lazy_images_behave_like_sequences(tmp_path):
    write(tmp_path / "enc", encoded_splits(), {})
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
    with pytest.raises(SealedTargets, match="scorer"):
        Prepared.open(tiny).labels("test")
    with pytest.raises(SealedTargets, match="scorer"):
        Prepared.open(tiny).encoded("test", "label")
    assert np.array_equal(Prepared.open(tiny).targets("test", "label"), np.arange(6) % 3)
    assert sorted(p.name for p in (tiny / "sealed").iterdir()) == ["test_label.npy"]


def test_only_scorers_open_sealed_targets():
    root = Path(snella.__file__).parent
    for path in [*root.rglob("*.py"), *(root.parent / "baselines").glob("*.py")]:
        if path.name == "score.py" or path.parts[-2:] == ("data", "prepared.py"):
            continue
        text = path.read_text(encoding="utf-8")
        assert ".targets(" not in text and "SEALED" not in text, f"{path} reaches for the targets"


def test_manifest_says_what_there_is(tiny):
    manifest = json.loads((tiny / "manifest.json").read_text())
    assert manifest["counts"] == COUNTS
    assert manifest["class_counts"]["test"] == [2, 2, 2, 0]
    assert manifest["licence"] == "CC0"
    assert manifest["jpeg"] is False
    assert manifest["test_images_also_in_trainval"] == 0
    assert sorted(manifest["files"]) == sorted(
        p.relative_to(tiny).as_posix()
        for p in tiny.rglob("*")
        if p.is_file() and p.name != "manifest.json"
    )


@pytest.mark.parametrize(("encoding", "expected"), [("PNG", False), ("JPEG", True)])
def test_one_jpeg_among_the_files_is_recorded(tmp_path, encoding, expected):
    splits = encoded_splits()
    splits["test"][0][-1] = encoded_splits(encoding)["test"][0][-1]
    assert write(tmp_path / "x", splits, {})["jpeg"] is expected


def test_test_images_that_training_sees_are_counted(tmp_path):
    splits = array_splits()
    splits["test"][0][:2] = splits["val"][0][1]
    manifest = write(tmp_path / "x", splits, {})
    assert manifest["test_images_also_in_trainval"] == 2


def test_preparing_twice_gives_the_same_digest(tiny, tmp_path):
    first = digest(tiny)
    assert write(tiny, array_splits())["digest"] == first
    assert write(tmp_path / "other", array_splits(1))["digest"] != first
    splits = array_splits()
    splits["test"][1][0] = 2
    assert write(tmp_path / "label", splits)["digest"] != first


def test_a_changed_byte_is_found(tiny):
    Prepared.open(tiny).verify()
    path = tiny / "train_image.npy"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"train_image\.npy has changed"):
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
    with pytest.raises(UserError, match=r"schema 0.*reads schema 2: run `snella prepare tiny`"):
        Prepared.open(tiny)


@pytest.mark.parametrize("text", ["", "[1]", '{"schema": 1'])
def test_damaged_manifest(tiny, text):
    (tiny / "manifest.json").write_text(text)
    with pytest.raises(UserError, match="snella prepare tiny"):
        Prepared.open(tiny)


def test_a_changed_manifest_is_found(tiny):
    manifest = json.loads((tiny / "manifest.json").read_text())
    (tiny / "manifest.json").write_text(json.dumps(manifest | {"num_classes": 5}))
    with pytest.raises(UserError, match=r"manifest.json has changed.*snella prepare tiny"):
        Prepared.open(tiny)


def test_truncated_and_missing_files(tiny):
    path = tiny / "val_image.npy"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"val_image\.npy is 547 bytes long instead of 548"):
        Prepared.open(tiny)
    path.unlink()
    with pytest.raises(UserError, match=r"val_image\.npy is missing: run `snella prepare"):
        Prepared.open(tiny)


def test_unknown_split(tiny):
    with pytest.raises(UserError, match="Did you mean 'train'"):
        Prepared.open(tiny).images("trian")


def full_disk(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_full_disk_leaves_nothing_new_and_keeps_the_old(tiny, monkeypatch):
    first = digest(tiny)
    monkeypatch.setattr(files.os, "fsync", full_disk)
    with pytest.raises(UserError, match=r"No space left in .*'tiny' needs about 2,034 bytes"):
        write(tiny, array_splits(1))
    assert [p.name for p in tiny.parent.iterdir()] == ["tiny"]
    assert digest(tiny) == first


def test_too_small_a_disk_is_noticed_before_writing(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(UserError, match="No space left"):
        write(tmp_path / "tiny", array_splits())
    assert not list(tmp_path.iterdir())


def test_interrupted_writing_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(prepared, "digest_files", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "tiny", array_splits())
    assert not list(tmp_path.iterdir())


def test_other_peoples_folders_are_not_replaced(tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(UserError, match=r"holds notes\.txt, which is not prepared data"):
        write(tmp_path, array_splits())
    assert (tmp_path / "notes.txt").exists()


def test_contract_of_the_caller(tmp_path):
    def columns(**changes):
        splits = {k: {"image": v[0], "label": v[1]} for k, v in array_splits().items()}
        return {**splits, **changes}

    test = columns()["test"]
    for broken, message in (
        (columns(trainval=test), "splits must be"),
        ({"test": test}, "splits must be"),
        (columns(test={**test, "image": encoded_splits()["test"][0]}), "an array in one split"),
        (columns(test={**test, "label": np.arange(4)}), "columns of lengths"),
        (columns(test={k: v[:0] for k, v in test.items()}), "columns of lengths"),
        (columns(test={**test, "image": test["image"].astype(float)}), "uint8"),
        (columns(test={"image": test["image"]}), "test has columns"),
    ):
        with pytest.raises(ValueError, match=message):
            write_prepared(tmp_path / "x", broken, info=INFO)
    splits = array_splits()
    splits["test"] = (splits["test"][0], splits["test"][1] + 3)
    with pytest.raises(ValueError, match="outside 0 to 3"):
        write(tmp_path / "x", splits)
    assert not list(tmp_path.iterdir())


def test_named_columns_of_any_kind(tmp_path):
    def part(n):
        return {
            "image": np.zeros((n, 4, 4, 3), np.uint8),
            "mask": [b"\x89PNG mask %d" % i for i in range(n)],
            "size": np.arange(2 * n).reshape(n, 2),
        }

    folder = tmp_path / "polyps"
    write_prepared(folder, {"train": part(5), "test": part(3)}, sealed=("mask",), info={})
    data = Prepared.open(folder)
    assert data.encoded("train", "mask")[4] == b"\x89PNG mask 4"
    assert data.column("test", "size").tolist() == [[0, 1], [2, 3], [4, 5]]
    assert [data.has(role) for role in ROLES] == [True, False, True, True]
    assert data.size("trainval") == 5
    with pytest.raises(UserError, match="no val split"):
        data.images("val")
    for read in (data.encoded, data.images, data.column):
        with pytest.raises(SealedTargets):
            read("test", "mask")
