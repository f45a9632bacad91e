"""The command line: thin verbs that parse, call and print."""

from snella.cli.main import main

__all__ = ["main"]
