"""Miniature original archives of VTAB's tasks, as they unpack, with more images than are taken."""

from __future__ import annotations

import json
from pathlib import Path

import formats
import numpy as np
from PIL import Image

SIZE = 30
"""Images of a training part; other parts have half of them."""
PARTS = {"train": 0, "validation": 100, "test": 200}


def _numbers(part: str) -> range:
    return range(PARTS[part], PARTS[part] + (SIZE if part == "train" else SIZE // 2))


def _save(path: Path, number: int) -> None:
    formats.save(path, formats.pixels(number, (16, 20)), quality=95)


def cifar100(root: Path) -> None:
    root.mkdir(parents=True)
    for part in ("train", "test"):
        rows = [bytes([9, i % 100]) + formats.pixels(i, (32, 32)).transpose(2, 0, 1).tobytes()
                for i in _numbers(part)]  # fmt: skip
        (root / f"{part}.bin").write_bytes(b"".join(rows))
    (root / "coarse_label_names.txt").write_text("\n".join(f"c{i}" for i in range(20)))
    (root / "fine_label_names.txt").write_text("\n".join(f"f{i}" for i in range(100)))


def svhn(root: Path) -> None:
    from scipy.io import savemat

    root.mkdir(parents=True)
    for part in ("train", "test"):
        images = np.stack([formats.pixels(i, (32, 32)) for i in _numbers(part)], axis=-1)
        labels = np.array([[i % 10 + 1] for i in _numbers(part)], np.uint8)
        savemat(root / f"{part}_32x32.mat", {"X": images, "y": labels})


def dtd(root: Path) -> None:
    (root / "labels").mkdir(parents=True)
    for part, file in (("train", "train1"), ("validation", "val1"), ("test", "test1")):
        keys = [f"{('banded', 'blotchy')[i % 2]}/{('banded', 'blotchy')[i % 2]}_{i:04d}.jpg"
                for i in _numbers(part)]  # fmt: skip
        for number, key in zip(_numbers(part), keys, strict=True):
            _save(root / "images" / key, number)
        (root / "labels" / f"{file}.txt").write_text("\n".join(keys) + "\n")


def flowers102(root: Path) -> None:
    from scipy.io import savemat

    sets = {"trnid": "train", "valid": "validation", "tstid": "test"}
    for part in sets.values():
        for i in _numbers(part):
            _save(root / "jpg" / f"image_{i + 1:05d}.jpg", i)
    ids = {key: np.array([[i + 1 for i in _numbers(part)]]) for key, part in sets.items()}
    savemat(root / "setid.mat", {key: value.astype(np.uint16) for key, value in ids.items()})
    labels = np.array([[i % 102 + 1 for i in range(300)]], np.uint8)
    savemat(root / "imagelabels.mat", {"labels": labels})


def pets(root: Path) -> None:
    (root / "annotations").mkdir(parents=True)
    for part, file in (("train", "trainval.txt"), ("test", "test.txt")):
        lines = []
        for i in _numbers(part):
            name = f"{('Abyssinian', 'yorkshire_terrier')[i % 2]}_{i}"
            _save(root / "images" / f"{name}.jpg", i)
            mask = np.ones((16, 20), np.uint8)
            formats.save(root / "annotations" / "trimaps" / f"{name}.png", mask)
            lines.append(f"{name} {(1, 37)[i % 2]} {i % 2 + 1} 1")
        (root / "annotations" / file).write_text("\n".join(lines) + "\n")


def patch_camelyon(root: Path) -> None:
    import h5py

    root.mkdir(parents=True)
    for part, name in (("train", "train"), ("validation", "valid"), ("test", "test")):
        images = np.stack([formats.pixels(i, (96, 96)) for i in _numbers(part)])
        labels = np.array([i % 2 for i in _numbers(part)], np.uint8).reshape(-1, 1, 1, 1)
        for kind, values in (("x", images), ("y", labels)):
            with h5py.File(root / f"camelyonpatch_level_2_split_{name}_{kind}.h5", "w") as file:
                file[kind] = values


def eurosat(root: Path) -> None:
    for i in range(SIZE):
        label = ("AnnualCrop", "Forest", "HerbaceousVegetation")[i % 3]
        _save(root / label / f"{label}_{i + 1}.jpg", i)


def resisc45(root: Path) -> None:
    for i in range(SIZE):
        label = ("airplane", "airport", "baseball_diamond")[i % 3]
        _save(root / label / f"{label}_{i + 1:03d}.jpg", i)


def clevr(root: Path) -> None:
    for folder in ("scenes", "questions"):
        (root / folder).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for part, name in (("train", "train"), ("validation", "val"), ("test", "test")):
        scenes, questions = [], []
        for i in _numbers(part):
            file = f"CLEVR_{name}_{i:06d}.png"
            formats.save(root / "images" / name / file, formats.pixels(i, (16, 20)))
            objects = [
                {"color": "red", "material": "rubber", "shape": "cube", "size": "large",
                 "rotation": 1.0, "pixel_coords": [3, 4, float(rng.uniform(7, 11))],
                 "3d_coords": [1.0, 2.0, 3.0]}
                for _ in range(rng.integers(3, 11))
            ]  # fmt: skip
            directions = {"left": [1.0, 0.0, 0.0]}
            scenes.append({"image_filename": file, "objects": objects, "directions": directions})
            questions.append({"image_filename": file, "question": "?", "answer": "1"})
        if name != "test":
            text = json.dumps({"info": {"split": name}, "scenes": scenes})
            (root / "scenes" / f"CLEVR_{name}_scenes.json").write_text(text)
        text = json.dumps({"questions": questions})
        (root / "questions" / f"CLEVR_{name}_questions.json").write_text(text)


def dmlab(root: Path) -> None:
    root.mkdir(parents=True)
    for part in ("train", "validation", "test"):
        numbers = _numbers(part)
        for shard in range(2):
            records = [
                formats.example({
                    "image": formats.encoded(formats.pixels(i, (360, 480)) // 8, "JPEG"),
                    "filename": f"frame_{i}.jpg".encode(), "label": [i % 6],
                })
                for i in numbers[shard::2]
            ]  # fmt: skip
            formats.tfrecord(root / f"dmlab-{part}.tfrecord-{shard:05d}-of-00002", records)


def kitti_dist(root: Path) -> None:
    """Twenty videos of three frames, listed in a shuffled order."""
    rng = np.random.default_rng(1)
    (root / "mapping").mkdir(parents=True)
    (root / "training" / "label_2").mkdir(parents=True)
    videos = [f"2011_09_26 2011_09_26_drive_{v:04d}_sync {f:010d}" for v in range(20)
              for f in range(3)]  # fmt: skip
    (root / "mapping" / "train_mapping.txt").write_text("\n".join(videos) + "\n")
    order = rng.permutation(60) + 1
    (root / "mapping" / "train_rand.txt").write_text(",".join(map(str, order)) + "\n")
    kinds = ("Car", "Van", "Truck", "Pedestrian", "DontCare")
    for i in range(60):
        formats.save(root / "training" / "image_2" / f"{i:06d}.png", formats.pixels(i, (16, 20)))
        lines = [
            f"{kinds[rng.integers(5)]} 0.00 0 -1.5 1.0 2.0 9.0 8.0 1.5 1.6 3.7 "
            f"1.0 1.5 {rng.uniform(1, 40):.2f} 0.1"
            for _ in range(rng.integers(1, 4))
        ]
        (root / "training" / "label_2" / f"{i:06d}.txt").write_text("\n".join(lines) + "\n")


def dsprites(root: Path) -> None:
    import h5py

    root.mkdir(parents=True)
    rng = np.random.default_rng(2)
    limits = [1, 3, 6, 40, 32, 32]
    with h5py.File(root / "dsprites_ndarray_co1sh3sc6or40x32y32_64x64.hdf5", "w") as file:
        file["imgs"] = np.stack([formats.pixels(i, (64, 64), 1) % 2 for i in range(SIZE)])
        file["latents/classes"] = np.stack([rng.integers(0, limits) for _ in range(SIZE)])
        file["latents/values"] = np.zeros((SIZE, 6))


def smallnorb(root: Path) -> None:
    root.mkdir(parents=True)
    rng = np.random.default_rng(3)
    for part, stem in (("train", "46789x9x18x6x2x96x96-training"),
                       ("test", "01235x9x18x6x2x96x96-testing")):  # fmt: skip
        numbers = _numbers(part)
        images = np.stack([
            np.stack([formats.pixels(2 * i + c, (96, 96), 1) for c in (0, 1)]) for i in numbers
        ])  # fmt: skip
        info = np.stack([
            [i % 10, rng.integers(9), 2 * rng.integers(18), rng.integers(6)] for i in numbers
        ]).astype("<i4")  # fmt: skip
        category = np.array([i % 5 for i in numbers], "<i4")
        for kind, values in (("dat", images), ("cat", category), ("info", info)):
            magic = 0x1E3D4C55 if values.dtype == np.uint8 else 0x1E3D4C54
            sizes = [*values.shape, *[1] * (3 - values.ndim)]
            head = np.array([magic, values.ndim, *sizes], "<i4").tobytes()
            (root / f"smallnorb-5x{stem}-{kind}.mat").write_bytes(head + values.tobytes())


def sun397(root: Path) -> None:
    """Four classes, one nested; images above and below 120,000 pixels, some not JPEG."""
    classes = ("/a/abbey", "/c/church/outdoor", "/c/church/indoor", "/y/yard")
    kinds = ("JPEG", "JPEG", "PNG", "BMP")
    for part, short in (("train", "tr"), ("validation", "va"), ("test", "te")):
        keys = [f"{classes[i % 4]}/sun_{i:04d}.jpg" for i in _numbers(part)]
        (root / "SUN397").mkdir(parents=True, exist_ok=True)
        (root / f"sun397_tfds_{short}.txt").write_text("\n".join(keys) + "\n")
        for i, key in zip(_numbers(part), keys, strict=True):
            size = (400, 333 + i) if i % 5 == 0 else (40, 30)
            file = root / "SUN397" / key[1:]
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(formats.encoded(_smooth(i, size), kinds[i % 4]))


def retinopathy(root: Path) -> None:
    """Discs on black, one image without any."""
    for part, folder in (("train", "train"), ("validation", "test"), ("test", "test")):
        for i in _numbers(part):
            image, (y, x) = _smooth(i, (64, 96)), np.ogrid[:64, :96]
            image[(y - 32) ** 2 + (x - 48) ** 2 > (20 + i % 9) ** 2] = 0
            file = root / folder / f"{i}_{('left', 'right')[i % 2]}.jpeg"
            formats.save(file, image * (i != 3), quality=95)

    def levels(part: str) -> list[str]:
        return [f"{i}_{('left', 'right')[i % 2]},{i % 5}" for i in _numbers(part)]

    (root / "trainLabels.csv").write_text("\n".join(["image,level", *levels("train")]) + "\n")
    later = [f"{line},Public" for line in levels("validation")]
    later += [f"{line},Private" for line in levels("test")]
    text = "\n".join(["image,level,Usage", *later[::2], *later[1::2]])
    (root / "retinopathy_solution.csv").write_text(text + "\n")


def _smooth(index: int, size: tuple[int, int]) -> np.ndarray:
    """A coloured image that survives JPEG."""
    image = Image.fromarray(formats.pixels(index, (5, 7)))
    return np.array(image.resize(size[::-1], Image.Resampling.BICUBIC))


MAKERS = {
    "cifar100": cifar100, "dtd": dtd, "flowers102": flowers102, "pets": pets, "svhn": svhn,
    "patch_camelyon": patch_camelyon, "eurosat": eurosat, "resisc45": resisc45,
    "clevr_count": clevr, "clevr_dist": clevr, "dmlab": dmlab, "kitti_dist": kitti_dist,
    "dsprites_loc": dsprites, "dsprites_ori": dsprites, "smallnorb_azi": smallnorb,
    "smallnorb_ele": smallnorb, "sun397": sun397, "retinopathy": retinopathy,
}  # fmt: skip
