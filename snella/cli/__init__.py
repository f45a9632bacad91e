"""The command line: thin verbs that parse, call and print."""

from snella.cli.main import build_parser, main

__all__ = ["build_parser", "main"]
