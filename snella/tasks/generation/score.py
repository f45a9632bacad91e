"""Subject-driven metrics from images on disk: fidelity, text alignment, diversity and drift.

- CLIP-I, DINO: mean cosine of generated images and the subject's photographs (Ruiz et al., 2023);
- CLIP-T: mean cosine of an image and its prompt with the class word alone, without the rare token;
- Vendi score on DINOv2 features, over all images of a subject and as a mean over prompts;
- LPIPS between samples of the same prompt;
- text match: how many images are closer to their own prompt than to any other of the subject's;
- drift: 1 - cosine of DINOv2 features of what adapted and unadapted model make of unrelated
  prompts with the same noise.

``real_*`` compares the photographs with each other, ``base_*`` scores the unadapted model.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from snella.errors import UserError
from snella.tasks.base import Score, Scorer
from snella.tasks.generation import metrics
from snella.tasks.generation.encode import square
from snella.tasks.generation.features import Clip, Perceptual, TimmFeatures
from snella.tasks.generation.prompts import fill_prompt
from snella.tasks.generation.sample import image_name, read_png
from snella.tasks.generation.settings import BASE, DRIFT, IMAGES


class SubjectScorer(Scorer):
    """Scores one subject's images."""

    def score(self, predictions: Path, split: str) -> dict[str, Score]:
        """All metrics of the images below ``predictions``.

        Raises :class:`~snella.errors.UserError` for a missing or damaged image, or where a
        metric's network is not configured.
        """
        photographs = [
            square(image, self.settings.image_size) for image in self.data.targets(split, "image")
        ]
        found = self._of_subject(predictions / IMAGES, photographs, "")
        if self.settings.unadapted:
            base = self._of_subject(predictions / BASE / IMAGES, photographs, "base_")
            found |= {name: s for name, s in base.items() if name in self._base_names}
        found["drift"] = self._drift(predictions)
        return found | self._of_real(photographs)

    def chance(self) -> dict[str, float]:
        """Text match of images that ignore their prompt."""
        return {"text_match": 1 / len(self.templates)}

    _base_names = ("base_clip_i", "base_dino", "base_clip_t", "base_vendi", "base_lpips")

    @property
    def templates(self) -> list[str]:
        """The subject's prompt templates that are used."""
        return list(self.data.manifest["prompts"][: self.settings.prompts])

    @property
    def texts(self) -> list[str]:
        """Prompts as CLIP reads them: with the class word, without the rare token."""
        word = str(self.data.manifest["class_word"])
        return [fill_prompt(template, "", word) for template in self.templates]

    # ------------------------------------------------------------------------------------ parts

    def _of_subject(self, folder: Path, photographs: list[Any], prefix: str) -> dict[str, Score]:
        images, prompt = self._read(folder, len(self.templates), self.settings.samples_per_prompt)
        clip, texts = _array(self.clip.images(images)), _array(self.clip.texts(self.texts))
        real_clip = _array(self.clip.images(photographs))
        dino = _array(self.dino.images(images)), _array(self.dino.images(photographs))
        diverse = _array(self.dinov2.images(images))
        by_prompt = [metrics.vendi(diverse[prompt == p]) for p in np.unique(prompt)]
        found = {
            "clip_i": self._score(metrics.similarity_to(clip, real_clip), prompt),
            "vendi": Score(metrics.vendi(diverse)),
            "clip_t": self._score(np.clip((clip * texts[prompt]).sum(axis=1), -1, 1), prompt),
            "dino": self._score(metrics.similarity_to(*dino), prompt),
            "lpips": Score(_mean(self.perceptual.pairs(images, metrics.pairs_within(prompt)))),
            "vendi_prompt": Score(float(np.mean(by_prompt))),
            "text_match": self._score(metrics.matches(clip, texts, prompt), prompt),
        }
        return {prefix + name: score for name, score in found.items()}

    def _of_real(self, photographs: list[Any]) -> dict[str, Score]:
        if len(photographs) < 2:
            return {}
        one = np.zeros(len(photographs), dtype=np.int64)
        pairs = metrics.pairs_within(one)
        clip, dino = self.clip.images(photographs), self.dino.images(photographs)
        return {
            "real_clip_i": Score(metrics.similarity_within(_array(clip))),
            "real_dino": Score(metrics.similarity_within(_array(dino))),
            "real_lpips": Score(_mean(self.perceptual.pairs(photographs, pairs))),
        }

    def _drift(self, predictions: Path) -> Score:
        s = self.settings
        if not s.drift_prompts:
            return Score(0.0)
        numbers = len(s.drift_prompts), s.drift_samples
        adapted, _ = self._read(predictions / DRIFT, *numbers)
        base, _ = self._read(predictions / BASE / DRIFT, *numbers)
        moved = metrics.drift(_array(self.dinov2.images(adapted)), _array(self.dinov2.images(base)))
        return Score(float(moved.mean()), {}, moved.astype(np.float32))

    def _read(self, folder: Path, prompts: int, samples: int) -> tuple[list[np.ndarray], Any]:
        """Images in order of prompt and sample, and the prompt's number of each (N,)."""
        if not folder.is_dir():
            raise UserError(f"{folder} is missing; delete the run's folder and train it again.")
        names = [image_name(p, s) for p in range(prompts) for s in range(samples)]
        return [read_png(folder / name) for name in names], np.repeat(np.arange(prompts), samples)

    def _score(self, values: np.ndarray, prompt: np.ndarray) -> Score:
        groups = {text: float(values[prompt == p].mean()) for p, text in enumerate(self.templates)}
        return Score(float(values.mean()), groups, values.astype(np.float32))

    # --------------------------------------------------------------------------------- networks

    @cached_property
    def clip(self) -> Clip:
        """The CLIP of CLIP-I and CLIP-T."""
        s = self.settings
        return Clip(s.clip_model, s.clip_file, s.clip_batch)

    @cached_property
    def dino(self) -> TimmFeatures:
        """The network of subject fidelity."""
        s = self.settings
        return TimmFeatures(s.dino_model, s.dino_kwargs, s.dino_file, "dino")

    @cached_property
    def dinov2(self) -> TimmFeatures:
        """The network of diversity and drift; the same object where it is the same network."""
        s = self.settings
        own = (s.dinov2_model, s.dinov2_kwargs, s.dinov2_file)
        if own == (s.dino_model, s.dino_kwargs, s.dino_file):
            return self.dino
        return TimmFeatures(*own, "dinov2")

    @cached_property
    def perceptual(self) -> Perceptual:
        """The distance of LPIPS."""
        s = self.settings
        return Perceptual(s.lpips_net, s.lpips_file, s.lpips_size, self.dino)


def _array(features: Any) -> np.ndarray:
    """In double precision, again of unit length."""
    double = np.asarray(features.numpy(), dtype=np.float64)
    return np.asarray(double / np.linalg.norm(double, axis=1, keepdims=True))


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else 0.0
