"""Write one conda environment per kind of job: ``make requirements`` calls it.

An environment holds the pins of ``requirements.txt`` that its kind needs, resolved from the
extras of ``pyproject.toml``; nothing in it refers to another file, since Snakemake copies it
elsewhere. The package itself comes from the checkout, by the script of the same name that Snakemake
runs afterwards.
"""

from __future__ import annotations

import argparse
import subprocess
from pathlib import Path

from snella.files import write_text

HERE = Path(__file__).resolve().parent
KINDS = {
    "core": ("bench",),
    "segmentation": ("bench", "segmentation"),
    "generation": ("bench", "generation"),
    "latex": ("bench",),
}
"""The extras that each kind of job needs."""
PROGRAMS = {"latex": ("texlive-core", "poppler")}
"""Programs beyond Python, as conda-forge calls them."""
HEADER = "# Written by `make requirements` (envs/environments.py) for `snakemake --sdm conda`.\n"
AFTER = """\
#!/bin/sh
# Snakemake runs this in the new environment, with the place of the checkout in SNELLA_CHECKOUT.
exec python -m pip install --quiet --no-deps --editable "${SNELLA_CHECKOUT:-$PWD}"
"""


def resolve(extras: tuple[str, ...]) -> list[str]:
    """The pins of ``requirements.txt`` that the package with ``extras`` needs."""
    command = [
        "uv", "pip", "compile", "--quiet", str(HERE.parent / "pyproject.toml"),
        "--constraint", str(HERE / "requirements.txt"), "--python-version", "3.11",
        "--no-header", "--no-annotate", "--no-emit-index-url",
        *(part for extra in extras for part in ("--extra", extra)),
    ]  # fmt: skip
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=HERE.parent)
    return [line for line in done.stdout.splitlines() if "==" in line]


def environment(kind: str, pins: list[str]) -> str:
    """The environment's definition."""
    programs = ["python=3.11", "pip", *PROGRAMS.get(kind, ())]
    lines = ["channels:", "  - conda-forge", "dependencies:", *(f"  - {name}" for name in programs)]
    lines += ["  - pip:", *(f"      - {pin}" for pin in pins)]
    return HEADER + "\n".join(lines) + "\n"


def main() -> None:
    """Write all environments and the script that follows each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=HERE, help="the folder to write")
    folder = parser.parse_args().out
    for kind, extras in KINDS.items():
        write_text(folder / f"{kind}.yaml", environment(kind, resolve(extras)))
        write_text(folder / f"{kind}.post-deploy.sh", AFTER)


if __name__ == "__main__":
    main()
