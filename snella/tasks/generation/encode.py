"""Prompts and photographs as the transformer reads them, computed once and kept on disk.

A cache file is named by everything it depends on (files of the encoders, texts, pixels), so that
it never has to be emptied for correctness.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from snella.files import atomic, digest_json, sha256
from snella.tasks.generation.parts import LANGUAGE
from snella.tasks.generation.pipeline import PipelineFolder

TEXT_BATCH = 16


@dataclass(frozen=True)
class Prompts:
    """Token features (N, T, D) and pooled features (N, P) of texts, by text."""

    number: dict[str, int]
    tokens: Tensor
    pooled: Tensor

    def get(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Features of ``texts``: (n, T, D) and (n, P)."""
        rows = [self.number[text] for text in texts]
        return self.tokens[rows], self.pooled[rows]


@dataclass(frozen=True)
class Latents:
    """Means and standard deviations (N, C, h, w) of the VAE's latents of N images."""

    mean: Tensor
    std: Tensor
    shift: float
    scale: float

    def __len__(self) -> int:
        return len(self.mean)

    def draw(self, rows: Sequence[int], generator: torch.Generator) -> Tensor:
        """Sample the latents of images ``rows``, normalised as the transformer expects them."""
        index = list(rows)
        noise = torch.randn(self.mean[index].shape, generator=generator)
        return (self.mean[index] + self.std[index] * noise - self.shift) * self.scale


def encode_prompts(
    folder: PipelineFolder,
    transformer: nn.Module,
    texts: Sequence[str],
    max_sequence_length: int,
    weights: str,
    cache: Path,
) -> Prompts:
    """Encode ``texts`` with all text encoders of the pipeline."""
    texts = list(dict.fromkeys(texts))
    key = digest_json(
        {
            "files": folder.stamp(*LANGUAGE, "transformer"),
            "texts": texts,
            "length": max_sequence_length,
            "weights": weights,
        }
    )
    file = cache / f"text-{key[:24]}.safetensors"
    if not file.is_file():
        _save(file, _encode_texts(folder, transformer, texts, max_sequence_length, weights))
    found = load_file(file)
    number = {text: i for i, text in enumerate(texts)}
    return Prompts(number, found["tokens"], found["pooled"])


@torch.inference_mode()
def _encode_texts(
    folder: PipelineFolder, transformer: nn.Module, texts: list[str], length: int, weights: str
) -> dict[str, Tensor]:
    pipeline = folder.with_text_encoders(transformer, weights)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for name in ("text_encoder", "text_encoder_2", "text_encoder_3"):
        encoder = getattr(pipeline, name)
        if encoder is not None:
            encoder.to(device)
    tokens, pooled = [], []
    for start in range(0, len(texts), TEXT_BATCH):
        part = texts[start : start + TEXT_BATCH]
        found = pipeline.encode_prompt(
            prompt=part, prompt_2=part, prompt_3=part, device=device,
            do_classifier_free_guidance=False, max_sequence_length=length,
        )  # fmt: skip
        tokens.append(found[0].cpu())
        pooled.append(found[2].cpu())
    return {"tokens": torch.cat(tokens), "pooled": torch.cat(pooled)}


def encode_images(
    folder: PipelineFolder, images: Sequence[np.ndarray], size: int, cache: Path
) -> Latents:
    """Encode photographs, each uint8 (H, W, 3), cut to the middle square of ``size`` pixels."""
    squares = [square(image, size) for image in images]
    key = digest_json(
        {
            "files": folder.stamp("vae"),
            "images": [sha256(image.tobytes()) for image in squares],
            "size": size,
        }
    )
    file = cache / f"latents-{key[:24]}.safetensors"
    if not file.is_file():
        _save(file, _encode_squares(folder, squares))
    found = load_file(file)
    shift, scale = found["constants"].tolist()
    return Latents(found["mean"], found["std"], shift, scale)


@torch.inference_mode()
def _encode_squares(folder: PipelineFolder, squares: list[np.ndarray]) -> dict[str, Tensor]:
    vae = folder.vae()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    vae.to(device)
    means, stds = [], []
    for image in squares:
        pixels = torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
        found = vae.encode(pixels.to(device)).latent_dist
        mean = found.mode()
        std = getattr(found, "std", None)
        means.append(mean.float().cpu())
        stds.append((torch.zeros_like(mean) if std is None else std).float().cpu())
    constants = torch.tensor(latent_constants(vae), dtype=torch.float64)
    return {"mean": torch.cat(means), "std": torch.cat(stds), "constants": constants}


def latent_constants(vae: Any) -> tuple[float, float]:
    """Shift and scale of normalised latents: z = (x - shift) · scale."""
    return float(vae.config.shift_factor or 0.0), float(vae.config.scaling_factor)


def square(image: np.ndarray, size: int) -> np.ndarray:
    """The middle square of an image, uint8 (size, size, 3), as diffusers' script cuts it.

    The shorter side is scaled to ``size`` (bilinear), then the middle is taken.
    """
    height, width = image.shape[:2]
    short = min(height, width)
    to = (round(width * size / short), round(height * size / short))
    scaled = Image.fromarray(image)
    if to != (width, height):
        scaled = scaled.resize(to, Image.Resampling.BILINEAR)
    left, top = (to[0] - size) // 2, (to[1] - size) // 2
    return np.asarray(scaled.crop((left, top, left + size, top + size)))


def _save(file: Path, tensors: dict[str, Tensor]) -> None:
    with atomic(file) as temporary:
        save_file({name: t.contiguous() for name, t in tensors.items()}, temporary)
