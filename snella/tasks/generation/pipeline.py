"""Reading a local folder in diffusers' layout of ``StableDiffusion3Pipeline``, part by part.

Training needs the transformer alone; text encoders are opened to encode prompts, the VAE to encode
photographs and to decode samples. Nothing is downloaded.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from snella.errors import UserError, one_line

CLASS = "StableDiffusion3Pipeline"
INDEX = "model_index.json"
REQUIRED = (
    "transformer", "vae", "scheduler", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2",
)  # fmt: skip
THIRD = ("text_encoder_3", "tokenizer_3")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_CONFIGS = {
    "scheduler": "scheduler_config.json",
    "tokenizer": "tokenizer_config.json",
    "tokenizer_2": "tokenizer_config.json",
    "tokenizer_3": "tokenizer_config.json",
}


class PipelineFolder:
    """A checked pipeline folder; each part is loaded when it is asked for."""

    def __init__(self, folder: str | Path | None) -> None:
        """Check that the folder holds a whole Stable Diffusion 3.

        Raises :class:`~snella.errors.UserError` if it is missing, incomplete or of another model.
        """
        if not folder:
            raise UserError(
                "Generation needs a pipeline folder: set `file:` of the backbone to a local copy "
                "of Stable Diffusion 3 in diffusers' layout (docs/generation.md)."
            )
        self.path = Path(folder)
        self.index = self._read_index()
        self._check_parts()

    @property
    def has_third_encoder(self) -> bool:
        """Whether the T5 encoder is there; SD3 works without it."""
        return self._class_of("text_encoder_3") is not None

    def transformer(self, weights: str = "fp32") -> nn.Module:
        """The transformer, in evaluation mode on the CPU."""
        model: nn.Module = self._load("transformer", torch_dtype=DTYPES[weights])
        return model.eval()

    def vae(self) -> Any:
        """The VAE in single precision: half precision gives NaN in SD3's."""
        return self._load("vae", torch_dtype=torch.float32).eval().requires_grad_(False)

    def scheduler(self) -> Any:
        """A fresh flow-matching scheduler."""
        return self._load("scheduler")

    def with_text_encoders(self, transformer: nn.Module, weights: str = "fp32") -> Any:
        """diffusers' pipeline with all text encoders, around ``transformer``."""
        names = ["text_encoder", "text_encoder_2", *(THIRD[:1] if self.has_third_encoder else ())]
        parts: dict[str, Any] = {n: self._load(n, torch_dtype=DTYPES[weights]) for n in names}
        parts |= {n.replace("text_encoder", "tokenizer"): None for n in names}
        for name in [n for n in parts if n.startswith("tokenizer")]:
            parts[name] = self._load(name)
        for name in THIRD:
            parts.setdefault(name, None)
        return self._pipeline(transformer=transformer, **parts)

    def sampler(self, transformer: nn.Module, vae: Any) -> Any:
        """diffusers' pipeline without text encoders: prompts come as embeddings."""
        return self._pipeline(transformer=transformer, vae=vae)

    def stamp(self, *parts: str) -> list[list[Any]]:
        """Names, sizes and times of the files of ``parts``: what a cached result depends on."""
        files = [p for part in parts for p in sorted((self.path / part).rglob("*")) if p.is_file()]
        return [
            [p.relative_to(self.path).as_posix(), p.stat().st_size, p.stat().st_mtime_ns]
            for p in files
        ]

    def _pipeline(self, **parts: Any) -> Any:
        from diffusers import StableDiffusion3Pipeline

        absent = dict.fromkeys((*REQUIRED, *THIRD))
        pipeline: Any = StableDiffusion3Pipeline(
            **{**absent, "scheduler": self.scheduler(), **parts}
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def _read_index(self) -> dict[str, Any]:
        file = self.path / INDEX
        if not self.path.is_dir():
            raise UserError(
                f"Pipeline folder {self.path} is missing; download it (docs/generation.md) or "
                "correct `file:` of the backbone."
            )
        try:
            index: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            kind = index.get("_class_name")
        except FileNotFoundError:
            raise UserError(
                f"{self.path} has no {INDEX}: it is not a pipeline folder in diffusers' layout. A "
                "single-file checkpoint is converted by StableDiffusion3Pipeline.from_single_file."
            ) from None
        except (OSError, ValueError, AttributeError) as error:
            raise UserError(f"{file} is damaged ({one_line(error)}); download it again.") from error
        if kind != CLASS:
            raise UserError(
                f"{self.path} holds a {kind}; generation trains a {CLASS} (Stable Diffusion 3)."
            )
        return index

    def _check_parts(self) -> None:
        third = [name for name in THIRD if self._class_of(name) is not None]
        for name in (*REQUIRED, *(third if third else ())):
            file = self.path / name / _CONFIGS.get(name, "config.json")
            if self._class_of(name) is None or not file.is_file():
                raise UserError(
                    f"{self.path} has no {name} ({name}/{file.name} is missing); download the "
                    "folder again, whole. Only text_encoder_3 with its tokenizer may be left out, "
                    f"as [null, null] in {INDEX}."
                )
        if len(third) == 1:
            raise UserError(f"{self.path / INDEX} names {third[0]} alone; {THIRD} belong together.")

    def _class_of(self, name: str) -> tuple[str, str] | None:
        entry = self.index.get(name)
        if not isinstance(entry, list) or len(entry) != 2 or None in entry:
            return None
        return str(entry[0]), str(entry[1])

    def _load(self, name: str, **settings: Any) -> Any:
        found = self._class_of(name)
        assert found is not None
        library, cls = found
        if library not in ("diffusers", "transformers") and not library.startswith("snella."):
            raise UserError(f"{self.path / INDEX}: {name} is of the unknown library {library!r}.")
        if library == "transformers" and "torch_dtype" in settings:
            settings["dtype"] = settings.pop("torch_dtype")
        try:
            made = getattr(importlib.import_module(library), cls)
            return made.from_pretrained(self.path / name, local_files_only=True, **settings)
        except Exception as error:
            raise UserError(
                f"{self.path / name} cannot be loaded as {cls} ({one_line(error)}); download it "
                "again, or install the library it needs (pip install 'snella[generation]')."
            ) from error
