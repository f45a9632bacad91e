"""What Snakemake is called with, looked at before Snakemake itself stumbles over it.

The default profile calls this, as it is read first.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from snella.errors import MISTAKE, UserError, plain
from snella.suite.reading import read_yaml

CONFIGFILE = ("--configfile", "--configfiles")


def check_configfiles(arguments: Sequence[str] | None = None) -> None:
    """End with one line and status 2 if a ``--configfile`` cannot be read; else do nothing."""
    for file in _configfiles(sys.argv[1:] if arguments is None else arguments):
        try:
            read_yaml(Path(file))
        except UserError as error:
            hint = "" if Path(file).exists() else " A target stands after ` -- `."
            sys.stderr.write(f"snella: {plain(str(error))}{hint}\n")
            raise SystemExit(MISTAKE) from None


def _configfiles(arguments: Sequence[str]) -> Iterator[str]:
    """The values of the option: one after ``=``, or all up to the next option."""
    taking = False
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if argument.startswith("-"):
            taking = name in CONFIGFILE and not equals
            if name in CONFIGFILE and equals:
                yield value
        elif taking:
            yield argument
