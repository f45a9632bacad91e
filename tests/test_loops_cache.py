"""The cache of compiled loops: what is loaded is what was compiled."""

from __future__ import annotations

from pathlib import Path

import pytest

from snella.backends import cpu


@pytest.mark.parametrize("damage", ["cut", "empty", "unsigned"])
def test_a_cached_library_that_is_not_whole_is_compiled_anew(tmp_path, monkeypatch, damage):
    """Loading half a library would end the process with SIGBUS, so it is never loaded."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    settings = ["-DX=1"]
    calls = []

    def compile_(command, **options):
        calls.append(command)
        Path(command[-1]).write_bytes(b"a library" * 100)

    monkeypatch.setattr(cpu.subprocess, "run", compile_)
    library = cpu._build(settings)
    assert cpu._build(settings) == library and len(calls) == 1
    if damage == "unsigned":
        cpu._digest_of(library).unlink()
    else:
        library.write_bytes(b"" if damage == "empty" else library.read_bytes()[:50])
    assert cpu._build(settings).read_bytes() == b"a library" * 100 and len(calls) == 2
