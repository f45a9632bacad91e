"""Images kept at a protocol's resolution: the same pixels, written once, whole, by one process."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from snella.data import placement, resized
from snella.data.pixels import PixelSettings
from snella.data.prepared import Prepared
from snella.data.transforms import Split, Transform, eval_transform, load_split, train_transform
from snella.errors import UserError
from snella.files import try_lock

SQUARE = PixelSettings(image_size=24, resize="square")


@pytest.fixture
def data(tiny_data, monkeypatch) -> Prepared:
    """A prepared set whose resized pixels count as worth keeping."""
    monkeypatch.setattr(resized, "SMALL_BYTES", 0)
    return Prepared.open(tiny_data)


@pytest.fixture
def written(monkeypatch) -> list[Path]:
    """The files that are written from here on."""
    found: list[Path] = []
    write = resized._write

    def noted(file, images, transform):
        found.append(file)
        write(file, images, transform)

    monkeypatch.setattr(resized, "_write", noted)
    return found


@pytest.mark.parametrize("split", ["train", "trainval", "test"])
def test_the_pixels_are_those_of_the_transform(data, split, written):
    transform = eval_transform(SQUARE)
    expected = load_split(data.images(split), transform)
    for _ in range(2):
        found = resized.open_images(data, split, transform)
        assert isinstance(found, torch.Tensor) and torch.equal(found, expected)
    assert len(written) == 1
    found[0] = 0  # a write stays in memory
    assert torch.equal(resized.open_images(data, split, transform), expected)


def test_another_transform_split_or_data_has_another_file(data):
    files = {
        resized.kept_file(data, split, eval_transform(settings))
        for split in ("train", "test")
        for settings in (
            SQUARE,
            SQUARE.model_copy(update={"interpolation": "bilinear"}),
            SQUARE.model_copy(update={"image_size": 32}),
        )
    }
    other = Prepared(data.folder, {**data.manifest, "digest": "x"})
    assert len(files | {resized.kept_file(other, "train", eval_transform(SQUARE))}) == 7
    same = SQUARE.model_copy(update={"normalisation": "none"})
    assert resized.kept_file(data, "train", eval_transform(same)) in files


def test_what_is_random_or_small_is_not_kept(data, monkeypatch):
    augmented = PixelSettings(image_size=24, augmentation="flip")
    assert isinstance(resized.open_images(data, "train", train_transform(augmented)), Split)
    as_they_are = eval_transform(PixelSettings(image_size=16, resize="none"))
    assert isinstance(resized.open_images(data, "train", as_they_are), torch.Tensor)
    monkeypatch.setattr(resized, "SMALL_BYTES", 1 << 25)
    assert isinstance(resized.open_images(data, "train", eval_transform(SQUARE)), torch.Tensor)
    assert not resized.kept_folder(data.folder).exists()


@pytest.mark.parametrize("trouble", ["full", "file in the way", "no write"])
def test_where_nothing_can_be_kept_the_run_goes_on(data, monkeypatch, trouble):
    transform = eval_transform(SQUARE)
    if trouble == "full":
        monkeypatch.setattr(resized, "SPARE_BYTES", 1 << 62)
    elif trouble == "file in the way":
        resized.kept_folder(data.folder).write_text("")
    else:

        def refuse(*arguments):
            raise UserError("no space")

        monkeypatch.setattr(resized, "_write", refuse)
    found = resized.open_images(data, "train", transform)
    assert torch.equal(found, load_split(data.images("train"), transform))


@pytest.mark.parametrize("damage", [b"", b"\x93NUMPY", None])
def test_a_file_that_is_not_whole_is_written_again(data, written, damage):
    transform = eval_transform(SQUARE)
    expected = load_split(data.images("test"), transform)
    resized.open_images(data, "test", transform)
    file = resized.kept_file(data, "test", transform)
    file.write_bytes(file.read_bytes()[:-7] if damage is None else damage)
    assert torch.equal(resized.open_images(data, "test", transform), expected)
    assert len(written) == 2


def test_one_process_writes_and_the_others_wait(data, written, monkeypatch):
    monkeypatch.setattr(resized, "POLL_SECONDS", 0.01)
    transform = eval_transform(SQUARE)
    file = resized.kept_file(data, "train", transform)
    file.parent.mkdir()
    found: list[torch.Tensor | Split] = []
    with file.with_suffix(".lock").open("w") as lock:
        assert try_lock(lock)
        waiting = threading.Thread(
            target=lambda: found.append(resized.open_images(data, "train", transform))
        )
        waiting.start()
        waiting.join(0.3)
        assert waiting.is_alive() and not written
        resized._write(file, data.images("train"), transform)  # as the holder of the lock does
    waiting.join(30)
    assert len(written) == 1 and torch.equal(found[0], load_split(data.images("train"), transform))


def test_prepared_anew_drops_what_was_kept(tmp_path):
    from snella.jobs.prepare import prepare_dataset
    from snella.suite import config

    chosen = config.load(overrides={"data": f"{tmp_path}/data", "suite": "smoke"})
    folder = resized.kept_folder(prepare_dataset(chosen, "digits"))
    folder.mkdir()
    prepare_dataset(chosen, "digits", missing_only=True)
    assert folder.exists()
    prepare_dataset(chosen, "digits")
    assert not folder.exists()


def test_without_a_gpu_nothing_moves():
    images = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    if not torch.cuda.is_available():
        assert placement.resident(images) is images and placement.travel(images) is images
    assert placement.resident_bytes() == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_pixels_lie_on_the_device_and_are_normalised_there(make_run):
    from snella.runs.train import load_run

    task = load_run(make_run("linear")).task
    batch = next(iter(task.batches("train", 1)))
    assert batch["image"].is_cuda and batch["image"].dtype == torch.float32
    assert placement.resident_bytes() > 0
    assert placement.travel(torch.zeros(2, dtype=torch.uint8)).is_cuda
    del task, batch
    assert placement.resident_bytes() == 0


def test_a_transform_pickles_with_its_policy():
    import pickle

    settings = PixelSettings(
        image_size=24, augmentation="timm", auto_augment="rand-m9-mstd0.5-inc1"
    )
    transform = train_transform(settings)
    image = np.arange(40 * 40 * 3, dtype=np.uint8).reshape(40, 40, 3)
    torch.manual_seed(3)
    first = transform(image)
    again: Transform = pickle.loads(pickle.dumps(transform))
    torch.manual_seed(3)
    assert torch.equal(first, again(image))


def test_tensors_travel_to_a_gpu_pinned_and_unawaited():
    class Pretended:
        is_cuda, pinned = False, False

        def pin_memory(self):
            self.pinned = True
            return self

        def to(self, device, non_blocking=False):
            return device.type, self.pinned, non_blocking

    assert placement.travel(Pretended(), torch.device("cuda")) == ("cuda", True, True)
    assert placement.travel(Pretended(), torch.device("cpu")) == ("cpu", False, False)


def test_single_numbers_of_a_batch_stay_on_the_host(make_run, monkeypatch):
    from snella.runs import trainer as module
    from snella.runs.train import load_run

    loaded = load_run(make_run("linear"))
    monkeypatch.setattr(module, "travel", lambda value, device: ("travelled", device.type))
    arguments = (
        loaded.method,
        loaded.model,
        loaded.task,
        loaded.run.protocol,
        0,
        loaded.run.folder,
    )
    fitted = module.Trainer(*arguments, "fingerprint")
    (batch,) = fitted._on_device(iter([{"image": torch.zeros(2, 3), "erase": torch.tensor(7)}]))
    assert batch["image"] == ("travelled", "cpu") and int(batch["erase"]) == 7
