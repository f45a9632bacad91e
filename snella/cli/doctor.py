"""``snella doctor``: what this machine and configuration lack, and what to do about each.

The report is what a maintainer asks for in a bug report; it holds no user, host or path outside of
the working directory.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

from rich.table import Table

from snella import __version__
from snella.cli.lists import console, print_json
from snella.data.options import options_of
from snella.data.prepared import Prepared
from snella.data.readers import list_images
from snella.errors import UserError, explain, record_traceback
from snella.files import user_path
from snella.jobs.tables import table_runs
from snella.models.backbone_files import check_entry
from snella.suite import plan
from snella.suite.config import CHECKOUT, Config, locate

Level = Literal["ok", "note", "problem"]
PACKAGES = ("torch", "timm", "peft", "numpy", "pydantic", "pandas", "scikit-learn", "snakemake")
OPTIONAL = {
    "diffusers": "generation: pip install 'snella[generation]'",
    "segment-anything": "segmentation: pip install 'snella[segmentation]'",
    "snakemake-executor-plugin-slurm": "clusters: pip install 'snella[cluster]'",
}
ROOM = 2 * 2**30
"""Bytes below which a disk is called full: the quick suite with its environment needs about one."""
SECONDS = 10
FOLDERS = re.compile(r"(?<![\w.~>:/])/(?:[^/;,'\"`()]+/)+")
"""The folders of an absolute path, which may name people and projects."""
USABLE = "import sys, torch; sys.exit(not torch.cuda.is_available())"
STYLES = ("booktabs", "graphicx", "longtable", "geometry")


@dataclass(frozen=True)
class Finding:
    """One thing looked at; a ``problem`` keeps runs of the suite from working, a ``note`` not."""

    what: str
    level: Level
    found: str
    remedy: str = ""


def examine(load: Callable[[], Config]) -> list[Finding]:
    """All findings; ``load`` gives the configuration or raises."""
    findings = [*_python(), *_tools(), *_gpu(), *_slurm()]
    try:
        config = load()
        findings += [*_configuration(config), *_places(config), *_data(config)]
        findings += [*_backbone(config), *_lock()]
    except Exception as error:
        outcome = explain(error)
        if not isinstance(error, UserError):
            record_traceback(error)
        findings.append(Finding("configuration", "problem", outcome.line, "correct what it names"))
    return [_private(finding) for finding in findings]


def print_findings(findings: list[Finding], as_json: bool) -> int:
    """Print the report; 1 if there is a problem, else 0."""
    problems = [f for f in findings if f.level == "problem"]
    if as_json:
        print_json([asdict(f) for f in findings])
        return int(bool(problems))
    table = Table.grid(padding=(0, 2))
    signs = {"ok": "ok", "note": "note", "problem": "PROBLEM"}
    for f in findings:
        table.add_row(signs[f.level], f.what, f.found + (f"; {f.remedy}" if f.remedy else ""))
    out = console()
    out.print(table)
    notes = sum(f.level == "note" for f in findings)
    out.print(f"{len(problems)} problems, {notes} notes")
    return int(bool(problems))


def _python() -> Iterator[Finding]:
    found = f"{platform.python_version()}, {platform.system()} {platform.machine()}"
    old = sys.version_info < (3, 11)
    yield Finding("Python", "problem" if old else "ok", found, "use 3.11 or newer" if old else "")
    yield Finding("snella", "ok", f"{__version__}, {_commit()}")
    missing = [name for name in PACKAGES if _version(name) is None]
    have = ", ".join(f"{name} {_version(name)}" for name in PACKAGES if name not in missing)
    yield Finding("packages", "ok", have)
    for name in missing:
        yield Finding(name, "problem", "not installed", "pip install 'snella[bench]'")
    for name, remedy in OPTIONAL.items():
        if _version(name) is None:
            yield Finding(name, "note", "not installed", f"needed for {remedy}")
    for name in ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES"):
        if name in os.environ:
            yield Finding(name, "ok", os.environ[name])
    yield Finding("cores", "ok", f"{len(os.sched_getaffinity(0))} usable of {os.cpu_count()}")


def _tools() -> Iterator[Finding]:
    compiler = os.environ.get("CXX") or next((c for c in ("g++", "clang++") if shutil.which(c)), "")
    if compiler and shutil.which(compiler):
        yield Finding("C++ compiler", "ok", _first_line([compiler, "--version"]))
    else:
        yield Finding(
            "C++ compiler", "note", "none: SNELLA's loops run as torch operations, more slowly",
            "install g++ (Debian: apt install g++)",
        )  # fmt: skip
    for name, packages in (
        ("pdflatex", "texlive-latex-recommended"),
        ("pdftoppm", "poppler-utils"),
        ("git", "git"),
    ):
        if shutil.which(name):
            yield Finding(name, "ok", "installed")
        else:
            yield Finding(name, "note", "not installed", f"Debian: apt install {packages}")
    if shutil.which("pdflatex") and shutil.which("kpsewhich"):
        lacking = [style for style in STYLES if not _first_line(["kpsewhich", f"{style}.sty"])]
        if lacking:
            remedy = "Debian: apt install texlive-latex-recommended"
            yield Finding("LaTeX packages", "note", f"missing: {', '.join(lacking)}", remedy)


def _gpu() -> Iterator[Finding]:
    if shutil.which("nvidia-smi") is None:
        yield Finding("GPU", "note", "no NVIDIA driver: runs use the CPU")
        return
    query = "--query-gpu=name,driver_version,memory.total,memory.free"
    answer = _first_line(["nvidia-smi", query, "--format=csv,noheader"])
    torch = _version("torch") or ""
    if not answer:
        yield Finding("GPU", "problem", "nvidia-smi fails", "install the driver anew, or reboot")
    elif "+cpu" in torch:
        remedy = "install torch for CUDA (https://pytorch.org/get-started)"
        yield Finding("GPU", "note", f"{answer}, but torch {torch} cannot use it", remedy)
    elif _fails([sys.executable, "-c", USABLE], seconds=120):
        remedy = "update the driver, or install a torch for an older CUDA (pytorch.org/get-started)"
        yield Finding("GPU", "problem", f"{answer}, but torch {torch} cannot use it", remedy)
    else:
        yield Finding("GPU", "ok", answer)


def _slurm() -> Iterator[Finding]:
    if shutil.which("sbatch") is None:
        yield Finding("SLURM", "note", "not on this machine")
        return
    answer = _first_line(["sbatch", "--version"])
    if not answer:
        yield Finding("SLURM", "note", "sbatch does not answer", "ask the cluster's administrators")
        return
    yield Finding("SLURM", "ok", answer)
    if _version("snakemake-executor-plugin-slurm") is None:
        remedy = "pip install 'snella[cluster]'"
        yield Finding("SLURM plug-in", "note", "not installed: the cluster is not used", remedy)
    if not _first_line(["sacct", "-n", "-X", "-S", "now"], default="") and _fails(["sacct", "-n"]):
        remedy = "keep `slurm-status-command: squeue` in workflow/profiles/slurm"
        yield Finding("SLURM accounting", "note", "sacct does not answer", remedy)


def _configuration(config: Config) -> Iterator[Finding]:
    runs, table = plan.plan(config), plan.main_table(config)
    rows, suite = plan.suite_methods(config), plan.current_suite(config)
    found = (
        f"suite {config.suite}: {len(runs)} runs (methods: {len(rows)}, data sets: "
        f"{len(suite.datasets)}, seeds: {len(suite.seeds)})"
    )
    if table in config.tables:
        found += f", of which {table} shows {len(table_runs(config, table))}"
    yield Finding("configuration", "ok", found)
    for run in runs[:1]:
        threads = run.protocol.threads
        yield Finding("threads per run", "ok", str(threads))


def _places(config: Config) -> Iterator[Finding]:
    for name in dict.fromkeys((config.results, config.data, "logs")):
        folder = Path(name)
        above = next((p for p in (folder, *folder.absolute().parents) if p.exists()), Path())
        if not above.is_dir():
            remedy = "move the file, or choose another folder"
            yield Finding(f"folder {name}", "problem", "a file stands in its way", remedy)
        elif not os.access(above, os.W_OK | os.X_OK):
            remedy = "give yourself access, or choose another folder (--config results=...)"
            yield Finding(f"folder {name}", "problem", "not writable", remedy)
        else:
            free = shutil.disk_usage(above).free
            short = free < ROOM
            yield Finding(
                f"folder {name}", "problem" if short else "ok", f"{free / 2**30:.1f} GiB free",
                "make room" if short else "",
            )  # fmt: skip


def _data(config: Config) -> Iterator[Finding]:
    for name in plan.current_suite(config).datasets:
        entry = config.datasets[name]
        folder = plan.prepared_folder(config, name)
        try:
            if (folder / "manifest.json").exists():
                found = f"prepared, {len(Prepared.open(folder)):,} examples"
            elif plan.is_made(config, name):
                found = "made on demand"
            elif entry.path is None:
                raise UserError(f"its folder is not known; set datasets.{name}.path (docs/data.md)")
            else:
                found = _raw(config, name)
            yield Finding(f"data {name}", "ok", found)
        except UserError as error:
            yield _problem(f"data {name}", error)


def _raw(config: Config, name: str) -> str:
    """What lies in a data set's own folder; lists are read, images are left to `data check`."""
    entry = config.datasets[name]
    if entry.task != "classification" or entry.kind != "folder":
        if not user_path(entry.path or "").is_dir():
            raise UserError(f"its folder does not exist; correct datasets.{name}.path")
        return "not prepared yet"
    options = options_of(name, dict(entry.options or {}))
    listing = list_images(Path(entry.path or ""), name, options)
    counts = ", ".join(f"{len(lines):,} {role}" for role, lines in listing.lines.items())
    return f"not prepared yet, {counts} (`snella data check {name}` looks at every image)"


def _backbone(config: Config) -> Iterator[Finding]:
    name = plan.current_suite(config).backbone
    entry = config.backbones[name]
    file = entry.file and locate(entry.file)
    try:
        check_entry(
            {"name": name, "arch": entry.arch, "kwargs": entry.kwargs, "file": file, **entry.load}
        )
        yield Finding(f"backbone {name}", "ok", Path(file or "").name)
    except UserError as error:
        yield _problem(f"backbone {name}", error)


def _problem(what: str, error: UserError) -> Finding:
    """A user's line, which says what is wrong before its first semicolon and then what to do."""
    found, _, remedy = str(error).rstrip(".").partition("; ")
    return Finding(what, "problem", found, remedy)


def _lock() -> Iterator[Finding]:
    """Snakemake's lock, which stays behind when Snakemake is killed."""
    locks = Path(".snakemake/locks")
    if locks.is_dir() and any(locks.iterdir()):
        remedy = "if no Snakemake runs in this folder, unlock it: snakemake --unlock"
        yield Finding("Snakemake", "note", "this folder is locked", remedy)


def _private(finding: Finding) -> Finding:
    """The finding without the paths of the working directory, the checkout and the home."""
    texts = [finding.what, finding.found, finding.remedy]
    known = ((Path.cwd(), "."), (CHECKOUT, "<checkout>"), (Path.home(), "~"))
    for folder, short in known:
        if len(folder.parts) > 1:
            texts = [text.replace(folder.as_posix(), short) for text in texts]
    found = [FOLDERS.sub("…/", text) for text in texts]
    return Finding(found[0], finding.level, found[1], found[2])


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str:
    answer = _first_line(["git", "-C", str(CHECKOUT), "describe", "--always", "--dirty"])
    return f"commit {answer}" if answer else "no git checkout"


def _fails(command: list[str], seconds: int = SECONDS) -> bool:
    try:
        done = subprocess.run(command, capture_output=True, timeout=seconds, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return True
    return done.returncode != 0


def _first_line(command: list[str], default: str = "") -> str:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return default
    lines = done.stdout.strip().splitlines()
    return lines[0] if done.returncode == 0 and lines else default
