"""All records as one tidy pandas frame: one row per run, selection and metric.

Tables, statistics, comparisons with published numbers, figures and notebooks read this frame
and nothing else. A run without numbers (failed, or not run yet) has one row without a value, so
that whoever counts rows sees it.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

Record = Mapping[str, Any]
Seeds = Mapping[tuple[str, str, str], Mapping[int, float]]
"""Numbers by (suite, method, data set) and seed."""
NOT_RUN = "not run"
RUN = ("suite", "backbone", "dataset", "method", "seed")
"""What names a run; the protocol is a property of it."""
NAMES = ("suite", "backbone", "dataset", "group", "method", "label", "protocol", "seed", "task")
METRIC = (
    *("selection", "epoch", "subset", "metric", "title", "value", "unit"),
    *("higher_is_better", "lower", "upper", "chance", "primary", "selected"),
)
PARAMETERS = ("trainable", "with_head", "head", "total")
COST = (
    *("gflops", "peak_memory_mb", "train_seconds", "train_seconds_per_image"),
    "inference_seconds_per_image",
)
PACKAGES = ("torch", "timm", "peft", "numpy")
IDENTITY = ("run", "training", "evaluation", "settings", "code", "libraries", "data", "backbone")
ORIGIN = (
    *("commit", "dirty", "python", *PACKAGES, "cpu", "gpu", "hardware", "threads", "device"),
    *("started", "ended", *(f"identity.{name}" for name in IDENTITY), "schema"),
)
REST = ("merged", "merge_difference", "merge_reason", "hyperparameters", "scores", "stale")
COLUMNS = (
    *(*NAMES, "status", "reason", *METRIC, "test_size", *PARAMETERS, *COST, *REST),
    *(*ORIGIN, "warnings", "folder", "run"),
)
NUMBERS = ("value", "lower", "upper", "chance", "test_size", *PARAMETERS, *COST, "merge_difference")


@dataclass(frozen=True)
class Missing:
    """A run that is expected and has left no record."""

    method: str
    dataset: str
    seed: int
    suite: str
    backbone: str = ""
    reason: str = NOT_RUN


def tidy(
    records: Iterable[Record | Missing],
    *,
    subsets: bool = False,
    labels: Mapping[str, str] | None = None,
    groups: Mapping[str, Mapping[str, str]] | None = None,
) -> pd.DataFrame:
    """One row per run, selection and metric, with the columns of :data:`COLUMNS`.

    Protocol fields follow as ``protocol.<field>``. ``value`` is as recorded (a fraction where
    ``unit`` is "%"); ``subset`` is empty for the whole test set, and with ``subsets`` there are
    further rows for every group of the record (class, subject, test set). A record may carry
    ``folder`` and ``stale`` (why it does not fit the configuration) beside its own fields.
    ``warnings`` are one a line.
    ``labels`` name methods, ``groups`` give a data set's group by suite.
    """
    import pandas as pd

    runs: list[dict[str, Any]] = []
    protocols: list[Mapping[str, Any]] = []
    index: list[int] = []
    rows: list[tuple[Any, ...]] = []
    for number, record in enumerate(records):
        run = _missing(record) if isinstance(record, Missing) else _run(record)
        run["label"] = (labels or {}).get(run["method"], run["method"])
        run["group"] = (groups or {}).get(run["suite"], {}).get(run["dataset"], "")
        run["run"] = number
        runs.append(run)
        protocols.append({} if isinstance(record, Missing) else record.get("protocol") or {})
        numbers = [] if isinstance(record, Missing) else list(_numbers(record, subsets))
        rows += numbers or [_without_value(record)]
        index += [number] * max(1, len(numbers))
    per_run = pd.DataFrame.from_records(runs).join(_fields(protocols))
    values = pd.DataFrame.from_records(rows, columns=list(METRIC))
    frame = values.join(per_run.iloc[index].reset_index(drop=True)) if runs else values
    protocol = sorted(c for c in frame.columns if c.startswith("protocol."))
    frame = frame.reindex(columns=[*COLUMNS, *protocol])
    for name in NUMBERS:
        frame[name] = pd.to_numeric(frame[name], errors="coerce")
    return frame


def _fields(protocols: list[Mapping[str, Any]]) -> pd.DataFrame:
    """One column per protocol field; what is a list or mapping as JSON."""
    import pandas as pd

    frame = pd.DataFrame.from_records(protocols).add_prefix("protocol.")
    for name in frame.columns[frame.dtypes == "object"]:
        frame[name] = [
            json.dumps(v, sort_keys=True) if isinstance(v, list | dict) else v for v in frame[name]
        ]
    return frame


def as_text(value: object) -> str:
    """A value of the frame as it was recorded: pandas makes integers beside gaps floats."""
    whole = isinstance(value, float) and value.is_integer()
    return str(int(value)) if whole else str(value)  # type: ignore[call-overload]


def seeds_of(rows: pd.DataFrame, number: str = "value") -> Seeds:
    """The finite numbers of a column by (suite, method, data set), and by seed in these."""
    found: dict[tuple[str, str, str], dict[int, float]] = defaultdict(dict)
    columns = [rows[name] for name in ("suite", "method", "dataset", "seed", number)]
    for suite, method, dataset, seed, value in zip(*columns, strict=True):
        if math.isfinite(value):
            found[suite, method, dataset][int(seed)] = float(value)
    return dict(found)


def _missing(run: Missing) -> dict[str, Any]:
    empty = dict.fromkeys(("protocol", "task", "stale", "folder", "scores", "warnings"), "")
    return {**vars(run), **empty, "status": NOT_RUN}


def _run(record: Record) -> dict[str, Any]:
    """All that a record says besides its metrics, flat."""
    made = record.get("provenance") or {}
    git, hardware = made.get("git") or {}, made.get("hardware") or {}
    packages, identity = made.get("packages") or {}, record.get("identity") or {}
    merge, method = record.get("merge") or {}, record.get("method") or {}
    parameters, cost = record.get("parameters") or {}, record.get("cost") or {}
    result: dict[str, Any] = {name: record["run"].get(name) for name in (*RUN, "protocol")}
    result |= {
        "task": record.get("task", ""),
        "status": record["status"],
        "reason": " ".join(str(record.get("reason") or "").split()),
        "test_size": record.get("test_size"),
        "merged": merge.get("merged"),
        "merge_difference": merge.get("max_difference"),
        "merge_reason": merge.get("reason") or "",
        "hyperparameters": json.dumps(method.get("hyperparameters") or {}, sort_keys=True),
        "scores": record.get("scores") or "",
        "stale": record.get("stale") or "",
        "commit": git.get("commit"),
        "dirty": git.get("dirty"),
        "hardware": hardware.get("gpu") or hardware.get("cpu"),
        "cpu": hardware.get("cpu"),
        "gpu": hardware.get("gpu"),
        "schema": record.get("schema"),
        "warnings": "\n".join(" ".join(w.split()) for w in record.get("warnings") or ()),
        "folder": str(record.get("folder", "")),
    }
    result |= {n: parameters.get(n) for n in PARAMETERS} | {n: cost.get(n) for n in COST}
    result |= {name: packages.get(name) for name in PACKAGES}
    result |= {name: made.get(name) for name in ("python", "threads", "device", "started", "ended")}
    if isinstance(identity, Mapping):
        result |= {f"identity.{name}": identity.get(name) for name in IDENTITY}
    return result


def _numbers(record: Record, subsets: bool) -> Iterable[tuple[Any, ...]]:
    """The metric columns of every number that a record holds."""
    for selection, found in (record.get("metrics") or {}).items():
        for name, value in found.items():
            if name == "epoch":
                continue
            title, *about = _about(record, name, selection)
            yield selection, found.get("epoch"), "", name, title, value, *about
            if subsets:
                parts = ((record.get("groups") or {}).get(selection) or {}).get(name) or {}
                for part, number in parts.items():
                    yield selection, found.get("epoch"), part, name, title, number, *about


def _without_value(record: Record | Missing) -> tuple[Any, ...]:
    """The metric columns of a run that has no number."""
    if isinstance(record, Missing):
        return "", None, "", "", "", None, "", True, None, None, None, True, True
    name, selection = record.get("metric") or "", _selection(record)
    title, *about = _about(record, name, selection)
    return selection, None, "", name, title, None, *about


def _about(record: Record, name: str, selection: str) -> tuple[Any, ...]:
    """Title, unit, direction, range and chance level of a metric; whether it is the one to show."""
    infos: Iterable[Mapping[str, Any]] = record.get("metric_info") or ()
    info = next((i for i in infos if i["name"] == name), {})
    unit, better = info.get("unit", ""), info.get("higher_is_better", True)
    limits = (info.get("lower"), info.get("upper"), info.get("chance"))
    shown = (name == record.get("metric"), selection == _selection(record))
    return (info.get("title", name), unit, better, *limits, *shown)


def _selection(record: Record) -> str:
    return str((record.get("protocol") or {}).get("selection", "last"))
