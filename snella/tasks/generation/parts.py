"""Whether the parts of a pipeline folder are all there, of Stable Diffusion 3, and fit together.

Only the small configuration files are read, so that a folder of another model, or one that was put
together by hand, is refused before any weights are loaded.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from snella.errors import UserError, one_line

CLASS = "StableDiffusion3Pipeline"
INDEX = "model_index.json"
REQUIRED = (
    "transformer", "vae", "scheduler", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2",
)  # fmt: skip
THIRD = ("text_encoder_3", "tokenizer_3")
LANGUAGE = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", *THIRD)
"""What features of prompts depend on, beside the transformer's width."""
CLASSES = {
    "transformer": "SD3Transformer2DModel", "scheduler": "FlowMatchEulerDiscreteScheduler",
}  # fmt: skip
"""Parts that another class cannot stand in for: what is trained, and its noise levels."""
_CONFIGS = {
    "scheduler": "scheduler_config.json",
    "tokenizer": "tokenizer_config.json",
    "tokenizer_2": "tokenizer_config.json",
    "tokenizer_3": "tokenizer_config.json",
}
_WORDS = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("spiece.model",))
"""Files that hold a tokenizer's words. Without them transformers makes one that knows none."""

Part = tuple[str, str]
"""Library and class."""


def read_index(folder: Path) -> dict[str, Any]:
    """The checked list of a pipeline folder's parts.

    Raises :class:`~snella.errors.UserError` for a folder that is missing, incomplete, of another
    model, or of parts that do not fit together.
    """
    index = _index(folder)
    third = [name for name in THIRD if part_of(index, name) is not None]
    for name in (*REQUIRED, *third):
        _check_part(folder, index, name)
    if len(third) == 1:
        raise UserError(f"{folder / INDEX} names {third[0]} alone; {THIRD} belong together.")
    _check_fit(folder, {name: config_of(folder, name) for name in (*REQUIRED, *third)})
    return index


def part_of(index: Mapping[str, Any], name: str) -> Part | None:
    """Library and class of a part, None where it is left out."""
    entry = index.get(name)
    if not isinstance(entry, list) or len(entry) != 2 or None in entry:
        return None
    return str(entry[0]), str(entry[1])


def _index(folder: Path) -> dict[str, Any]:
    if not folder.exists():
        raise UserError(
            f"Pipeline folder {folder} is missing; download it (docs/generation.md) or correct "
            "`file:` of the backbone."
        )
    if not (folder / INDEX).is_file():
        raise UserError(
            f"{folder} has no {INDEX}: it is not a pipeline folder in diffusers' layout. A "
            "single-file checkpoint is converted by StableDiffusion3Pipeline.from_single_file."
        )
    index = _read(folder / INDEX)
    kind = index.get("_class_name")
    if kind != CLASS:
        raise UserError(
            f"{folder} holds a {kind}; generation trains a {CLASS} (Stable Diffusion 3)."
        )
    return index


def _read(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is damaged ({one_line(error)}); download it again.") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} is damaged (it holds no settings); download it again.")
    return content


def config_of(folder: Path, name: str) -> dict[str, Any]:
    """The settings of one part; raises :class:`~snella.errors.UserError` for a damaged file."""
    return _read(folder / name / _CONFIGS.get(name, "config.json"))


def _check_part(folder: Path, index: Mapping[str, Any], name: str) -> None:
    part, file = part_of(index, name), folder / name / _CONFIGS.get(name, "config.json")
    if part is None or not file.is_file():
        raise UserError(
            f"{folder} has no {name} ({name}/{file.name} is missing); download the folder again, "
            "whole. Only text_encoder_3 with its tokenizer may be left out, as [null, null] in "
            f"{INDEX}."
        )
    if part[1] != CLASSES.get(name, part[1]):
        raise UserError(
            f"{folder / INDEX}: {name} is a {part[1]}; Stable Diffusion 3 has a {CLASSES[name]}. "
            "Download the folder again, whole."
        )
    words = [all((folder / name / file).is_file() for file in files) for files in _WORDS]
    if name.startswith("tokenizer") and not any(words):
        raise UserError(
            f"{folder / name} holds no words (vocab.json with merges.txt, tokenizer.json or "
            "spiece.model); download the folder again, whole."
        )


def _check_fit(folder: Path, parts: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse parts of different models, by the sizes that they have to share."""
    transformer, first, second = (
        parts[name] for name in ("transformer", "text_encoder", "text_encoder_2")
    )
    pairs: list[tuple[str, Any, str, Any]] = [
        ("transformer's in_channels", transformer.get("in_channels"),
         "vae's latent_channels", parts["vae"].get("latent_channels")),
        ("transformer's pooled_projection_dim", transformer.get("pooled_projection_dim"),
         "text encoders' projection_dim together", _sum("projection_dim", first, second)),
    ]  # fmt: skip
    width = transformer.get("joint_attention_dim")
    tokens = "transformer's joint_attention_dim", width
    if "text_encoder_3" in parts:
        third = parts["text_encoder_3"].get("d_model")
        pairs.append((*tokens, "text_encoder_3's d_model", third))
    if (joined := _sum("hidden_size", first, second) or 0) > (width or joined):
        pairs.append((*tokens, "text encoders' hidden_size together", joined))
    for name, encoder in (("tokenizer", first), ("tokenizer_2", second)):
        length, most = parts[name].get("model_max_length"), encoder.get("max_position_embeddings")
        if isinstance(length, int) and isinstance(most, int) and length > most:
            pairs.append((f"{name}'s model_max_length", length, "text encoder's positions", most))
    for here, one, there, other in pairs:
        if None not in (one, other) and one != other:
            raise UserError(
                f"{folder}: the {here} is {one}, the {there} {other}; its parts are of different "
                "models. Download the folder again, whole."
            )


def _sum(name: str, *configs: Mapping[str, Any]) -> int | None:
    values = [config.get(name) for config in configs]
    return None if None in values else sum(values)  # type: ignore[arg-type]
