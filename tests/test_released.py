"""Released settings and protocol presets are valid, and do what the scripts do."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import ROOT

from snella.errors import UserError
from snella.method import ROLES
from snella.methods.base import build_method
from snella.runs.protocol import Protocol
from snella.suite.config import load
from snella.suite.plan import method_path
from snella.suite.settings import settings_of
from snella.tasks.classification.settings import ClassificationSettings

CONFIG = load(ROOT / "config" / "config.yaml")
FILES = sorted((ROOT / "config" / "released").glob("*.yaml"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_released_settings_are_valid(file):
    content = yaml.safe_load(file.read_text())
    assert content["source"]
    for row, sets in content["rows"].items():
        entry = CONFIG.methods[row]
        for dataset, found in sets.items():
            assert dataset in CONFIG.datasets, (row, dataset)
            values = {"epochs": 100, "hyperparameters": "released", **found.get("protocol", {})}
            common = {k: v for k, v in values.items() if k in Protocol.model_fields}
            Protocol(**common)
            rest = {k: v for k, v in values.items() if k not in common}
            ClassificationSettings(**rest)
            hyper = {**entry.hyperparameters, **found.get("hyperparameters", {})}
            build_method(Path(method_path(CONFIG, entry.file)), hyper)


def test_counts_of_released_scripts():
    sizes = {row: len({d for d in sets if not d.endswith("-tfds")})
             for row, sets in CONFIG.released.items()}  # fmt: skip
    assert sizes["snell-8"] == sizes["snell-16"] == 5
    assert (sizes["snell-32"], sizes["snella-32"]) == (24, 14)
    assert (sizes["gps"], sizes["ssf"], sizes["noah"], sizes["fact-tt"]) == (24, 25, 19, 19)
    assert (sizes["convpass"], sizes["convpass-attn"]) == (19, 19)
    alone = CONFIG.released["convpass-attn"]["resisc45"]
    assert alone.hyperparameters == {"scale": 100, "convolution": "xavier"}
    twin = CONFIG.released["gps"]["patch_camelyon-tfds"]
    assert twin == CONFIG.released["gps"]["patch_camelyon"]
    assert CONFIG.released["gps"]["patch_camelyon"].hyperparameters == {"connections": 2}


def test_mean_parameters_of_noahs_subnets_are_the_published_ones():
    total = 0
    for name, entry in CONFIG.released["noah"].items():
        if not name.endswith("-tfds"):
            p, lora, a = (entry.hyperparameters[k] for k in ("prompts", "lora", "adapter"))
            assert len(p) == len(lora) == len(a) == 12
            total += 768 * sum(p) + 3072 * sum(lora) + sum(1537 * w + 768 for w in a)
    assert round(total / 19) == 360_134


def test_mean_connections_of_gps_are_those_of_the_scripts():
    counts = [
        83_712 * (entry.hyperparameters["connections"] + 1)
        for name, entry in CONFIG.released["gps"].items() if not name.endswith("-tfds")
    ]  # fmt: skip
    assert 0.33 < 100 * sum(counts) / len(counts) / 85_798_656 < 0.35


@pytest.mark.parametrize("name", list(CONFIG.protocols))
def test_presets_are_valid(name):
    values = dict(CONFIG.protocols[name])
    parts = [*values.pop("rows", {}).values(), *values.pop("collections", {}).values()]
    common = {k: v for k, v in values.items() if k in Protocol.model_fields}
    Protocol(**common)
    assert all(values | part for part in parts)
    rest = {k: v for k, v in values.items() if k not in common}
    if not {"max_steps", "prompt"} & set(rest):
        info = {k: v for k, v in rest.items() if k in ClassificationSettings.model_fields}
        ClassificationSettings(**info)


def rates(protocol):
    return [protocol.lr * protocol.lr_factor(e, 0.5) for e in range(protocol.epochs)]


def preset(name, **changes):
    values = {**CONFIG.protocols[name], **changes}
    return Protocol(**{k: v for k, v in values.items() if k in Protocol.model_fields})


def test_schedules_meet_the_authors_codes():
    golden = np.load(ROOT / "tests/golden/spt_gps/lr_schedules.npz")
    np.testing.assert_allclose(rates(preset("spt")), golden["spt"], rtol=1e-12)
    np.testing.assert_allclose(rates(preset("gps", lr=2e-3)), golden["gps"], rtol=1e-12)


def test_vpt_changes_its_rate_once_per_epoch_from_zero():
    protocol = preset("vpt")
    assert protocol.lr_factor(0, 0.9) == 0
    assert protocol.lr_factor(5, 0.0) == protocol.lr_factor(5, 0.9) == pytest.approx(0.5)
    assert protocol.lr_factor(10, 0.0) == pytest.approx(1)
    assert protocol.lr_factor(55, 0.3) == pytest.approx(0.5)


def test_cool_down_counts_among_the_epochs():
    with pytest.raises(ValueError, match="together must be below epochs"):
        Protocol(epochs=15, warmup_epochs=5, cooldown_epochs=10)


def test_numbers_of_looks_at_the_test_set():
    def looks(name, **changes):
        protocol = preset(name, **changes)
        return sum(protocol.looks(e, protocol.epochs) for e in range(protocol.epochs))

    assert (looks("snella-released"), looks("snella-released", evaluate_every=1)) == (19, 100)
    assert (looks("fact"), looks("gps"), looks("ssf")) == (10, 110, 110)


def test_spt_counts_as_its_released_allocations_do():
    """All 266 files: sizes of modules, and what their totals are made of."""
    size = type(build_method(ROOT / "baselines" / "spt.py", {})).adapt.__globals__["module_size"]
    shapes = {"fc1": (3072, 768), "fc2": (768, 3072)}
    with (ROOT / "config/released/spt_allocations.csv").open(encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == len({tuple(line.values())[:3] for line in lines}) == 2 * 19 * 7
    script = yaml.safe_load((ROOT / "config/released/spt.yaml").read_text(encoding="utf-8"))
    assert {line["dataset"] for line in lines} == set(script["rows"]["spt-lora"])
    for line in lines:
        modules = {role: int(line[f"structured_{role}"]) for role in ROLES}
        sizes = {r: size(line["structured_type"], 8, *shapes.get(r, (768, 768))) for r in modules}
        structured = sum(n * sizes[role] for role, n in modules.items())
        assert int(line["structured_matrix_params"]) == structured
        assert int(line["structured_matrices"]) == sum(modules.values())
        single = {k: int(line[f"unstructured_{k}_entries"]) for k in ("weight", "bias", "norm")}
        total = structured + int(line["full_vector_params"]) + sum(single.values()) + 768
        assert int(line["allocated_params"]) == total
        assert int(line["trained_params_without_head"]) == total - single["norm"]


def made(suite, method, dataset, **changes):
    """The settings of a row on a data set, with keys of the configuration changed."""
    dotted = {name.replace("__", "."): value for name, value in changes.items()}
    config = load(ROOT / "config" / "config.yaml", {"suite": suite, **dotted})
    file = method_path(config, config.methods[method].file)
    (common, settings, _), _ = settings_of(config, config.suites[suite], method, dataset, file)
    return common.model_dump() | settings


def some(values, *names):
    return tuple(values[name] for name in names)


def test_scripts_rates_are_not_overruled_by_a_rows_own():
    """The rates in config/methods.yaml were found for AdamW and other tasks."""
    vpt = {"suites__vtab1k__protocol": "vpt"}
    names = ("optimizer", "lr", "weight_decay", "batch_size")
    for row in ("vpt-deep", "vpt-shallow", "bias", "partial-1", "mlp3"):
        assert some(made("vtab1k", row, "dtd", **vpt), *names) == ("sgd", 1.25, 1e-3, 128)
    assert some(made("vtab1k", "linear", "dtd", **vpt), *names) == ("sgd", 10.0, 1e-3, 1024)
    assert some(made("vtab1k", "full", "dtd", **vpt), *names) == ("adamw", 1e-4, 1e-2, 128)
    for row in ("full", "linear", "ssf", "snella-8"):
        released = made("kvasir-released", row, "kvasir-seg-released")
        assert some(released, *names) == ("adamw", 2e-4, 1e-2, 1)
        assert some(made("kvasir", row, "kvasir-seg"), *names) == ("adamw", 1e-3, 1e-2, 1)
    gps = made("kvasir-released", "gps", "kvasir-seg-released")
    assert some(gps, *names, "train_split") == ("adam", 2e-4, 0.0, 1, "trainval")
    for row in ("full", "ssf", "snella-8"):
        assert some(made("dreambooth", row, "dreambooth-cat"), "lr", "weight_decay") == (1e-4, 1e-4)
    assert made("vtab1k", "vpt-deep", "dtd")["lr"] == 1e-2  # a protocol of ours keeps them


def test_released_segmentation_keeps_its_rate_within_an_epoch():
    golden = np.load(ROOT / "tests/golden/spt_gps/lr_schedules.npz")
    np.testing.assert_allclose(rates(preset("released-segmentation")), golden["sam"], rtol=1e-12)


def test_presets_know_other_collections():
    names = ("train_split", "augmentation", "resize", "resize_size", "interpolation", "mixup")
    vtab = ("trainval", "none", "square", None, "bicubic", 0.0)
    expected = {
        "snella-released": ("train", "timm", "shorter-side", 256, "bilinear", 0.0),
        "spt": ("train", "timm", "square", 256, "bicubic", 0.0),
        "vpt": ("train", "flip", "shorter-side", 256, "bilinear", 0.0),
        "fact": ("train", "timm", "shorter-side", 256, "bilinear", 0.0),
        "ssf": ("trainval", "random-resized-crop", "shorter-side", 248, "bicubic", 0.8),
        "gps": ("trainval", "random-resized-crop", "shorter-side", 248, "bicubic", 0.8),
        "fair": ("trainval", "timm", "shorter-side", 256, "bicubic", 0.0),
    }
    for name, fgvc in expected.items():
        changes = {"suites__vtab1k__protocol": name, "suites__vtab1k__groups__fgvc": ["cub"]}
        found = {d: made("vtab1k", "linear", d, **changes) for d in ("dtd", "cub")}
        assert some(found["cub"], *names) == fgvc, name
        assert some(found["dtd"], *names[:4], *names[5:]) == vtab[:4] + vtab[5:], name
    complete = made("full-image", "vpt-deep", "svhn-full")
    wanted = ("batch_size", "lr", "weight_decay", "warmup_epochs", "min_lr", "augmentation")
    assert some(complete, *wanted) == (128, 5e-3, 1e-2, 20, 0.0, "random-resized-crop")


def test_presets_drop_the_last_batch_and_resize_as_their_scripts():
    """FacT's loader and timm's, which SSF and GPS use, drop it; SNELL's and VPT's do not."""
    names = ("drop_last", "interpolation", "crop_interpolation")
    expected = {
        "snella-released": (False, "bicubic", "bicubic"), "spt": (False, "bicubic", "bicubic"),
        "vpt": (False, "tf-bilinear", "bicubic"), "adapter-plus": (False, "tf-bilinear", "bicubic"),
        "ssf": (True, "bicubic", "bicubic"), "gps": (True, "bicubic", "bicubic"),
        "fact": (True, "bicubic", "bicubic"),
    }  # fmt: skip
    for name, wanted in expected.items():
        found = made("vtab1k", "linear", "dtd", suites__vtab1k__protocol=name)
        assert some(found, *names) == wanted, name
    birds = made("fgvc", "ssf", "cub", suites__fgvc__protocol="ssf")
    assert birds["crop_interpolation"] == "random"


def test_names_in_parts_of_a_preset_are_checked():
    for part, name, close in (("rows", "fulll", "full"), ("collections", "fgcv", "fgvc")):
        changes = {f"protocols__fair__{part}": {name: {"lr": 0.1}}}
        with pytest.raises(UserError, match=f"protocol fair: '{name}'.*{close}"):
            made("vtab1k", "full", "dtd", **changes)
        with pytest.raises(UserError, match=f"`{part}` of a protocol maps names"):
            made("vtab1k", "full", "dtd", **{f"protocols__fair__{part}": [1]})


def test_fair_takes_the_backbones_own_normalisation():
    for backbone, own in (
        ("vit-b16", "inception"), ("vit-b16-mae", "imagenet"), ("swin-b", "imagenet"),
        ("clip-b16", "clip"), ("dinov2-b14", "imagenet"),
    ):  # fmt: skip
        assert (
            made("vtab1k", "full", "dtd", suites__vtab1k__backbone=backbone)["normalisation"] == own
        )
    with pytest.raises(UserError, match="backbone vit-b16 does not say how its pixels"):
        made("vtab1k", "full", "dtd", backbones={"vit-b16": {"normalisation": None}})


def test_tables_name_rows_that_there_are():
    missing = {m for spec in CONFIG.tables.values() for row in spec["rows"]
               for m in row["methods"] if m not in CONFIG.methods}  # fmt: skip
    assert not missing
