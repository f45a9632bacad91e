"""A rehearsal of the paper's Table 1: all 24 sets in their original formats, as miniatures.

Community lists, VPT's json lists, an original release and TFDS records are read, checked and
prepared; two methods train on each with a two-block ViT; the table has all its columns. Nothing
here was tried on the real data, which could not be downloaded where this was written.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import formats
from conftest import ROOT

from snella.jobs.prepare import prepare_dataset
from snella.jobs.tables import write
from snella.runs.execute import execute
from snella.suite.config import Config, load
from snella.suite.plan import plan

COMMUNITY = ["caltech101", "dtd", "flowers102", "pets", "sun397", "retinopathy", "dmlab"]
STORED = {
    "cifar100": "cifar100", "svhn": "svhn_cropped", "patch_camelyon": "patch_camelyon",
    "eurosat": "eurosat", "resisc45": "resisc45",
}  # fmt: skip
NATURAL = ["cifar100", "caltech101", "dtd", "flowers102", "pets", "svhn", "sun397"]
SPECIALIZED = ["patch_camelyon", "eurosat", "resisc45", "retinopathy"]
STRUCTURED = [
    "clevr_count", "clevr_dist", "dmlab", "kitti_dist", "dsprites_loc", "dsprites_ori",
    "smallnorb_azi", "smallnorb_ele",
]  # fmt: skip
FGVC = ["cub", "nabirds", "oxford_flowers", "stanford_dogs", "stanford_cars"]


def community(root: Path, first: int) -> Path:
    labels = {"train800": [0, 1] * 3, "val200": [0, 1], "test": [0, 1, 0, 1]}
    return formats.community(root, labels, first=first)


def records(root: Path, name: str, first: int) -> Path:
    """A TFDS-prepared set with what its label is computed from."""
    builder = STORED.get(name, name.split("_")[0])

    def features(i: int) -> dict[str, Any]:
        depth = [0.0, 0.0, 8.2 + i % 2]
        return {
            "label": [i % 2], "label_x_position": [2 * (i % 2)], "label_orientation": [3 * (i % 2)],
            "label_azimuth": [i % 2], "label_elevation": [i % 2],
            "objects/size": [1] * (3 + i % 2), "objects/pixel_coords": depth,
            "objects/type": [0], "objects/location": [0.0, 0.0, 5.0 + 10 * (i % 2)],
        }  # fmt: skip

    def split(count: int, start: int) -> list[dict[str, Any]]:
        one_bit = builder == "dsprites"
        images = [formats.pixels(first + start + i, (16, 16), 1 if one_bit else 3)
                  for i in range(count)]  # fmt: skip
        return [{"image": formats.encoded(x % 2 if one_bit else x), **features(i)}
                for i, x in enumerate(images)]  # fmt: skip

    parts = {"train": split(30, 0), "validation": split(6, 30), "test": split(10, 40)}
    return formats.tfds(root, builder, "3.0.0", parts)


def make_all(root: Path) -> dict[str, dict[str, Any]]:
    """Write every miniature; returns the overlay of the data sets' entries."""
    entries: dict[str, dict[str, Any]] = {}
    for number, name in enumerate([*NATURAL, *SPECIALIZED, *STRUCTURED]):
        first = 1000 * number
        if name in COMMUNITY:
            entries[name] = {"path": str(community(root / name, first))}
        else:
            folder = records(root / name, name, first)
            options = {"official": f"vtab1k/{name}", "layout": "tfds", "subset": [6, 2]}
            entries[name] = {"path": str(folder), "options": options}
    for number, (name, images) in enumerate(
        {"cub": "images", "oxford_flowers": ".", "stanford_dogs": "Images", "stanford_cars": "."}
        .items()
    ):  # fmt: skip
        entries[name] = {"path": str(formats.vpt(root / name, images, first=50_000 + 100 * number))}
    birds = formats.cub(root / "nabirds", nabirds=True)
    entries["nabirds"] = {"path": str(birds), "options": {"val_share": 0.4}}
    return {name: {"num_classes": None, **entry} for name, entry in entries.items()}


def configured(tmp_path: Path) -> Config:
    kwargs = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
    quiet = {
        "image_size": 16, "train_split": "train", "epochs": 1, "warmup_epochs": 0, "batch_size": 8,
        "evaluate_every": 1,
    }  # fmt: skip
    return load(
        ROOT / "config" / "config.yaml",
        {
            "suite": "rehearsal",
            "results": str(tmp_path / "results"),
            "data": str(tmp_path / "data"),
            "backbones": {
                "tiny": {"arch": "vit_tiny_patch16_224", "kwargs": kwargs, "file": "random"}
            },
            "datasets": make_all(tmp_path / "raw"),
            "protocols": {"rehearsal": quiet},
            "suites": {
                "rehearsal": {
                    "title": "Rehearsal",
                    "demo": True,
                    "backbone": "tiny",
                    "protocol": "rehearsal",
                    "methods": ["linear", "lora-8"],
                    "groups": {
                        "fgvc": FGVC,
                        "natural": NATURAL,
                        "specialized": SPECIALIZED,
                        "structured": STRUCTURED,
                    },
                }
            },
        },
    )


def test_all_24_sets_from_their_formats_to_table_1(tmp_path: Path) -> None:
    config = configured(tmp_path)
    names = [*FGVC, *NATURAL, *SPECIALIZED, *STRUCTURED]
    assert len(names) == 24
    for name in names:
        prepare_dataset(config, name)
    runs = plan(config)
    assert len(runs) == 48
    for run in runs:
        record = execute(run)
        assert record["status"] == "ok", (run.key, record["reason"])
        assert 0 <= record["metrics"]["last"]["top1"] <= 1
    paths = write(config, "table1")
    text = next(p for p in paths if p.suffix == ".csv").read_text()
    columns = text.split("\n")[0].split(",")
    means = ["VTAB-1k mean over tasks", "VTAB-1k mean over groups"]
    groups = ["FGVC mean", "natural", "specialized", "structured", *means]
    assert [column for column in columns if column in {*FGVC, *groups}] == [*FGVC, *groups]
    assert text.count(",linear,Linear,") == text.count(",lora-8,LoRA-8,") == 1
