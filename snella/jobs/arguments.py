"""What Snakemake is called with, looked at before Snakemake itself stumbles over it.

The default profile calls this, as it is read first.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from snella.errors import MISTAKE, UserError, ascii_name, explain
from snella.suite.reading import read_yaml

CONFIGFILE, CONFIG = ("--configfile", "--configfiles"), ("--config", "-C")
KEY = re.compile(r"[a-zA-Z_][\w-]*\w")
"""What Snakemake takes as a key of ``--config``."""
AMOUNTS = {
    "--set-threads": "RULE=NUMBER", "--set-resources": "RULE:NAME=VALUE",
    "--default-resources": "NAME=VALUE", "--default-res": "NAME=VALUE",
    "--resources": "NAME=NUMBER", "--res": "NAME=NUMBER",
}  # fmt: skip
COUNTED = re.compile(r"threads|gpu|runtime|(mem|disk)(_mi?b)?")
"""Resources that are numbers."""
WORD = re.compile(r"(?!(attempt|threads)$)[A-Za-z_]\w*")
"""What is no number and no expression that gives one."""


def check_arguments(arguments: Sequence[str] | None = None) -> None:
    """End with one line and status 2 if a configuration cannot be read; else do nothing."""
    sys.excepthook = _interrupted
    given = sys.argv[1:] if arguments is None else arguments
    try:
        for file in _values(given, CONFIGFILE):
            _check_file(Path(file))
        for pair in _values(given, CONFIG):
            _check_pair(pair)
        for option in AMOUNTS:
            for pair in _values(given, (option,)):
                _check_amount(option, pair)
    except UserError as error:
        sys.stderr.write(f"snella: {explain(error).line}\n")
        raise SystemExit(MISTAKE) from None


def _interrupted(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Say of Ctrl-C while Snakemake plans one line, where it would print a traceback."""
    if issubclass(kind, KeyboardInterrupt):
        sys.stderr.write("snella: interrupted; the same command resumes.\n")
    else:
        sys.__excepthook__(kind, error, trace)


def _check_file(file: Path) -> None:
    try:
        content = read_yaml(file)
    except UserError as error:
        hint = "" if file.exists() else " Was it meant as a target? These stand after ` -- `."
        raise UserError(f"{error}{hint}") from error
    if not content and b"{" not in file.read_bytes():
        raise UserError(f"{file} holds no setting; write one, or leave --configfile out.")


def _check_pair(pair: str) -> None:
    key, equals, value = pair.partition("=")
    if not equals:
        raise UserError(f"--config takes KEY=VALUE, got {ascii_name(pair)}.")
    first, *rest = key.split(".")
    if rest and all(rest):
        nested = f"{'{'.join(f'{part}: ' for part in rest)}{value}{'}' * len(rest)}"
        raise UserError(
            f"--config of Snakemake takes no dotted keys; write '{first}={{{nested}' "
            "(with the quotes)."
        )
    if not KEY.fullmatch(key):
        raise UserError(f"--config: {ascii_name(key)} is no key of the configuration.")


def _check_amount(option: str, pair: str) -> None:
    """Refuse a word for a number, over which Snakemake stumbles when the first job asks for it."""
    name, equals, value = pair.partition("=")
    rule, colon, what = name.rpartition(":")
    if pair.startswith("base64//"):  # Snakemake's own, to a job on another node
        return
    if not equals or (option == "--set-resources" and not (rule and colon)):
        raise UserError(f"{option} takes {AMOUNTS[option]}, got {ascii_name(pair)}.")
    if option == "--set-threads":
        what = "threads"
    if COUNTED.fullmatch(what) and WORD.fullmatch(value):
        raise UserError(f"{option} {ascii_name(pair)}: {what} is a number, {value!r} is none.")


def targets(arguments: Sequence[str]) -> list[str]:
    """The targets among Snakemake's arguments, with or without ``--`` before them."""
    if "--" in arguments:
        return list(arguments[arguments.index("--") + 1 :])
    if all(argument.startswith("-") for argument in arguments):
        return []
    from snakemake.cli import get_argument_parser

    known, _ = get_argument_parser().parse_known_args(list(arguments))
    return [str(target) for target in known.targets]


def _values(arguments: Sequence[str], names: Sequence[str]) -> list[str]:
    """The values of an option: one after ``=``, or all up to the next option."""
    found, taking = [], False
    for argument in arguments:
        if argument.startswith("-"):
            name, equals, value = argument.partition("=")
            taking = name in names and not equals
            found += [value] if name in names and equals else []
        elif taking:
            found.append(argument)
    return found
