"""The one table of names: which matrix of a block a layer is, by what libraries call it.

timm, transformers, diffusers, segment-anything and open_clip name the same few matrices in many
ways. The benchmark's roles (:mod:`snella.models.families`) and the default targets of the tuner are
both read from here, so that a new name is one entry.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache

ROLES = ("q", "k", "v", "proj", "fc1", "fc2")
"""The matrices of a block that every paper speaks of."""

NAMES: Mapping[str, tuple[str, ...]] = {
    "qkv": ("qkv", "to_qkv", "c_attn"),
    "kv": ("kv", "to_kv"),
    "q": ("q", "query", "q_proj", "q_lin", "to_q"),
    "k": ("k", "key", "k_proj", "k_lin", "to_k"),
    "v": ("v", "value", "v_proj", "v_lin", "to_v"),
    "proj": (
        *("proj", "o", "o_proj", "o_lin", "out_proj", "out_lin", "to_out", "to_out.0"),
        *("attention.output.dense", "attention.dense"),
    ),
    "fc1": (
        *("fc1", "fc1_x", "lin1", "linear1", "c_fc", "up_proj", "w2", "wi", "wi_1", "pwconv1"),
        *("intermediate.dense", "dense_h_to_4h", "net.0.proj"),
    ),
    "fc2": (
        *("fc2", "lin2", "linear2", "c_proj", "down_proj", "w3", "wo", "pwconv2", "weights_out"),
        *("output.dense", "dense_4h_to_h", "net.2"),
    ),
    "gate": ("fc1_g", "w1", "gate_proj", "wi_0"),
    "gate and fc1": ("w12", "weights_in", "gate_up_proj"),
    "text": ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
}
"""Role: the last part of a layer's path. A role of several letters of q, k and v is a layer that
stacks these matrices along its output; "text" is a joint block's own attention for its text."""

STACKED = {name: len(role) for role in ("qkv", "kv") for name in NAMES[role]}
"""Layers that stack several matrices along their output, and how many."""

# Flux joins the MLP and the attention's output of its single blocks in two matrices.
_FLUX = r"(.*\.)?single_transformer_blocks\.\d+\.(proj_mlp|proj_out)"
_ADAPTED = re.compile(
    r"(.*\.)?\d+\.(.*\.)?({})|{}".format(
        "|".join(re.escape(name) for names in NAMES.values() for name in names), _FLUX
    )
)
# Matrices of a block that are neither attention nor MLP: modulation and normalisation, merging of
# patches, position biases, gates of squeeze-and-excitation and of experts.
_OTHERS = re.compile(
    r".*(norm|ada_?ln|modulation|downsample|reduction|cpb_mlp|rel_pos|position|relative|\bse\b|"
    r"\bgate\b|router|expert|time_?emb|head|classifier).*",
    re.IGNORECASE,
)


@cache
def role_of(name: str) -> str | None:
    """The role of a layer that its block's attention or MLP calls ``name``; None if unknown."""
    return next((role for role, names in NAMES.items() if name in names), None)


def is_adapted(path: str) -> bool:
    """Whether ``path`` names a matrix of attention or MLP inside a numbered block."""
    return _ADAPTED.fullmatch(path) is not None


def is_other(path: str) -> bool:
    """Whether ``path`` names a matrix that is known to be neither attention nor MLP."""
    return _OTHERS.fullmatch(path) is not None
