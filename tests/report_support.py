"""Small records, suites and table descriptions for the tests of the report."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from snella.records import sign
from snella.report import Missing, SuiteInfo, TableSpec, build_table, parse_spec, tidy, write_table
from snella.report.table import Table

GROUPS = {"fgvc": ["beetles", "leaves"], "natural": ["digits", "photos"], "structured": ["count"]}
DATASETS = [dataset for group in GROUPS.values() for dataset in group]
METHODS = {"full": "Full", "linear": "Linear", "lora-8": "LoRA-8"}
QUICK = SuiteInfo("quick", "Quick suite (demo)", GROUPS, demo=True, labels={"digits": "Digits"})
REAL = SuiteInfo("mine", "My suite", GROUPS)
VTAB = {
    "natural": ["cifar100", "caltech101", "dtd", "flowers102", "pets", "svhn", "sun397"],
    "specialized": ["patch_camelyon", "eurosat", "resisc45", "retinopathy"],
    "structured": [
        "clevr_count",
        "clevr_dist",
        "dmlab",
        "kitti_dist",
        "dsprites_loc",
        "dsprites_ori",
        "smallnorb_azi",
        "smallnorb_ele",
    ],
}
FGVC = ["cub", "nabirds", "oxford_flowers", "stanford_dogs", "stanford_cars"]
FULL_IMAGE = ["cifar100-full", "svhn-full", "food101-full"]
PAPER = SuiteInfo(
    "paper",
    "FGVC and VTAB-1k",
    {"fgvc": FGVC, **VTAB, "full_image": FULL_IMAGE},
    backbone="vit-b16",
)


TOP1 = {
    "name": "top1",
    "title": "Top-1 accuracy",
    "unit": "%",
    "higher_is_better": True,
    "lower": 0.0,
    "upper": 1.0,
}


def record(method: str, dataset: str, value: float | None, seed: int = 0, **changes: Any) -> dict:
    """A record (schema 2) of a run that reached ``value`` (a fraction) in its last epoch."""
    protocol = {"normalisation": "inception", "selection": "last", "pixels": "as-is", "lr": 1e-3}
    result = {
        "schema": 2,
        "run": {
            "suite": changes.pop("suite", "mine"),
            "backbone": changes.pop("backbone", "vit-quick"),
            "dataset": dataset,
            "method": method,
            "protocol": "quick",
            "seed": seed,
        },
        "task": "classification",
        "status": "ok",
        "reason": None,
        "metric": "top1",
        "metric_info": [TOP1],
        "metrics": {} if value is None else {"last": {"epoch": 9, "top1": value}},
        "groups": {},
        "scores": None,
        "test_size": 500,
        "parameters": {"trainable": 11_330, "head": 970, "with_head": 12_300, "total": 663_000},
        "cost": {"gflops": 0.011, "train_seconds": 14.2},
        "protocol": protocol | changes.pop("protocol", {}),
        "warnings": [],
        "identity": {"run": f"{method}/{dataset}/{seed}", "code": f"code of {method}"},
        "provenance": provenance(**changes.pop("provenance", {})),
    }
    return result | changes


def provenance(commit: str = "0123456789", torch: str = "2.8.0", cpu: str = "A CPU") -> dict:
    """Where a run was made."""
    return {
        "git": {"commit": commit, "dirty": False},
        "python": "3.12",
        "packages": {"torch": torch, "peft": "0.21"},
        "hardware": {"cpu": cpu, "gpu": None},
        "threads": 1,
    }


def schema1(value: float, **names: Any) -> dict:
    """A record as the first version wrote it: no task, no metric info, identity a string."""
    new = record(names.pop("method", "full"), names.pop("dataset", "digits"), value, **names)
    dropped = ("task", "metric_info", "groups", "scores", "test_size", "warnings")
    old = {key: content for key, content in new.items() if key not in dropped}
    return old | {"schema": 1, "identity": "abc"}


def write_run(results: Path, made: dict, scores: Mapping[str, np.ndarray] | None = None) -> Path:
    """Write a record below ``results``, with the scores of single images; returns its folder."""
    run = made["run"]
    names = (run["suite"], run["backbone"], run["dataset"], run["method"], f"seed{run['seed']}")
    folder = results / "runs" / Path(*names)
    folder.mkdir(parents=True)
    if scores is not None:
        np.savez(folder / "scores.npz", **{k: np.float32(v) for k, v in scores.items()})
        made = made | {"scores": "scores.npz"}
    final = made["status"] in ("ok", "diverged")
    name = "record.json" if final else "failure.json"
    (folder / name).write_text(json.dumps(sign(made) if made["schema"] == 2 else made))
    return folder


def scored(
    results: Path, method: str, dataset: str, right: np.ndarray, seed: int = 0, **changes: Any
) -> dict:
    """A record with its folder, whose run has ``right`` (N,) images right."""
    made = record(method, dataset, float(np.mean(right)), seed, **changes)
    folder = write_run(results, made, {"last/top1": right})
    return made | {"folder": folder, "scores": "scores.npz"}


def make(runs: Iterable[Any], suite: SuiteInfo | None = None, **changes: Any) -> Table:
    """A table of records."""
    suite = suite or REAL
    methods = changes.pop("methods", METHODS)
    described = spec(**changes)
    frame = tidy(runs, subsets=described.subsets)
    return build_table("table1", described, suite, methods, frame)


def write(
    folder: Path, runs: Iterable[Any], suite: SuiteInfo | None = None, **changes: Any
) -> list[Path]:
    """Write the table ``t`` of records."""
    methods = changes.pop("methods", METHODS)
    described = changes.pop("described", None) or spec(**changes)
    return write_table(build_table("t", described, suite or REAL, methods, tidy(runs)), folder)


def records(
    value: Callable[[str, str, int], float] | float = 0.5,
    methods: Iterable[str] = METHODS,
    datasets: Iterable[str] = DATASETS,
    seeds: Iterable[int] = (0,),
    **changes: Any,
) -> list[dict | Missing]:
    """Records of a whole grid."""
    return [
        record(m, d, value(m, d, s) if callable(value) else value, s, **changes)
        for m in methods
        for d in datasets
        for s in seeds
    ]


def spec(**changes: Any) -> TableSpec:
    """A table like Table 1 over the groups of the tests' suites."""
    data = {
        "caption": "{metric} (%) on {suite}",
        "rows": [{"methods": ["full"]}, {"group": "Others", "methods": ["linear", "lora-8"]}],
        "columns": [
            {"label": "Params ({unit})", "value": "trainable"},
            {"block": "FGVC", "datasets_of": "fgvc", "mean": "tasks"},
            {"block": "VTAB-1k", "groups": ["natural", "structured"], "mean": "groups"},
        ],
    }
    return parse_spec("table1", data | changes)
