"""Seeds from names, so that they do not depend on the order or the number of runs."""

from __future__ import annotations

import hashlib


def derive_seed(base_seed: int, name: str, repetition: int) -> int:
    """A random seed for a purpose. It does not depend on the method, so that methods are paired."""
    text = f"{base_seed}/{name}/{repetition}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")
