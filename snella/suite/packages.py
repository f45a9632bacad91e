"""What installed packages offer, found in their text: to import torch would cost planning seconds.

Where a package's text does not tell, nothing is known and the job says what is wrong.
"""

from __future__ import annotations

import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path

CLASS = re.compile(rb"^class ([A-Za-z]\w+)", re.MULTILINE)
ENTRY = re.compile(rb"^def ([a-z]\w+)\(pretrained", re.MULTILINE)
"""The function of a timm architecture."""


@cache
def optimizers() -> frozenset[str]:
    """The names of torch's optimizers, and of a few classes beside them, lower case."""
    return frozenset(name.decode().lower() for name in CLASS.findall(_text("torch", "optim")))


@cache
def architectures() -> frozenset[str]:
    """The names of timm's architectures, without tags."""
    return frozenset(name.decode() for name in ENTRY.findall(_text("timm", "models")))


@cache
def is_architecture(name: str) -> bool:
    """Whether timm's text speaks of an architecture: a present one, or an older one's new name."""
    text, word = _text("timm", "models"), name.partition(".")[0].encode()
    return not text or b"def %b(" % word in text or b"'%b'" % word in text


@cache
def _text(package: str, folder: str) -> bytes:
    """All Python text of a package's folder; the package is found and not imported."""
    spec = find_spec(package)
    places = list(spec.submodule_search_locations or ()) if spec is not None else []
    files = sorted(Path(places[0], folder).glob("*.py")) if places else []
    return b"\n".join(file.read_bytes() for file in files)
