"""Weights of an ONNX export under the names that they had in PyTorch.

Parameters that the exporter left alone keep their names. The weight of a linear layer is stored
transposed under a made-up name, but its MatMul node is called after the layer
(`/encoder/layer.0/mlp/fc1/MatMul`). A class token's position and the patches' positions that were
folded into constants are recognised by the nodes that use them. Nothing of the graph is run.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from snella.errors import UserError
from snella.protobuf import fields, varints

_GRAPH, _NODE, _INITIALIZER = 7, 1, 5
_TYPES = {1: np.float32, 10: np.float16, 11: np.float64}
_POSITIONS = "embeddings.position_embeddings"


@dataclass(frozen=True)
class _Node:
    """An operation: its name, its kind, and the names of its inputs."""

    name: str
    kind: str
    inputs: tuple[str, ...]


def read_onnx(file: Path) -> dict[str, Tensor]:
    """All floating-point weights of ``file`` by their PyTorch names.

    Raises :class:`~snella.errors.UserError` if it is no ONNX file.
    """
    graph = next((v for n, v in fields(file.read_bytes()) if n == _GRAPH), None)
    if graph is None:
        raise UserError(f"Backbone file {file} is no ONNX file: it has no graph.")
    stored = dict(_tensors(graph))
    nodes = list(_nodes(graph))
    named = {name: t for name, t in stored.items() if not name.startswith("onnx::")}
    for node in nodes:
        for name in node.inputs:
            if node.kind == "MatMul" and name.startswith("onnx::") and name in stored:
                layer = node.name.strip("/").rpartition("/")[0].replace("/", ".")
                named[f"{layer}.weight"] = stored[name].T.contiguous()
    named |= _positions(stored, named)
    return named


def _positions(stored: dict[str, Tensor], named: dict[str, Tensor]) -> dict[str, Tensor]:
    """Position embeddings that the exporter folded: one row for the class token, then a square."""
    rest = [t for name, t in stored.items() if name.startswith("onnx::") and t.ndim == 3]
    first = next((t for t in rest if t.shape[1] == 1), None)
    patches = next((t for t in rest if t.shape[1] > 1), None)
    prefix = next((n.removesuffix("embeddings.cls_token") for n in named
                   if n.endswith("embeddings.cls_token")), None)  # fmt: skip
    if first is None or patches is None or prefix is None:
        return {}
    return {f"{prefix}{_POSITIONS}": torch.cat([first, patches], dim=1)}


def _tensors(graph: bytes) -> Iterator[tuple[str, Tensor]]:
    for number, payload in fields(graph):
        if number != _INITIALIZER:
            continue
        shape: list[int] = []
        raw, name, kind, floats = b"", "", 0, b""
        for field, value in fields(payload, numbers=True):
            if field == 1:
                shape += varints(value) if isinstance(value, bytes) else [value]
            elif field == 2:
                kind = value
            elif field == 4:
                floats += value
            elif field == 8:
                name = value.decode()
            elif field == 9:
                raw = value
        if kind in _TYPES:
            flat = np.frombuffer(raw or floats, dtype=_TYPES[kind]).reshape(shape)
            yield name, torch.from_numpy(flat.copy())


def _nodes(graph: bytes) -> Iterator[_Node]:
    for number, payload in fields(graph):
        if number == _NODE:
            parts = [(n, v.decode()) for n, v in fields(payload) if n in (1, 3, 4)]
            one = {n: v for n, v in parts if n != 1}
            yield _Node(one.get(3, ""), one.get(4, ""), tuple(v for n, v in parts if n == 1))
