"""``snella check``: the contract suite that every method passes on every backbone it claims.

A method learns, moves nothing that it did not mark, lets all that it marked learn, gives the
same result twice, survives saving, loading and merging, runs in bfloat16, refuses backbones it
does not know, and is no copy of another method.
"""

from snella.check.contract import CHECKS, examine
from snella.check.findings import Finding
from snella.check.subject import Subject
from snella.check.suite import check_method

__all__ = ["CHECKS", "Finding", "Subject", "check_method", "examine"]
