"""Reading a local folder in diffusers' layout of ``StableDiffusion3Pipeline``, part by part.

Training needs the transformer alone; text encoders are opened to encode prompts, the VAE to encode
photographs and to decode samples. Nothing is downloaded.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch
from torch import nn

from snella.errors import UserError, one_line
from snella.tasks.generation.parts import (
    INDEX,
    REQUIRED,
    THIRD,
    config_of,
    part_of,
    read_index,
)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


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
        self.index = read_index(self.path)

    @property
    def has_third_encoder(self) -> bool:
        """Whether the T5 encoder is there; SD3 works without it."""
        return part_of(self.index, "text_encoder_3") is not None

    def transformer(self, weights: str = "fp32", image_size: int | None = None) -> nn.Module:
        """The transformer, in evaluation mode on the CPU, for images of ``image_size``."""
        model: Any = self._load("transformer", torch_dtype=DTYPES[weights])
        if image_size:
            blocks = config_of(self.path, "vae").get("block_out_channels", [0])
            _enlarge_positions(model, image_size // 2 ** (len(blocks) - 1))
        return model.eval()  # type: ignore[no-any-return]

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
        """What a cached result of ``parts`` depends on: classes, names, sizes and times of files.

        Parts that the pipeline leaves out do not count.
        """
        found: list[list[Any]] = []
        for part in parts:
            if (kind := part_of(self.index, part)) is not None:
                files = [p for p in sorted((self.path / part).rglob("*")) if p.is_file()]
                stats = [(p.relative_to(self.path).as_posix(), p.stat()) for p in files]
                found += [[part, *kind], *([n, s.st_size, s.st_mtime_ns] for n, s in stats)]
        return found

    def _pipeline(self, **parts: Any) -> Any:
        from diffusers import StableDiffusion3Pipeline

        absent = dict.fromkeys((*REQUIRED, *THIRD))
        pipeline: Any = StableDiffusion3Pipeline(
            **{**absent, "scheduler": self.scheduler(), **parts}
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def _load(self, name: str, **settings: Any) -> Any:
        found = part_of(self.index, name)
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


def _enlarge_positions(model: Any, latent: int) -> None:
    """Make the table of positions large enough for latents of ``latent`` a side.

    As in other vision transformers the positions then lie closer, over the range that was learnt.
    """
    from diffusers.models.embeddings import get_2d_sincos_pos_embed

    embed, grid = model.pos_embed, latent // model.config.patch_size
    if grid <= (embed.pos_embed_max_size or grid):
        return
    old = embed.pos_embed
    table = get_2d_sincos_pos_embed(
        old.shape[-1], grid, base_size=embed.base_size,
        interpolation_scale=embed.interpolation_scale, output_type="pt",
    )  # fmt: skip
    embed.register_buffer("pos_embed", table[None].to(old.dtype))
    embed.pos_embed_max_size = grid
    model.register_to_config(pos_embed_max_size=grid)
