"""Sampling images to files: seeded one by one, in fixed batches, each image written whole.

An image's noise depends on (subject, prompt, sample) alone, is drawn on the CPU, and the images of
a batch never change: so methods are paired, and what an interrupted call has not written comes out
bit-identical in the next on the same machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from snella.errors import UserError
from snella.files import atomic
from snella.seeds import derive_seed
from snella.tasks.generation.encode import Prompts, latent_constants
from snella.tasks.generation.pipeline import PipelineFolder


@dataclass(frozen=True)
class Job:
    """One image to make: its file, its prompt, and the seed of its noise."""

    file: Path
    prompt: str
    seed: int


@dataclass(frozen=True)
class Sampling:
    """How images are sampled: pixels of a side, steps, guidance, and images at a time."""

    size: int
    steps: int
    guidance: float
    negative_prompt: str
    batch: int


def jobs(folder: Path, subject: str, prompts: Sequence[str], samples: int) -> list[Job]:
    """``samples`` images per prompt: files ``p<prompt>_s<sample>.png`` of ``folder``."""
    return [
        Job(folder / image_name(p, s), prompt, derive_seed(0, f"{subject}/{prompt}", s))
        for p, prompt in enumerate(prompts)
        for s in range(samples)
    ]


def image_name(prompt: int, sample: int) -> str:
    """The file name of a prompt's sample."""
    return f"p{prompt:03d}_s{sample}.png"


def generate(
    folder: PipelineFolder,
    transformer: nn.Module,
    vae: Any,
    encoded: Prompts,
    wanted: Sequence[Job],
    sampling: Sampling,
) -> int:
    """Make the images that are not there yet; returns the number of all of ``wanted``.

    Raises :class:`~snella.errors.UserError` if the model gives NaN, and torch's out-of-memory
    error with the remedy.
    """
    pipeline = None
    for start in range(0, len(wanted), sampling.batch):
        part = wanted[start : start + sampling.batch]
        missing = [job for job in part if not job.file.is_file()]
        if not missing:
            continue
        if pipeline is None:
            pipeline = folder.sampler(transformer, vae.to(next(transformer.parameters()).device))
        for job, image in zip(part, _sample(pipeline, encoded, part, sampling), strict=True):
            if job in missing:
                write_png(job.file, image)
    vae.to("cpu")  # training needs its room
    return len(wanted)


@torch.inference_mode()
def _sample(
    pipeline: Any, encoded: Prompts, part: Sequence[Job], sampling: Sampling
) -> list[np.ndarray]:
    parameter = pipeline.transformer.pos_embed.proj.weight
    device, dtype = parameter.device, parameter.dtype
    tokens, pooled = encoded.get([job.prompt for job in part])
    empty, empty_pooled = encoded.get([sampling.negative_prompt] * len(part))
    try:
        latents = pipeline(
            prompt_embeds=tokens.to(device, dtype),
            pooled_prompt_embeds=pooled.to(device, dtype),
            negative_prompt_embeds=empty.to(device, dtype),
            negative_pooled_prompt_embeds=empty_pooled.to(device, dtype),
            height=sampling.size, width=sampling.size, num_inference_steps=sampling.steps,
            guidance_scale=sampling.guidance, output_type="latent",
            generator=[torch.Generator().manual_seed(job.seed) for job in part],
        ).images  # fmt: skip
        return decode(pipeline.vae, latents)
    except torch.OutOfMemoryError as error:
        raise torch.OutOfMemoryError(
            f"out of memory while generating {len(part)} images of {sampling.size} pixels at a "
            "time; lower `generation_batch`, or use `weights: bf16`"
        ) from error
    except ValueError as error:
        if "divisible" not in str(error):
            raise
        size = f"`image_size: {sampling.size}`"
        raise UserError(f"{size} does not fit the pipeline: {error}.") from error


def decode(vae: Any, latents: Tensor) -> list[np.ndarray]:
    """Images uint8 (H, W, 3) of latents (n, C, h, w), in single precision.

    Raises :class:`~snella.errors.UserError` where a latent is not finite.
    """
    if not latents.isfinite().all():
        raise UserError(
            "The model generates NaN: half precision (fp16) is known to overflow in SD3; use "
            "`precision: bf16` or fp32, or lower `lr`."
        )
    shift, scale = latent_constants(vae)
    with torch.autocast(latents.device.type, enabled=False):
        images = vae.decode(latents.float() / scale + shift, return_dict=False)[0]
    pixels = ((images.float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
    return list(pixels.permute(0, 2, 3, 1).cpu().numpy())


def write_png(file: Path, image: np.ndarray) -> None:
    """Write an image uint8 (H, W, 3), whole or not at all."""
    with atomic(file) as temporary, open(temporary, "wb") as stream:
        Image.fromarray(image).save(stream, "PNG", compress_level=6)


def read_png(file: Path) -> np.ndarray:
    """Read an image uint8 (H, W, 3); raises :class:`~snella.errors.UserError` if it is damaged."""
    try:
        with Image.open(file) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError) as error:
        text = f"{file} is missing or damaged; delete it and train the run again."
        raise UserError(text) from error
