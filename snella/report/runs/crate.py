"""Results as a Workflow Run RO-Crate 0.5: the workflow, its tables, and every run as an action.

Workflow: the Snakefile with the rules and the configuration. One action is the whole workflow, from
the configuration to the tables; one action per run goes from its settings to its record, with its
times, how it ended, and why. https://www.researchobject.org/workflow-run-crate/
"""

from __future__ import annotations

import errno
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from snella.errors import UserError
from snella.files import atomic, atomic_folder
from snella.records import FAILURE, FINISHED, RECORD, Record, read_record
from snella.report.runs.details import RUN_FILES

if TYPE_CHECKING:
    from rocrate.rocrate import ROCrate

PROFILES = {
    "https://w3id.org/ro/wfrun/process/0.5": "Process Run Crate",
    "https://w3id.org/ro/wfrun/workflow/0.5": "Workflow Run Crate",
    "https://w3id.org/workflowhub/workflow-ro-crate/1.0": "Workflow RO-Crate",
}
LICENCE = "https://spdx.org/licenses/MIT"
STATUS = "http://schema.org/{}ActionStatus"
ADAPTER = "adapter.safetensors"
KINDS = {
    ".json": "application/json", ".csv": "text/csv", ".txt": "text/plain", ".md": "text/markdown",
    ".tex": "application/x-tex", ".pdf": "application/pdf", ".png": "image/png",
    ".html": "text/html", ".yaml": "application/yaml", ".smk": "text/plain",
    ".safetensors": "application/octet-stream",
}  # fmt: skip


@dataclass(frozen=True)
class Sources:
    """What goes into a crate: files as (path on disk, place in the crate).

    ``runs`` are folders of runs by their place below ``runs/``.
    """

    workflow: Path
    rules: Sequence[tuple[Path, str]]
    configuration: Sequence[tuple[Path, str]]
    tables: Sequence[tuple[Path, str]]
    runs: Mapping[str, Path]


def write(sources: Sources, out: Path, version: str, *, adapters: bool = False) -> Path:
    """Write the crate into the new folder ``out``, or a file if it ends in .zip; return its path.

    Raises :class:`~snella.errors.UserError` if ``out`` is a folder with content, or if there is no
    record to describe.
    """
    if (out.is_dir() and any(out.iterdir())) or (out.is_file() and out.suffix != ".zip"):
        raise UserError(f"{out} exists; name a new folder or a .zip file.")
    crate = build(sources, version, adapters=adapters)
    files = [Path(part.source) for part in crate.data_entities if getattr(part, "source", None)]
    needed = sum(file.stat().st_size for file in files if file.is_file())
    if out.suffix == ".zip":
        with atomic(out) as temporary:
            if shutil.disk_usage(temporary.parent).free < needed:  # else rocrate prints a traceback
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            crate.write_zip(temporary)
    else:
        with atomic_folder(out, bytes_needed=needed, purpose="the crate") as folder:
            crate.write(folder)
    return out


def build(sources: Sources, version: str, *, adapters: bool = False) -> ROCrate:
    """The crate in memory; its files are read when it is written."""
    from rocrate.rocrate import ROCrate

    records = {
        name: record
        for name, folder in sources.runs.items()
        if (record := read_record(folder)) is not None
    }
    if not records:
        raise UserError("There are no records to export; run the workflow first.")
    crate = ROCrate(version="1.1")
    times = _times(records.values())
    crate.name = "Results of snella-bench"
    crate.description = (
        "Parameter-efficient fine-tuning of vision models: tables, and the record of every run "
        f"behind them ({len(records)} runs)."
    )
    crate.license = LICENCE
    crate.add_jsonld({"@id": LICENCE, "@type": "CreativeWork", "name": "MIT License"})
    crate.root_dataset["author"] = crate.add_jsonld({
        "@id": "#authors", "@type": "Organization", "name": "The snella-bench authors",
    })  # fmt: skip
    if times:
        crate.datePublished = times[-1]
    profiles = [
        crate.add_jsonld(
            {"@id": url, "@type": "CreativeWork", "name": name, "version": url.rpartition("/")[2]}
        )
        for url, name in PROFILES.items()
    ]
    crate.root_dataset["conformsTo"] = profiles
    workflow = _workflow(crate, sources, version)
    configuration = [_file(crate, *pair) for pair in sources.configuration]
    tables = [_file(crate, *pair) for pair in sources.tables]
    actions, made = [], []
    for name, record in records.items():
        action, file = _run(crate, name, sources.runs[name], record, adapters)
        actions.append(action)
        made.append(file)
    _parameter(crate, workflow, "input", "configuration", configuration)
    _parameter(crate, workflow, "output", "tables", tables)
    counts = Counter(record["status"] for record in records.values())
    states = ", ".join(f"{n} {status}" for status, n in counts.items())
    whole = crate.add_action(
        workflow,
        identifier="#workflow-run",
        object=configuration,
        result=[*tables, *made],
        properties={
            "name": "The workflow, from its configuration to the tables",
            "description": f"{len(records)} runs, {states}.",
            **({"startTime": times[0], "endTime": times[-1]} if times else {}),
        },
    )
    crate.root_dataset["mentions"] = [whole, *actions]
    return crate


def _workflow(crate: ROCrate, sources: Sources, version: str) -> Any:
    """The Snakefile as the main workflow, with its rules as parts."""
    workflow = crate.add_workflow(
        sources.workflow, "Snakefile", main=True, lang="snakemake",
        properties={
            "name": "snella-bench", "version": version, "encodingFormat": "text/plain",
            "description": "From raw data to tables, one job per run.",
            "conformsTo": {"@id": "https://bioschemas.org/profiles/ComputationalWorkflow/1.0-RELEASE"},
        },
    )  # fmt: skip
    rules = [_file(crate, *pair) for pair in sources.rules]
    if rules:
        workflow["hasPart"] = rules
    return workflow


def _parameter(
    crate: ROCrate, workflow: Any, side: str, name: str, examples: Sequence[Any]
) -> None:
    """An input or output of the workflow, with the files that stood for it."""
    if examples:
        parameter = crate.add_formal_parameter(
            name,
            "File",
            identifier=f"#{side}-{name}",
            properties={"workExample": _one_or_more(examples)},
        )
        workflow[side] = parameter
        for example in examples:
            example["exampleOfWork"] = parameter


def _run(
    crate: ROCrate, name: str, folder: Path, record: Record, adapters: bool
) -> tuple[Any, Any]:
    """One run as an action, from its settings to its record; and the record's file."""
    names = ["history.csv", "log.txt", *([ADAPTER] if adapters else [])]
    kept = [RECORD if (folder / RECORD).exists() else FINISHED, FAILURE, *names]
    files = {
        file: _file(crate, folder / file, f"runs/{name}/{file}")
        for file in (RUN_FILES[0], *kept)
        if (folder / file).is_file()
    }
    settings = files.pop(RUN_FILES[0], None)
    run, made = record["run"], record.get("provenance") or {}
    done = record["status"] == "ok"
    properties = {
        "name": f"{run['method']} on {run['dataset']}, seed {run['seed']}",
        "description": f"Suite {run['suite']}, backbone {run['backbone']}: {record['status']}",
        "actionStatus": STATUS.format("Completed" if done else "Failed"),
        **{f"{when}Time": made[f"{when}ed"] for when in ("start", "end") if made.get(f"{when}ed")},
    }
    if not done:
        properties["error"] = f"{record['status']}: {record.get('reason')}"
    results = list(files.values())
    action = crate.add_action(
        _program(crate, made),
        identifier=f"#run/{name}",
        object=settings,
        result=_one_or_more(results),
        properties=properties,
    )
    return action, results[0]


def _program(crate: ROCrate, made: Mapping[str, Any]) -> Any:
    """The package as it was when a run was made."""
    git = made.get("git") or {}
    version = str((made.get("packages") or {}).get("snella") or "unknown")
    version += f"+{git['commit']}" if git.get("commit") else ""
    version += " with local edits" if git.get("dirty") else ""
    identifier = f"#snella-{version.replace(' ', '-')}"
    known = crate.get(identifier)
    return known or crate.add_jsonld({
        "@id": identifier,
        "@type": "SoftwareApplication",
        "name": "snella",
        "softwareVersion": version,
    })  # fmt: skip


def _file(crate: ROCrate, source: Path, place: str) -> Any:
    known = crate.get(place)
    if known is not None:
        return known
    kind = KINDS.get(source.suffix)
    properties = {"name": source.name, "contentSize": str(source.stat().st_size)}
    properties |= {"encodingFormat": kind} if kind else {}
    return crate.add_file(source, place, properties=properties)


def _one_or_more(items: Sequence[Any]) -> Any:
    """JSON-LD here writes one value without a list."""
    return items[0] if len(items) == 1 else list(items)


def _times(records: Iterable[Record]) -> list[str]:
    """When runs began and ended, in order; all are in UTC and of one form."""
    made = [record.get("provenance") or {} for record in records]
    return sorted(m[when] for m in made for when in ("started", "ended") if m.get(when))
