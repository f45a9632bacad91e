"""The command line: thin verbs that parse, call and print."""

from snella.cli.main import main
from snella.cli.parser import build_parser

__all__ = ["build_parser", "main"]
