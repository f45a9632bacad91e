"""All verbs and their options, with help that answers: what it does, how to call it, defaults."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

from snella import __version__
from snella.cli import outputs, runs, verbs
from snella.errors import UserError, unknown
from snella.suite.config import DEFAULT, LARGEST_SEED

OVERVIEW = """\
snella: parameter-efficient fine-tuning of vision models, measured so that numbers can be trusted.

  snella run --method snella-8 --dataset digits    train one method on one data set
  snella plan, snella status                       the runs there are, what is done, time left
  snella show table1, snella show RUN              a table, or all about one run
  snella report                                    all results as one page for the browser
  snella diff A B                                  what differs between two runs or results folders
  snella methods, snella datasets                  the rows and the columns there are
  snella new-baseline NAME, snella check NAME      write a method of your own, and certify it
  snella doctor                                    what this machine and configuration lack

Tables are made by the workflow:   snakemake --cores all -- results/table1.tex
All verbs: snella --help; one verb: snella VERB --help. Documentation: docs/ of the repository.
"""
TABLE = "a table (default: table1, or the first of the suite's task family)"
ENDING = """\
Exit status: 0 done, 1 a run or a check failed, 2 a mistake to correct, 130 interrupted.
"""


class Parser(argparse.ArgumentParser):
    """argparse whose mistakes are one line, with the closest option or choice."""

    def error(self, message: str) -> NoReturn:
        """Raise :class:`~snella.errors.UserError` instead of printing the usage."""
        choice = re.search(r"invalid choice: '(.*)' \(choose from (.*)\)", message)
        if choice:
            known = re.findall(r"[\w-]+", choice[2])
            raise unknown("argument", choice[1], known)
        raise UserError(f"{message}. See `{self.prog} --help`.")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options of a call; raises :class:`~snella.errors.UserError` for a mistake."""
    parser = build_parser()
    subs = _verbs_of(parser)
    name = arguments[0]
    if name == "help":
        arguments, name = [*arguments[1:2], "--help"], "--help"
    if name.startswith("-") and name not in (known := _options_of(parser, deep=False)):
        raise unknown("option of `snella`", name, known)
    if not name.startswith("-") and name not in subs:
        raise unknown("verb", name, subs)
    if name in subs:
        options = _options_of(subs[name])
        given = [a.partition("=")[0] for a in arguments[1 : _end_of_options(arguments)]]
        for option in (word for word in given if word.startswith("--")):
            if option not in {*options, "--overlay"}:
                raise unknown(f"option of `snella {name}`", option, options)
            if given.count(option) > 1 and option != "--config":  # only the last would count
                raise UserError(f"{option} is given twice; give it once.")
    return parser.parse_args(arguments, argparse.Namespace(parser=parser))


def _end_of_options(arguments: Sequence[str]) -> int:
    return list(arguments).index("--") if "--" in arguments else len(arguments)


def _options_of(parser: argparse.ArgumentParser, deep: bool = True) -> set[str]:
    """The options of a verb and, if ``deep``, of its parts."""
    shown = (action for action in parser._actions if action.help != argparse.SUPPRESS)
    own = {option for action in shown for option in action.option_strings}
    parts = _verbs_of(parser).values() if deep else ()
    return own.union(*map(_options_of, parts))


def _verbs_of(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    found: dict[str, argparse.ArgumentParser] = {}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found |= action.choices
    return found


@cache
def build_parser() -> argparse.ArgumentParser:
    """All verbs and their options."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(
        prog="snella", description=OVERVIEW, epilog=ENDING, formatter_class=raw, allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"snella {__version__}")
    subs = parser.add_subparsers(required=True, metavar="VERB", title="verbs")

    def verb(call: Callable[[argparse.Namespace], int | None], *examples: str) -> Any:
        name = call.__name__.replace("_", "-")
        summary = "\n".join(line.strip() for line in (call.__doc__ or name).strip().splitlines())
        sub = subs.add_parser(
            name,
            help=summary.splitlines()[0],
            description=summary,
            epilog="examples:\n" + "\n".join(f"  {example}" for example in examples),
            formatter_class=raw,
            allow_abbrev=False,
        )
        sub.set_defaults(verb=call)
        return sub

    _running(verb)
    _looking(verb)
    _writing(verb)
    return parser


def _running(verb: Callable[..., Any]) -> None:
    run = _with_config(
        verb(
            verbs.run,
            "snella run --method snella-8 --dataset digits",
            "snella run --method linear --dataset digits --config protocols.quick.epochs=2",
        )
    )
    run.add_argument("--method", required=True, help="a row (snella methods)")
    run.add_argument("--dataset", required=True, help="a column (snella datasets)")
    run.add_argument("--seed", type=_seed, default=0, help="the repetition (default: 0)")
    run.add_argument("--again", action="store_true", help="train anew even if the run is finished")

    execute = verb(verbs.execute, 'snella execute --settings "$(cat config.json)"')
    execute.add_argument("--settings", required=True, help="the run's resolved settings, JSON")
    execute.add_argument(
        "--stage", choices=("all", "train"), default="all", help="where to stop (default: all)"
    )

    retry = _with_config(verb(runs.retry, "snella retry", "snella retry digits/lora-8/seed0"))
    retry.add_argument("runs", nargs="*", help="runs (default: all that failed)")

    prepare = _with_config(verb(verbs.prepare, "snella prepare digits"))
    prepare.add_argument("dataset", help="a column (snella datasets)")
    data = verb(outputs.data, "snella data check mydata", "snella data download cifar100")
    actions = data.add_subparsers(required=True, metavar="check|download", help="what to do")
    look = _with_config(actions.add_parser("check", help="look at a data set's folder"))
    look.set_defaults(verb=outputs.check_data)
    look.add_argument("name", help="a column (snella datasets)")
    fetch = actions.add_parser("download", help="fetch what its owner publishes")
    fetch.set_defaults(verb=outputs.download)
    fetch.add_argument("name", nargs="?", help="what to fetch (default: list all)")
    fetch.add_argument("--to", type=Path, default=Path("data"), help="where to (default: data)")


def _looking(verb: Callable[..., Any]) -> None:
    for call, what in ((verbs.methods, "rows"), (verbs.datasets, "columns")):
        sub = _with_config(verb(call, f"snella {call.__name__}", f"snella {call.__name__} --json"))
        sub.add_argument("--json", action="store_true", help=f"the {what} as JSON, for programs")
    for call in (verbs.plan, verbs.status):
        name = call.__name__
        examples = [f"snella {name}", f"snella {name} table1 --config suite=smoke --json"]
        if call is verbs.plan:
            examples += ["snella plan --suite paper", "snella plan --search"]
        sub = _with_config(verb(call, *examples))
        sub.add_argument("table", nargs="?", help=TABLE)
        sub.add_argument("--json", action="store_true", help="the same as JSON, for programs")
        if call is verbs.plan:
            sub.add_argument("--suite", nargs="+", help="what these suites cost (or: paper)")
            sub.add_argument("--search", action="store_true", help="what a search costs")
    show = _with_config(
        verb(
            runs.show,
            "snella show table1",
            "snella show quick/vit-quick/digits/lora-8/seed0",
            "snella show digits/lora-8 --json",
        )
    )
    show.add_argument(
        "table", metavar="name", nargs="?", help="a table or a run (default: the suite's table)"
    )
    show.add_argument("--stale", action="store_true", help="show a table's stale records, marked")
    show.add_argument("--json", action="store_true", help="the same as JSON, for programs")
    diff = _with_config(verb(runs.diff, "snella diff results reproduced"))
    for name, which in (("a", "a results folder, or a run"), ("b", "another one")):
        diff.add_argument(name, metavar=name.upper(), help=which)
    diff.add_argument("--json", action="store_true", help="every difference as JSON")
    doctor = _with_config(verb(verbs.doctor, "snella doctor", "snella doctor --json > report.json"))
    doctor.add_argument("--json", action="store_true", help="the report as JSON")


def _writing(verb: Callable[..., Any]) -> None:
    _table(verb(outputs.table, "snella table table1"))
    statistics = _table(verb(outputs.statistics, "snella statistics table1 --reference lora-8"))
    statistics.add_argument("--reference", help="a row (default: the one that the table names)")
    _table(verb(outputs.versus, "snella versus table1"))
    _with_config(verb(outputs.audit, "snella audit"))
    search = _with_config(verb(outputs.search, "snella search quick"))
    search.add_argument("suite", nargs="?", help="a suite (default: the configured one)")
    figure = _with_config(verb(outputs.figure, "snella figure figure8"))
    figure.add_argument("figure", help="a figure of config/figures/")
    pdf = verb(outputs.pdf, "snella pdf results/table1.tex")
    pdf.add_argument("tex", type=Path, help="a table written by `snella table`")
    check = _with_config(verb(verbs.check, "snella check snella-8", "snella check ~/work/svf.py"))
    check.add_argument("method", help="a row, a file in baselines/, or a path to any .py file")
    report = _with_config(
        verb(outputs.report, "snella report", "snella report --config suite=smoke")
    )
    report.add_argument("--stale", action="store_true", help="show stale records too, marked")
    report.add_argument("--out", type=Path, help="the file to write (default: RESULTS/report.html)")
    crate = _with_config(verb(runs.crate, "snella crate table1-crate.zip"))
    crate.add_argument("out", type=Path, help="a new folder, or a file ending in .zip")
    crate.add_argument("--adapters", action="store_true", help="with the trained weights")
    new = _with_config(verb(verbs.new_baseline, "snella new-baseline mymethod"))
    new.add_argument("name", help="letters, digits and underscores, or a path ending in .py")
    completion = verb(
        verbs.completion,
        "snella completion bash > ~/.local/share/bash-completion/completions/snella",
        "snella completion zsh > ~/.zfunc/_snella",
    )
    completion.add_argument("shell", choices=("bash", "zsh", "tcsh"), help="your shell")
    schema = verb(verbs.schema, "snella schema --out workflow/schemas")
    schema.add_argument(
        "--out", type=Path, default=Path("workflow/schemas"),
        help="the folder to write (default: workflow/schemas)",
    )  # fmt: skip


def _table(sub: Any) -> Any:
    _with_config(sub)
    sub.add_argument("table", nargs="?", help=TABLE)
    sub.add_argument("--stale", action="store_true", help="show stale records too, marked")
    return sub


def _with_config(sub: Any) -> Any:
    sub.add_argument(
        "--configfile", type=Path, default=DEFAULT, help=f"your own settings (default: {DEFAULT})"
    )
    sub.add_argument(
        "--config", nargs="*", default=[], action="extend", metavar="KEY=VALUE",
        help="settings that come on top, such as suite=smoke or methods.full.label=Ours",
    )  # fmt: skip
    sub.add_argument("--overlay", help=argparse.SUPPRESS)  # of the workflow
    return sub


def _seed(text: str) -> int:
    if not re.fullmatch(r"\d{1,10}", text, re.ASCII) or int(text) > LARGEST_SEED:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is no whole number of 0 to {LARGEST_SEED}")
    return int(text)
