"""The command line: thin verbs that parse, call and print."""

import sys

try:
    from snella.cli.main import main
except KeyboardInterrupt:  # before there is a place that turns it into a line
    sys.stderr.write("snella: interrupted; the same command resumes.\n")
    raise SystemExit(130) from None

__all__ = ["main"]
