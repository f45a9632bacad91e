"""Generation as training sees it: latents with noise, the flow objective, and images on disk."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from snella.data.prepared import Prepared
from snella.equations.flow import (
    Weighting,
    draw_positions,
    flow_loss,
    interpolate,
    noise_levels,
)
from snella.files import atomic, digest_json
from snella.methods.base import Batch
from snella.tasks.base import Backbone, Task
from snella.tasks.generation.encode import Latents, Prompts, encode_images, encode_prompts
from snella.tasks.generation.parts import LANGUAGE
from snella.tasks.generation.pipeline import PipelineFolder
from snella.tasks.generation.prompts import fill_prompt
from snella.tasks.generation.sample import Job, Sampling, generate, jobs, read_png
from snella.tasks.generation.settings import BASE, DRIFT, IMAGES, GenerationSettings, fill


class Generation(Task):
    """Teach a text-to-image model one subject by a handful of photographs (DreamBooth)."""

    settings: GenerationSettings

    def __init__(self, data: Prepared, settings: GenerationSettings, batch_size: int) -> None:
        super().__init__(data, settings, batch_size)
        self.subject = str(data.manifest["subject"])
        self.class_word = str(data.manifest["class_word"])
        self.cache = data.folder.parent.parent / "cache" / "generation"

    # ------------------------------------------------------------------------------- the model

    def build_model(self, backbone: Backbone) -> nn.Module:
        """The transformer of the pipeline folder ``backbone.file``.

        While the model is still as it was pre-trained, everything that others of its parts give
        is computed or found in the cache: features of all prompts, latents of the photographs,
        images of the class (prior preservation), and the unadapted model's images.
        """
        s = self.settings
        self.folder = PipelineFolder(backbone.file)
        model = self.folder.transformer(s.weights, s.image_size)
        self.encoded: Prompts = encode_prompts(
            self.folder, model, self._texts(), s.max_sequence_length, s.weights, self.cache
        )
        self.latents: Latents = encode_images(
            self.folder, self.data.images("trainval"), s.image_size, self.cache
        )
        self.vae = self.folder.vae()
        self.levels: Tensor = self.folder.scheduler().sigmas.float()
        model.to("cuda" if torch.cuda.is_available() else "cpu")
        self._make_base_images(model)
        self.prior = self._class_latents(model) if s.prior_weight else None
        return model

    @property
    def prompts(self) -> list[str]:
        """The subject's prompts, with the rare token."""
        templates = self.data.manifest["prompts"][: self.settings.prompts]
        return [fill_prompt(t, self.settings.rare_token, self.class_word) for t in templates]

    def _fill(self, template: str) -> str:
        return fill(template, self.settings.rare_token, self.class_word)

    def _texts(self) -> list[str]:
        s = self.settings
        own = [self._fill(s.instance_prompt), self._fill(s.class_prompt), s.negative_prompt]
        return [*own, *self.prompts, *s.drift_prompts]

    # -------------------------------------------------------------------------------- training

    def steps(self, split: str) -> int:
        """The number of batches of one epoch: as configured, or one pass over the photographs."""
        return self.settings.epoch_batches or super().steps(split)

    def size(self, batch: Batch) -> int:
        """The number of latents in a batch, images of the class included."""
        return len(batch["latent"])

    def batches(self, split: str, seed: int | None) -> Iterator[Batch]:
        """Latents and noise (B, C, h, w), noise levels (B,), features of the prompts.

        Where ``seed`` is None photographs come in file order and noise is drawn with seed 0.
        """
        generator = torch.Generator().manual_seed(0 if seed is None else seed)
        shuffled = None if seed is None else generator
        order = self._order(len(self.latents), shuffled)
        classes = self._order(len(self.prior) if self.prior else 1, shuffled)
        for _ in range(self.steps(split)):
            rows = [next(order) for _ in range(self.batch_size)]
            batch = self._batch(self.latents, rows, self.settings.instance_prompt, generator)
            if self.prior is not None:
                rows = [next(classes) for _ in range(self.batch_size)]
                other = self._batch(self.prior, rows, self.settings.class_prompt, generator)
                batch["prior"] = torch.zeros(self.batch_size, dtype=torch.bool)
                other["prior"] = torch.ones(self.batch_size, dtype=torch.bool)
                batch = {name: torch.cat([batch[name], other[name]]) for name in batch}
            yield batch

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        """The velocity (B, C, h, w) at the batch's noise levels."""
        return flow_forward(model, batch)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The mean flow loss of the photographs, plus that of the class images times its weight."""
        s = self.settings
        return mean_flow_loss(model, batch, s.weighting, s.precondition, s.prior_weight)

    def _batch(
        self, latents: Latents, rows: list[int], prompt: str, generator: torch.Generator
    ) -> Batch:
        s = self.settings
        latent = latents.draw(rows, generator)
        position = draw_positions(
            len(rows), s.weighting, generator,
            mean=s.logit_mean, std=s.logit_std, mode_scale=s.mode_scale,
        )  # fmt: skip
        tokens, pooled = self.encoded.get([self._fill(prompt)] * len(rows))
        return {
            "latent": latent,
            "noise": torch.randn(latent.shape, generator=generator),
            "sigma": noise_levels(position, self.levels),
            "tokens": tokens,
            "pooled": pooled,
        }

    @staticmethod
    def _order(n: int, generator: torch.Generator | None) -> Iterator[int]:
        """Row numbers without end, each pass in a new order, or in file order."""
        while True:
            yield from (
                range(n) if generator is None else torch.randperm(n, generator=generator).tolist()
            )

    # -------------------------------------------------------------------------------- sampling

    def predict(self, model: nn.Module, split: str, folder: Path) -> int:
        """Write the images of all prompts to ``images/`` and ``drift/``, one file each.

        What the unadapted model makes of the same noise lies beside them in ``base/``.
        """
        count = 0
        for name, base in self._base_folders.items():
            wanted = self._jobs(name, folder / name)
            count += generate(self.folder, model, self.vae, self.encoded, wanted, self._sampling())
            for job in self._jobs(name, base):
                _copy(job.file, folder / BASE / name / job.file.name)
        return count

    def _jobs(self, name: str, folder: Path) -> list[Job]:
        s = self.settings
        if name == DRIFT:
            return jobs(folder, "drift", s.drift_prompts, s.drift_samples)
        return jobs(folder, self.subject, self.prompts, s.samples_per_prompt)

    def _sampling(self) -> Sampling:
        s = self.settings
        return Sampling(
            s.image_size, s.inference_steps, s.guidance, s.negative_prompt, s.generation_batch
        )

    def _make_base_images(self, model: nn.Module) -> None:
        """The pre-trained model's images: of unrelated prompts, and if wanted of the subject's."""
        s = self.settings
        self._base_folders = {}
        for name in (IMAGES, DRIFT):
            folder = self.cache / f"base-{self._key(self._jobs(name, Path()))}"
            self._base_folders[name] = folder
            if name == DRIFT or s.unadapted:
                self._generate_base(model, self._jobs(name, folder))

    def _key(self, wanted: list[Job]) -> str:
        """What images of the pre-trained model depend on, as part of a file name."""
        s = self.settings
        content = {
            "files": self.folder.stamp("transformer", "vae", "scheduler", *LANGUAGE),
            "jobs": [[job.file.name, job.prompt, job.seed] for job in wanted],
            "sampling": vars(self._sampling()),
            "weights": [s.weights, s.max_sequence_length],
        }
        return digest_json(content)[:24]

    def _generate_base(self, model: nn.Module, wanted: list[Job]) -> None:
        device = next(model.parameters()).device.type
        half = self.settings.weights == "bf16"
        with torch.autocast(device, torch.bfloat16, enabled=half):
            generate(self.folder, model, self.vae, self.encoded, wanted, self._sampling())

    def _class_latents(self, model: nn.Module) -> Latents:
        """Latents of images of the class, made by the pre-trained model from the class prompt."""
        s = self.settings
        prompt = self._fill(s.class_prompt)
        key = self._key(jobs(Path(), "prior", [prompt], s.prior_images))
        wanted = jobs(self.cache / f"prior-{key}", "prior", [prompt], s.prior_images)
        self._generate_base(model, wanted)
        images = [read_png(job.file) for job in wanted]
        return encode_images(self.folder, images, s.image_size, self.cache)


def flow_forward(model: nn.Module, batch: Batch) -> Tensor:
    """The velocity (B, C, h, w) of an SD3 transformer at the batch's latents, noise and σ."""
    noisy = interpolate(batch["latent"], batch["noise"], batch["sigma"])
    dtype = model.get_parameter("pos_embed.proj.weight").dtype  # no method adapts it
    velocity: Tensor = model(
        hidden_states=noisy.to(dtype),
        timestep=batch["sigma"] * 1000,
        encoder_hidden_states=batch["tokens"].to(dtype),
        pooled_projections=batch["pooled"].to(dtype),
        return_dict=False,
    )[0]
    return velocity


def mean_flow_loss(
    model: nn.Module,
    batch: Batch,
    weighting: Weighting = "logit_normal",
    precondition: bool = True,
    prior_weight: float = 1.0,
) -> Tensor:
    """The mean loss of the examples; those marked ``prior`` have their own mean and weight."""
    velocity = flow_forward(model, batch)
    each = flow_loss(
        velocity, batch["latent"], batch["noise"], batch["sigma"], weighting, precondition
    )
    if "prior" not in batch:
        return each.mean()
    prior = batch["prior"].float()
    own = (each * (1 - prior)).sum() / (1 - prior).sum().clamp(min=1)
    return own + prior_weight * (each * prior).sum() / prior.sum().clamp(min=1)


def _copy(source: Path, target: Path) -> None:
    """Copy an image, whole or not at all, where there is one and it is not there yet."""
    if source.is_file() and not target.is_file():
        with atomic(target) as temporary:
            shutil.copyfile(source, temporary)
