"""Small records, suites and table descriptions for the tests of the report."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from snella.report import Missing, SuiteInfo, TableSpec, parse_spec

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
PAPER = SuiteInfo("paper", "FGVC and VTAB-1k", {"fgvc": FGVC, **VTAB})


def record(method: str, dataset: str, value: float | None, seed: int = 0, **changes: Any) -> dict:
    """A record of a run that reached ``value`` (a fraction) in its last epoch."""
    protocol = {"normalisation": "inception", "selection": "last", "pixels": "as-is", "lr": 1e-3}
    result = {
        "schema": 1,
        "run": {
            "suite": changes.pop("suite", "mine"),
            "backbone": changes.pop("backbone", "vit-quick"),
            "dataset": dataset,
            "method": method,
            "protocol": "quick",
            "seed": seed,
        },
        "status": "ok",
        "reason": None,
        "metric": "top1",
        "metrics": {} if value is None else {"last": {"epoch": 9, "top1": value}},
        "parameters": {"trainable": 11_330, "head": 970, "with_head": 12_300, "total": 663_000},
        "cost": {"gflops": 0.011, "train_seconds": 14.2},
        "protocol": protocol | changes.pop("protocol", {}),
    }
    return result | changes


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
